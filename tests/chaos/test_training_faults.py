"""Training that cannot lose: killed, asked to leave, its files damaged, its disk full, it ends with the same weights."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from brainsynth.bundle.files import read_bundle
from brainsynth.config.training import AutoencoderTrainConfig
from brainsynth.errors import UserError
from brainsynth.models.loading import load_models
from brainsynth.stages import train_autoencoder
from brainsynth.training.autoencoder import TRAINING, AutoencoderTask
from brainsynth.training.checkpoint import checkpoints, restore_newest
from brainsynth.training.loop import Worker
from brainsynth.training.runs import training_digest
from tests.chaos.checkpoint_saver import DIGEST, fill, make_state
from tests.chaos.ledger import REPO, Finding, Ledger
from tests.line import Line, as_config, write_yaml

Size = Callable[[int, int], int]
START_S = 300
EVERY = 5
"""Steps between checkpoints."""
HERE = {"workers": 0, "threads_per_worker": 1, "trackers": []}
ON_RAY = {"workers": 2, "cpus_per_worker": 0.5, "threads_per_worker": 1, "trackers": [], "max_failures": 50}
RESUME, VALID, SILENT, LEAVE = (
    "training resumes exactly",
    "there is always a valid checkpoint",
    "corruption is never silent",
    "a training asked to leave saves first",
)
TWO_WORKERS = """
import os, sys
import torch.distributed as dist
from brainsynth.config.load import load_config
from brainsynth.config.training import AutoencoderTrainConfig
from brainsynth.training.autoencoder import TRAINING
from brainsynth.training.runner import fit
_, config, store, rank = sys.argv
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
fit(TRAINING, load_config(config, AutoencoderTrainConfig))
dist.destroy_process_group()
"""


class Training:
    """One training of the tiny autoencoder, run as a job of its own that can be hurt."""

    def __init__(self, line: Line, folder: Path, steps: int, runtime: dict[str, Any]) -> None:
        self.folder, self.process = folder, None
        options = {"steps": steps, "checkpoint_every": EVERY, "validate_every": 20}
        self.config = line.autoencoder(str(folder), **options) | {"runtime": runtime}
        self.yaml = write_yaml(self.config, folder.parent, f"{folder.name}.yaml")

    def start(self) -> None:
        """Start the job, as a user would again and again."""
        command = [sys.executable, str(REPO / "jobs" / "train_autoencoder.py"), "--config", str(self.yaml)]
        with open(self.folder.with_suffix(".log"), "a") as log:
            self.process = subprocess.Popen(
                command, cwd=REPO, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def finish_here(self) -> None:
        """Go on to the end in this process."""
        train_autoencoder.run(as_config(self.config, AutoencoderTrainConfig, self.folder.parent))

    def curve(self) -> list[dict[str, float]]:
        """All lines of the metrics log but one that is still on its way."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / "metrics.jsonl").read_text().splitlines(True)
            return [json.loads(text) for text in lines if text.endswith("\n")]
        return []

    def step(self) -> int:
        """The last step in the log."""
        return int(max((row["step"] for row in self.curve()), default=0))

    def wait(self, true: Callable[[], bool]) -> None:
        """Until something is true of a job that is alive."""
        deadline = time.monotonic() + START_S
        while not true():
            assert self.process is not None
            assert self.process.poll() is None, self.text()[-3000:]
            assert time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.01)

    def ended(self) -> int:
        """The exit code, once the job has ended by itself."""
        assert self.process is not None
        return self.process.wait(START_S)

    def text(self) -> str:
        """All that the jobs have said."""
        return self.folder.with_suffix(".log").read_text()

    def newest(self) -> int:
        """The step of the newest checkpoint."""
        return max((step for step, _ in checkpoints(self.folder)), default=0)

    def same_as(self, other: Training) -> bool:
        """The very same weights and the same curve, no step twice."""
        mine, theirs = (load_file(t.folder / "autoencoder.safetensors") for t in (self, other))
        lines = [(t.folder / "metrics.jsonl").read_text() for t in (self, other)]
        return (
            mine.keys() == theirs.keys()
            and all(map(torch.equal, mine.values(), theirs.values()))
            and (lines[0] == lines[1])
        )


@pytest.fixture(scope="module")
def steps(size: Size) -> int:
    return size(20, 100)


