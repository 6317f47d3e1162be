"""Secrets that a process holds, or that somebody put where they do not belong, appear nowhere that a run writes to."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.line import Line, write_yaml

pytestmark = pytest.mark.slow  # a training and a generation on Ray; `make chaos` counts the hits too
REPO = Path(__file__).parents[2]
PLANTED = {
    "a key in the environment": "CANARYkeyAKIA0001wJalrXUtnFEMI",
    "a token in the environment": "CANARYhftoken0002hf_abcdefghijkl",
    "a password in an address of the environment": "CANARYpassword0003",
    "a token in the query of a URI": "CANARYquery0004",
    "a password in a comment of the config": "CANARYcomment0005",
}
KEY, TOKEN, PASSWORD, QUERY, COMMENT = PLANTED.values()


@dataclass(frozen=True)
class Run:
    """What the planted runs left."""

    output: str
    folders: dict[str, Path]
    ray_token: str

    def hits(self, word: str) -> list[str]:
        """Where the word stands: in the output, in a file, in a file's name, or in a link's target."""
        found = ["standard output"] if word in self.output else []
        for what, folder in self.folders.items():
            for path in folder.rglob("*"):
                if word in str(path) or (path.is_symlink() and word in os.readlink(path)):
                    found.append(f"{what}: name of {path}")
                if stat.S_ISREG(path.lstat().st_mode) and word.encode() in path.read_bytes():
                    found.append(f"{what}: {path}")
        return found


def run_job(name: str, config: Path, *more: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "jobs" / f"{name}.py"), "--config", str(config), *more]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_ADDRESS", "RAY_AUTH"))}
    return subprocess.run(
        command, cwd=REPO, env=clean | environment, text=True, timeout=400,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def planted_runs(line: Line, folder: Path, ray_folder: Path) -> Run:
    """A training and a generation on one Ray worker each, and two that are refused, with every secret in its place."""
    home = folder / "home"
    home.mkdir()
    environment = {
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_ACCESS_KEY_ID": "AKIAPLAIN",
        "HF_TOKEN": TOKEN,
        "https_proxy": f"http://someone:{PASSWORD}@127.0.0.1:9",
        "HTTPS_PROXY": f"http://someone:{PASSWORD}@127.0.0.1:9",
        "RAY_TMPDIR": str(ray_folder),
        "HOME": str(home),
    }
    generate = line.generate(folder / "generated", runtime={"workers": 1, "cpus_per_worker": 0.5, "micro_batch": 4})
    training = line.autoencoder() | {"output": str(folder / "training")}
    training["runtime"] = {"workers": 1, "cpus_per_worker": 0.5, "trackers": ["tensorboard"]}
    outputs, codes = [], []
    for job, config, changes in (
        ("generate", generate, ()),
        ("train_autoencoder", training, ()),
        ("generate", generate, ("--set", f"output=s3://bucket/data?signature={QUERY}")),
        ("generate", generate, ("--set", f"output=s3://someone:{PASSWORD}@bucket/data")),
    ):
        path = write_yaml(config, folder, f"{job}.yaml")
        path.write_text(f"# the bucket's password is {COMMENT}\n{path.read_text()}")
        done = run_job(job, path, *changes, environment=environment)
        outputs.append(done.stdout)
        codes.append(done.returncode)
    assert codes == [0, 0, 2, 2], "\n".join(outputs)[-4000:]
    folders = {"dataset": folder / "generated", "training": folder / "training", "Ray": ray_folder}
    return Run("\n".join(outputs), folders, (home / ".ray" / "auth_token").read_text())


_RUNS: list[Run] = []


@pytest.fixture(scope="session")
def planted(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The runs, made once though two suites ask. Ray's folder has a short name, since its sockets live there."""
    if _RUNS:
        yield _RUNS[0]
        return
    ray_folder = Path(tempfile.mkdtemp(prefix="bs-"))
    _RUNS.append(planted_runs(line, tmp_path_factory.mktemp("planted"), ray_folder))
    yield _RUNS[0]
    shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.mark.parametrize("what", PLANTED)
def test_a_secret_stays_out(planted: Run, what: str) -> None:
    assert planted.hits(PLANTED[what]) == []


def test_the_token_of_ray_stays_out(planted: Run) -> None:
    assert len(planted.ray_token) == 64
    assert planted.hits(planted.ray_token) == []


def test_the_search_finds_what_is_there(planted: Run) -> None:
    assert any(hit.startswith("dataset") for hit in planted.hits("plan_fingerprint"))
    assert any(hit.startswith("training: ") and "checkpoint.json" in hit for hit in planted.hits("config_digest"))
    assert any("session" in hit and ".log" in hit for hit in planted.hits("raylet"))
    assert "standard output" in planted.hits("must not carry")
