"""The Slurm script: what a shell linter says, and what it does on two Ray nodes that a stand-in for srun starts here."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from brainsynth.storage.commit import committed_shards
from brainsynth.storage.filesystem import open_store
from tests.chaos.noise import diary

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "cluster" / "slurm" / "job.sbatch"
SHARDS, PER_SHARD = 24, 2
SRUN = """#!/bin/bash
for option in "$@"; do
    case $option in --ntasks=*) tasks=${option#*=};; --*) ;; *) break;; esac
    shift
done
pids=()
for ((i = 0; i < tasks; i++)); do SLURM_PROCID=$i "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
while kill -0 "${pids[@]}" 2>/dev/null; do wait; done
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$SCONTROL_LOG"
"""


def test_a_linter_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("shellcheck")
    said = subprocess.run([linter, SCRIPT], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_the_linter_would_find_something(tmp_path: Path) -> None:
    broken = tmp_path / "job.sbatch"
    broken.write_text(SCRIPT.read_text().replace('kill -TERM "$nodes"', "kill -TERM $node"))
    linter = Path(sys.executable).with_name("shellcheck")
    said = subprocess.run([linter, broken], capture_output=True, text=True)
    assert "SC2154" in said.stdout  # a variable that nobody sets


def test_directives() -> None:
    text = SCRIPT.read_text()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.MULTILINE))
    assert len(directives) == text.count("#SBATCH")
    assert text.index("#SBATCH") > 0
    assert text.rindex("#SBATCH") < text.index("set -euo")  # Slurm reads none after the first command
    assert {"requeue", "exclusive"} <= set(directives)
    assert directives["open-mode"] == "append"  # a requeued job must not wipe what the first said
    assert directives["signal"] == "B:USR1@180"
    assert directives["ntasks-per-node"] == "1"
    assert not re.search(r"RAY_AUTH_TOKEN=[0-9a-f]", text)


class Job:
    """One run of the script on two "machines" of one CPU each."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.requeued = folder, folder / "scontrol.log"
        commands = folder / "bin"
        commands.mkdir(exist_ok=True)
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_"))}
        environment |= {"PATH": f"{commands}:{os.environ['PATH']}", "VENV": str(Path(sys.executable).parents[1])}
        environment |= {"HEAD_IP": "127.0.0.1", "SCONTROL_LOG": str(self.requeued), "PYTHONPATH": str(REPO)}
        environment |= {"SLURM_JOB_ID": str(number), "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1"}
        environment |= {"RAY_raylet_start_wait_time_s": "120"}
        self.began_at, self.number, self.log = time.time(), number, folder / "job.log"
        options = ["--rows", str(SHARDS * PER_SHARD), "--per-shard", str(PER_SHARD), "--seconds", "0.3"]
        options += ["--wait-for-nodes", "--cpus-per-worker", "0.6"]  # so no node holds both workers
        job = ["-m", "tests.chaos.noise", str(folder / "data"), str(folder / "diary"), *options]
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                ["bash", SCRIPT, *job],
                env=environment,
                cwd=REPO,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def committed(self) -> set[int]:
        return committed_shards(open_store(str(self.folder / "data")))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.2)

    def end(self) -> int:
        """The exit code, once nothing that it started is left."""
        code = self.process.wait(timeout=240)
        end = time.monotonic() + 60  # Ray's helpers look every few seconds whether their node is still there
        while self._processes() and time.monotonic() < end:
            time.sleep(0.5)
        assert not self._processes()
        return code

    def _processes(self) -> list[int]:
        mark, found = f"SLURM_JOB_ID={self.number}\0".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                found += [int(path.parent.name)] if mark in path.read_bytes() else []
        return found

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever happened, nothing is left."""
        for process in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(f"/tmp/ray-{self.number}", ignore_errors=True)  # noqa: S108


@pytest.mark.slow
def test_it_leaves_in_order_when_the_time_is_up_and_the_same_command_goes_on(tmp_path: Path) -> None:
    number = random.randrange(10_000)
    with Job(tmp_path, number) as first:
        first.wait_until(lambda: len(first.committed()) >= 4)
        os.kill(first.process.pid, signal.SIGUSR1)
        assert first.end() == 143, first.log.read_text()[-4000:]
    assert first.requeued.read_text().split() == ["requeue", str(number)]
    done = first.committed()
    assert 4 <= len(done) < SHARDS

    with Job(tmp_path, number) as second:
        assert second.end() == 0, second.log.read_text()[-4000:]
    assert second.committed() == set(range(SHARDS))
    assert second.requeued.read_text().count("requeue") == 1  # what has succeeded is not run again
    begun = [shard for _, _, what, shard in diary(tmp_path / "diary") if what == "begin"]
    assert all(begun.count(shard) == 1 for shard in done)
    workers = {pid for when, pid, _, _ in diary(tmp_path / "diary") if when > second.began_at}
    assert len(workers) == 2  # one on each node


@pytest.mark.slow
def test_cancelled_it_is_not_queued_again(tmp_path: Path) -> None:
    with Job(tmp_path, random.randrange(10_000)) as job:
        job.wait_until(lambda: len(job.committed()) >= 1)
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.end() == 143, job.log.read_text()[-4000:]
    assert not job.requeued.exists()