@pytest.fixture(scope="module")
def undisturbed(line: Line, steps: int, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """The training as it goes when nothing happens."""
    training = Training(line, tmp_path_factory.mktemp("undisturbed") / "run", steps, HERE)
    training.finish_here()
    return training


@pytest.fixture
def training(line: Line, steps: int, tmp_path: Path) -> Iterator[Training]:
    """A training to be hurt, in one process."""
    training = Training(line, tmp_path / "run", steps, HERE)
    yield training
    end(training)


@pytest.fixture
def training_on_ray(line: Line, steps: int, tmp_path: Path) -> Iterator[Training]:
    """A training to be hurt, by two workers of Ray Train."""
    training = Training(line, tmp_path / "run", steps, ON_RAY)
    yield training
    end(training)


def needs_chaos(size: Size) -> None:
    """Skip what takes too long for every day."""
    if not size(0, 1):
        pytest.skip("takes minutes: with --chaos only")


def end(training: Training) -> None:
    if training.process is not None and training.process.poll() is None:
        for pid in [*descendants(training.process.pid), training.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> dict[int, str]:
    """Command lines of the processes below one, by process id."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")

    def below(one: int) -> bool:
        while one in parents:
            one = parents[one]
            if one == pid:
                return True
        return False

    return {one: name for one, name in names.items() if below(one)}


def moments(count: int, steps: int, rng: random.Random) -> list[int]:
    """Random steps to strike at, one in each of `count` stretches of the training; every strike must meet a live run."""
    edges = [round((steps - EVERY) * i / count) for i in range(count + 1)]
    return [rng.randrange(low + 1, high + 1) for low, high in itertools.pairwise(edges)]


def test_sigkill_of_the_driver(
    training: Training, undisturbed: Training, steps: int, size: Size, ledger: Ledger
) -> None:
    needs_chaos(size)
    rng, lost, redone, before, when = random.Random(1), [], [], 0, 0.0
    kills = 7
    for moment in moments(kills, steps, rng):
        training.start()
        if before:
            training.wait(lambda passed=before: training.step() > passed)
            lost.append(time.monotonic() - when)
        training.wait(lambda least=moment: training.step() >= least)
        time.sleep(rng.uniform(0, 0.05))
        assert training.process is not None
        os.killpg(training.process.pid, signal.SIGKILL)
        when = time.monotonic()
        assert training.ended() == -signal.SIGKILL
        before = training.step()
        redone.append(before - training.newest())
    training.finish_here()
    assert all(0 <= count <= EVERY for count in redone), redone
    assert training.same_as(undisturbed)
    record(ledger, "SIGKILL of a training in one process", kills, lost, redone)


def record(ledger: Ledger, fault: str, kills: int, lost: list[float], redone: list[int]) -> None:
    figure = f"weights and curve bit-equal; at most {max(redone)} of {EVERY} steps redone"
    ledger.record(
        Finding(RESUME, fault, kills, figure, "bit-equal, at most one checkpoint interval redone",
                seconds_lost=statistics.median(lost))
    )  # fmt: skip


def test_sigkill_of_ray_train_workers_and_sigterm_of_their_driver(
    line: Line, training_on_ray: Training, steps: int, size: Size, tmp_path: Path, ledger: Ledger
) -> None:
    needs_chaos(size)
    alone = Training(line, tmp_path / "alone", steps, ON_RAY)
    by_two_processes(alone)
    training, rng, kills = training_on_ray, random.Random(2), 3
    lost, redone = [], []
    *strikes, last = moments(kills + 1, steps, rng)
    training.start()
    assert training.process is not None
    for moment in strikes:
        training.wait(lambda least=moment: training.step() >= least)
        time.sleep(rng.uniform(0, 0.3))
        workers = [pid for pid, name in descendants(training.process.pid).items() if "RayTrainWorker" in name]
        assert len(workers) == 2, workers
        os.kill(rng.choice(workers), signal.SIGKILL)
        when = time.monotonic()
        time.sleep(0.3)  # the other worker may still end its step
        before = training.step()
        redone.append(before - training.newest())
        training.wait(lambda passed=before: training.step() > passed)
        lost.append(time.monotonic() - when)
    training.wait(lambda: training.step() >= last)
    saved_s, left_s = terminate(training)
    by_two_processes(training)
    assert all(0 <= count <= EVERY for count in redone), redone
    assert training.same_as(alone)
    record(ledger, "SIGKILL of one of two Ray Train workers", kills, lost, redone)
    figure = f"saved after {saved_s:.1f} s, driver gone after {left_s:.1f} s with code 143; resumed bit-equal"
    ledger.record(Finding(LEAVE, "SIGTERM of the driver of two Ray Train workers", 1, figure, "saved within 3 s"))
    assert saved_s < 10, "half a second to look, a step, a save"


def by_two_processes(training: Training) -> None:
    """Train to the end by two workers as Ray would start them, but without it, which is quicker."""
    store = training.folder.with_suffix(".store")
    two = [[sys.executable, "-c", TWO_WORKERS, str(training.yaml), str(store), str(rank)] for rank in range(2)]
    with open(training.folder.with_suffix(".log"), "a") as log:
        processes = [subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log) for command in two]
    assert [process.wait(START_S) for process in processes] == [0, 0], training.text()[-3000:]


def terminate(training: Training) -> tuple[float, float]:
    """SIGTERM; seconds until a checkpoint of the very step it stopped at is there, and until the job is gone."""
    assert training.process is not None
    began = time.monotonic()
    training.process.send_signal(signal.SIGTERM)
    seen: dict[int, float] = {}
    while training.process.poll() is None and time.monotonic() - began < START_S:
        seen.setdefault(training.newest(), time.monotonic() - began)
        time.sleep(0.005)
    left_s = time.monotonic() - began
    assert training.ended() == 143, training.text()[-3000:]
    stopped = training.newest()
    rows = [row["step"] for row in map(json.loads, (training.folder / "metrics.jsonl").read_text().splitlines())]
    assert max(rows) == stopped, "steps were done that no checkpoint holds"
    assert f"stopped at step {stopped} of" in training.text()
    assert "the same command" in training.text()
    assert not list(training.folder.glob(".stop-*"))
    return seen.get(stopped, left_s), left_s


def test_sigterm_saves_at_the_very_step(
    training: Training, undisturbed: Training, steps: int, size: Size, ledger: Ledger
) -> None:
    tries, rng = size(1, 4), random.Random(3)
    saved, left, odd = [], [], 0
    for moment in moments(tries, steps, rng):
        training.start()
        training.wait(lambda least=moment: training.step() >= least)
        time.sleep(rng.uniform(0, 0.05))
        saved_s, left_s = terminate(training)
        saved.append(saved_s)
        left.append(left_s)
        odd += training.newest() % EVERY > 0
    training.finish_here()
    assert training.same_as(undisturbed)
    figure = (
        f"saved after {statistics.median(saved):.2f} s (at most {max(saved):.2f}), process gone after "
        f"{statistics.median(left):.1f} s (at most {max(left):.1f}) with code 143; resumed bit-equal; "
        f"{odd} stopped between checkpoints"
    )
    ledger.record(Finding(LEAVE, "SIGTERM of a training in one process", tries, figure, "saved and gone within 3 s"))
    assert max(saved) < 3, saved


def test_sigkill_during_a_save(tmp_path: Path, size: Size, ledger: Ledger) -> None:
    tries, rng, folder = size(5, 50), random.Random(4), tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    saver = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.checkpoint_saver"],
        cwd=REPO, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert saver.stdin is not None
    assert saver.stdout is not None
    acknowledged = interrupted = 0
    state, expected = make_state(), make_state()
    for _ in range(tries):
        saver.stdin.write(f"{folder}\n")
        saver.stdin.flush()
        child = int(saver.stdout.readline().split()[1])
        assert saver.stdout.readline().startswith("saved"), "the first save shows that it runs"
        time.sleep(rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        for text in saver.stdout:
            if text == "gone\n":
                break
            acknowledged = int(text.split()[1])
        interrupted += bool(list((folder / "checkpoints").glob(".tmp-*")))
        found = restore_newest(folder, state, DIGEST)
        assert found >= acknowledged
        fill(expected, found)
        assert_same(state.tensors(), expected.tensors())
        assert state.averages["network"].updates == found
        for stray in (folder / "checkpoints").glob(".tmp-*"):
            shutil.rmtree(stray)
    saver.stdin.close()
    assert saver.wait(30) == 0
    assert interrupted >= tries // 4, "too few kills came in the middle of a save to show anything"
    figure = (
        f"{tries}/{tries} restored ({interrupted} killed in the middle of a save), each exactly the state of its step, none "
        "older than the last save that returned"
    )
    ledger.record(Finding(VALID, "SIGKILL while saving", tries, figure, "all restored"))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Flip one random bit, or cut the file at a random byte."""
    data = bytearray(path.read_bytes())
    if kind == "bit flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        # A record that loses its last line feed alone has lost nothing.
        del data[rng.randrange(len(data) - 1) :]
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["bit flip", "truncation"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    line: Line, tmp_path: Path, kind: str, size: Size, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    tries, rng, folder = size(10, 60), random.Random(5), tmp_path / "run"
    shutil.copytree(line.root / "autoencoder" / "checkpoints", folder / "checkpoints")
    config = as_config(line.autoencoder(), AutoencoderTrainConfig, tmp_path)
    inputs = TRAINING.check(config)
    digest = training_digest(config, inputs.fingerprint)
    state = AutoencoderTask(config, inputs, Worker(config.runtime, folder)).state
    (before, _), (newest, path) = checkpoints(folder)[-2:]
    path.rename(tmp_path / "aside")
    assert restore_newest(folder, state, digest) == before
    expected = state.tensors()
    (tmp_path / "aside").rename(path)
    for _ in range(tries):
        assert restore_newest(folder, state, digest) == newest  # so that what was loaded before cannot help
        file = rng.choice(sorted(path.iterdir()))
        whole = file.read_bytes()
        damage(file, kind, rng)
        caplog.clear()
        assert restore_newest(folder, state, digest) == before, f"{file.name} was damaged, and nobody noticed"
        assert f"checkpoint {path.name} is damaged and is passed over" in caplog.text
        assert_same(state.tensors(), expected)
        file.write_bytes(whole)
    figure = f"{tries}/{tries} named; the checkpoint before was restored exactly"
    ledger.record(Finding(SILENT, f"{kind} in the newest checkpoint", tries, figure, "all found"))


@pytest.mark.parametrize("kind", ["bit flip", "truncation"])
def test_a_damaged_bundle_is_refused_by_name(line: Line, tmp_path: Path, kind: str, size: Size, ledger: Ledger) -> None:
    tries, rng, folder = size(10, 60), random.Random(6), tmp_path / "bundle"
    shutil.copytree(line.root / "bundle", folder)
    load_models(folder, read_bundle(folder), torch.device("cpu"))
    for _ in range(tries):
        file = rng.choice(sorted(folder.iterdir()))
        whole = file.read_bytes()
        damage(file, kind, rng)
        with pytest.raises(UserError, match=str(file)):
            load_models(folder, read_bundle(folder), torch.device("cpu"))
        file.write_bytes(whole)
    ledger.record(Finding(SILENT, f"{kind} in a bundle", tries, f"{tries}/{tries} refused by name", "all found"))


FULL_DISK = """
import shutil, sys
from pathlib import Path
from brainsynth.config.load import load_config
from brainsynth.config.training import AutoencoderTrainConfig
from brainsynth.errors import UserError
from brainsynth.stages import train_autoencoder
from brainsynth.training.checkpoint import checkpoints
_, yaml, kept = sys.argv
config = load_config(yaml, AutoencoderTrainConfig)
disk = Path(config.output).parent
filler = disk / "filler"
filler.write_bytes(bytes(shutil.disk_usage(disk).free - (900 << 10)))  # what is left holds one checkpoint, not two
try:
    train_autoencoder.run(config)
except UserError as error:
    print("told:", error)
print("left:", [step for step, _ in checkpoints(Path(config.output))])
filler.unlink()
train_autoencoder.run(config)
for name in ("autoencoder.safetensors", "metrics.jsonl"):
    (Path(kept) / name).write_bytes((Path(config.output) / name).read_bytes())
"""


def test_a_full_disk_is_told_and_costs_nothing(
    line: Line, undisturbed: Training, steps: int, tmp_path: Path, size: Size, ledger: Ledger
) -> None:
    needs_chaos(size)
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "kept").mkdir()
    mount = f"mount -t tmpfs -o size={3 << 20} none {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    training = Training(line, disk / "run", steps, HERE | {"trackers": ["tensorboard"]})
    yaml = shutil.move(training.yaml, tmp_path)
    script = tmp_path / "script.py"
    script.write_text(FULL_DISK)
    command = f"{mount} && {sys.executable} {script} {yaml} {tmp_path / 'kept'}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], cwd=REPO, capture_output=True, text=True, timeout=START_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"told: the disk of {disk / 'run'}" in done.stdout, done.stdout
    assert "is full" in done.stdout
    assert "run the same command again" in done.stdout
    assert re.search(r"left: \[\d", done.stdout), "no older checkpoint was left to go on from"
    training.folder = tmp_path / "kept"
    assert training.same_as(undisturbed)
    figure = "reported in one sentence; older checkpoints untouched; resumed bit-equal once there was space"
    ledger.record(Finding(RESUME, "disk full", 1, figure, "a clear message, nothing lost"))
