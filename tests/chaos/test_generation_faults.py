"""Workers, nodes and drivers die; the same command ends with the same dataset."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from brainsynth.errors import UserError
from brainsynth.executors.preflight import check_this_machine
from brainsynth.manifest import stored_sha256
from brainsynth.storage.arrays import decode_shard, shard_key
from brainsynth.storage.commit import commit_key, committed_shards, read_commit, read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.finalise import finalise
from brainsynth.storage.verify import verify_dataset
from tests.chaos.ledger import Finding, Ledger
from tests.chaos.noise import diary, noise_plan, stored
from tests.line import Line, write_yaml

REPO = Path(__file__).parents[2]
Size = Callable[[int, int], int]


class Driver:
    """A run of `tests.chaos.noise`, or of a racer, in processes of its own."""

    def __init__(self, root: Path, *options: object, module: str = "noise") -> None:
        self.root, self.diary = root, root.with_name(root.name + "-diary")
        command = [sys.executable, "-m", f"tests.chaos.{module}", str(root), str(self.diary), *map(str, options)]
        self.began = time.time()
        self.process = subprocess.Popen(
            command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.output += line

    def finish(self, timeout_s: float = 400) -> int:
        """Wait for it; its exit code."""
        try:
            code = self.process.wait(timeout_s)
            self._reader.join(30)  # its last lines may still be in the pipe
            return code
        finally:
            if self.process.poll() is None:
                self.kill()

    def kill(self) -> None:
        """SIGKILL to it and to what it started in its group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def workers(self) -> list[int]:
        """Process ids of its workers that are alive."""
        if not self.diary.is_dir():
            return []
        return [int(path.name) for path in self.diary.iterdir() if Path("/proc", path.name).is_dir()]

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        """Look until it is so."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def committed(self) -> set[int]:
        return committed_shards(open_store(str(self.root)))

    def working_s(self) -> float:
        """Seconds from the first shard that was begun to the last commit."""
        begun = min(when for when, _, what, _ in diary(self.diary) if what == "begin")
        return max(path.stat().st_mtime for path in (self.root / "commits").iterdir()) - begun


def judge(root: Path) -> tuple[int, int, int]:
    """(lost, duplicated, wrong) volumes of a dataset of noise, every voxel compared with what it must be.

    Wrong is also a label map that is not that of the image next to it, and a volume of a structure that it does not have.
    """
    store = open_store(str(root))
    plan = read_plan(store)
    _, samples = noise_plan(plan.num_samples, plan.samples_per_shard)
    ids: list[str] = []
    wrong = 0
    for index in range(plan.num_shards):
        shard = plan.shard(index)
        record = read_commit(store, plan, index)
        there = [decode_shard(plan, spec, shard, store.read(shard_key(spec, index))) for spec in plan.arrays]
        for sample, *arrays in zip(record.samples, *there, strict=True):
            ids.append(sample.sample_id)
            truth = stored(plan, int(samples["seed"].iloc[sample.row]))
            volumes = plan.labels.volumes_ml(truth[1], plan.volume.voxel_ml) if plan.labels else {}
            wrong += (
                any((array != true).any() for array, true in zip(arrays, truth, strict=True))
                or sample.voxel_sha256 != stored_sha256(truth)
                or sample.extra != volumes
            )
    lost = len(set(samples["sample_id"]) - set(ids))
    return lost, len(ids) - len(set(ids)), int(wrong)


def recomputed(root: Path, folder: Path) -> int:
    """Shards that a worker began although their commit record was there."""
    made = 0
    for when, _, what, shard in diary(folder):
        record = root / commit_key(shard)
        made += what == "begin" and record.exists() and when > record.stat().st_mtime + 0.05
    return made


PAIR = pytest.mark.parametrize("labels", [False, True], ids=["images", "images and labels"])


def named(fault: str, labels: bool) -> str:
    """A fault in the table: of datasets of images, or of images and label maps."""
    return f"{fault}; image and label map" if labels else fault


def assert_whole(root: Path) -> None:
    report = verify_dataset(open_store(str(root)))
    assert report.ok, report.summary()
    assert judge(root) == (0, 0, 0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Driver]:
    """A run in peace, to compare with; made when first asked for."""
    made: dict[tuple[object, ...], Driver] = {}

    def get(*options: object) -> Driver:
        if options not in made:
            made[options] = Driver(tmp_path_factory.mktemp("peace") / "data", *options)
            assert made[options].finish() == 0, made[options].output
        return made[options]

    return get


@PAIR
def test_a_storm_of_kills_on_two_racing_workers(tmp_path: Path, ledger: Ledger, size: Size, labels: bool) -> None:
    rows, per_shard, seconds = size(40, 240), 4, size(20, 60) / 1000
    wanted, kills = size(6, 60), 0
    dice, lost, duplicated, wrong, volumes, round_ = random.Random(0), 0, 0, 0, 0, 0
    while kills < wanted:  # a dataset that was finished before the storm was over is followed by another
        root, round_ = tmp_path / f"data{round_}", round_ + 1
        plan, samples = noise_plan(rows, per_shard, labels=labels)
        from brainsynth.storage.commit import write_plan

        store = open_store(str(root))
        write_plan(store, plan, samples)
        racers: dict[int, Driver] = {}
        while len(committed_shards(store)) < plan.num_shards:
            for lane in (0, 1):
                if lane not in racers or racers[lane].process.poll() is not None:
                    options = (rows, per_shard, seconds, dice.randrange(1 << 30), labels)
                    racers[lane] = Driver(root, *options, module="racer")
            time.sleep(dice.uniform(0.2, 1.2))
            victim = racers[dice.randrange(2)]
            # One that has not begun yet proves nothing.
            if victim.process.poll() is None and victim.process.pid in victim.workers():
                time.sleep(dice.uniform(0, 0.3))
                victim.kill()
                kills += 1
        for racer in racers.values():
            racer.finish()
        finalise(store, plan)
        found = judge(root)
        lost, duplicated, wrong = lost + found[0], duplicated + found[1], wrong + found[2]
        volumes += rows
        assert verify_dataset(store).ok
    ledger.record(
        Finding(
            "nothing lost or duplicated", named("SIGKILL storm on two racing workers", labels), kills,
            f"{volumes - lost - wrong}/{volumes} volumes exact after {kills} kills",
            "≥ 60 kills, 240/240 exact, 0 lost, 0 duplicated", lost, duplicated, wrong,
        )
    )  # fmt: skip
    assert (lost, duplicated, wrong) == (0, 0, 0)
    assert kills >= wanted


@pytest.mark.slow
def test_killed_actors_cost_little(
    tmp_path: Path, ledger: Ledger, size: Size, undisturbed: Callable[..., Driver]
) -> None:
    options = ("--rows", size(120, 480), "--seconds", 0.1)
    peace = undisturbed(*options)
    run = Driver(tmp_path / "data", *options)
    dice, kills = random.Random(1), size(1, 5)
    for number in range(kills):
        share = (number + 1) * (options[1] // 4) // (kills + 2)
        run.wait_until(lambda share=share: len(run.committed()) >= share and len(run.workers()) == 2)  # type: ignore[misc]
        os.kill(dice.choice(run.workers()), signal.SIGKILL)
    assert run.finish() == 0, run.output
    assert_whole(run.root)
    again = recomputed(run.root, run.diary)
    lost_s = max(0.0, run.working_s() - peace.working_s()) / kills
    ledger.record(
        Finding(
            "actor or node loss is cheap", "actor SIGKILL, two actors", kills,
            f"{again} committed shards made again; mean {lost_s:.1f} s of wall time lost per kill",
            "0 recomputed committed rows; median ≤ 5 s lost per kill", *judge(run.root), seconds_lost=lost_s,
        )
    )  # fmt: skip
    assert again == 0


def test_a_lost_node_costs_no_committed_row(
    tmp_path: Path, ledger: Ledger, size: Size, undisturbed: Callable[..., Driver]
) -> None:
    if size(0, 1) == 0:
        pytest.skip("a cluster of two nodes takes a minute: `make chaos`")
    options = ("--rows", 480, "--seconds", 0.1)
    peace = undisturbed(*options)
    run = Driver(tmp_path / "data", *options, "--lose-node-after", 30)
    assert run.finish() == 0, run.output
    assert "losing a node" in run.output
    assert_whole(run.root)
    again = recomputed(run.root, run.diary)
    # Half the workers are gone from a quarter of the way on: what remains takes twice as long without anybody's fault.
    peaceful_s = peace.working_s()
    fair_s = peaceful_s * (0.25 + 0.75 * 2)
    lost_s = max(0.0, run.working_s() - fair_s)
    ledger.record(
        Finding(
            "actor or node loss is cheap", "node loss, two nodes", 1,
            f"{again} committed shards made again; {lost_s:.1f} s beyond what one node alone needs for the rest",
            "0 recomputed committed rows; median ≤ 5 s lost per kill", *judge(run.root), seconds_lost=lost_s,
        )
    )  # fmt: skip
    assert again == 0


@pytest.mark.slow
@PAIR
def test_driver_killed_again_and_again(
    tmp_path: Path, ledger: Ledger, size: Size, undisturbed: Callable[..., Driver], labels: bool
) -> None:
    kills = size(1, 10)
    options = ("--rows", size(120, 480), "--seconds", 0.1, *(["--labels"] if labels else []))
    peace = undisturbed(*options)
    dice, root, worst, last = random.Random(2), tmp_path / "data", 0, 0.0
    wasted: list[float] = []
    shards = options[1] // 4
    for number in range(kills):
        run = Driver(root, *options)
        share = (number + 1) * shards // (kills + 1)
        run.wait_until(lambda run=run, share=share: len(run.committed()) >= share)  # type: ignore[misc]
        time.sleep(dice.uniform(0, 0.4))
        workers = run.workers()
        run.kill()
        for (
            worker
        ) in workers:  # as if the machine were gone: actors that outlive their driver would finish what they have
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        last = time.time()
        deadline = time.monotonic() + 60
        while run.workers() and time.monotonic() < deadline:
            time.sleep(0.05)
        done = run.committed()
        begun = [(w, pid, s) for w, pid, what, s in diary(run.diary) if what == "begin" and w > run.began]
        unfinished = {(pid, shard) for _, pid, shard in begun if shard not in done}
        for pid in {pid for pid, _ in unfinished}:
            worst = max(worst, sum(p == pid for p, _ in unfinished))
        wasted += [last - w for w, _, shard in begun if shard not in done]
    run = Driver(root, *options)
    assert run.finish() == 0, run.output
    assert_whole(root)
    again = recomputed(root, run.diary)
    stores = [open_store(str(r)) for r in (root, peace.root)]
    tables = [s.read("dataset.json").decode() for s in stores]
    same = tables[0].split('"shards_digest": ')[1][:66] == tables[1].split('"shards_digest": ')[1][:66]
    ledger.record(
        Finding(
            "minimal resume", named("SIGKILL of driver and actors at once, at random moments", labels), kills,
            f"at most {worst} unfinished shard(s) per worker and kill, {again} committed ones made again; final digest "
            f"{'equal to' if same else 'DIFFERENT from'} an undisturbed run's",
            "≤ 1 shard per worker redone; final digests equal", *judge(root),
            seconds_lost=statistics.median(wasted) if wasted else 0.0,
        )
    )  # fmt: skip
    assert same
    assert again == 0
    assert worst <= 2  # one being made while the one before is being written


def test_a_dead_raylet_ends_the_run_and_the_same_command_resumes(tmp_path: Path, ledger: Ledger, size: Size) -> None:
    if size(0, 1) == 0:
        pytest.skip("Ray takes a minute to see that its raylet is dead: `make chaos`")
    options = ("--rows", 240, "--seconds", 0.1, "--stall", 60)
    run = Driver(tmp_path / "data", *options)
    run.wait_until(lambda: len(run.committed()) >= 10)
    raylets = [pid for pid in children(run.process.pid) if "raylet" in Path(f"/proc/{pid}/comm").read_text()]
    assert len(raylets) == 1
    began = time.monotonic()
    os.kill(raylets[0], signal.SIGKILL)
    code = run.finish(300)
    took_s = time.monotonic() - began
    assert code != 0
    done = len(run.committed())
    assert 10 <= done < 60
    again = Driver(tmp_path / "data", *options)
    assert again.finish() == 0, again.output
    assert_whole(tmp_path / "data")
    made_again = recomputed(tmp_path / "data", again.diary)
    ledger.record(
        Finding(
            "actor or node loss is cheap", "raylet SIGKILL on a private session", 1,
            f"the run ended with code {code} after {took_s:.0f} s, the same command resumed at {done} of 60 shards; "
            f"{made_again} committed shards made again",
            "never hangs; 0 recomputed committed rows", *judge(tmp_path / "data"), seconds_lost=took_s,
        )
    )  # fmt: skip
    assert made_again == 0


def children(pid: int) -> list[int]:
    """All processes below one."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


@pytest.mark.slow
def test_a_deadlocked_actor_is_ended_with_stacks(tmp_path: Path, ledger: Ledger) -> None:
    run = Driver(tmp_path / "data", "--rows", 80, "--deadlock", 5, "--stall", 8, "--workers", 1)
    code = run.finish(300)
    silent_s = time.time() - max(p.stat().st_mtime for p in (run.root / "commits").iterdir())
    assert code == 75, run.output
    for told in ("no shard was committed for", "noise.py", "in make", "resource", "CPU", "run the same command again"):
        assert told in run.output, run.output
    before = run.committed()
    assert 5 not in before
    left = [pid for pid in run.workers() if time.sleep(0.5) is None]
    deadline = time.monotonic() + 60
    while left and time.monotonic() < deadline:
        left = run.workers()
        time.sleep(0.2)
    assert not left, "an actor outlived its run"
    again = Driver(tmp_path / "data", "--rows", 80, "--workers", 0)
    assert again.finish() == 0, again.output
    assert_whole(run.root)
    ledger.record(
        Finding(
            "never hangs", "deadlocked actor, stall_timeout_s 8", 1,
            f"ended with exit code 75 and the stack of the deadlock {silent_s:.0f} s after the last commit; the same "
            "command resumed", "the watchdog ends it as configured", *judge(run.root), seconds_lost=silent_s,
        )
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_commits_what_is_done_and_leaves(tmp_path: Path, ledger: Ledger, size: Size, workers: int) -> None:
    leaving: list[float] = []
    tries, root = size(1, 3), tmp_path / "data"
    options = ("--rows", 480, "--seconds", 0.1, "--workers", workers)
    for _ in range(tries):
        before = len(committed_shards(open_store(str(root))))
        run = Driver(root, *options)
        run.wait_until(lambda run=run, before=before: len(run.committed()) >= before + 4)  # type: ignore[misc]
        began = time.monotonic()
        run.process.terminate()
        assert run.finish(60) == 143, run.output
        leaving.append(time.monotonic() - began)
        assert "rerun the same command to resume" in run.output
        assert not (root / "dataset.json").exists()
    ledger.record(
        Finding(
            "never hangs", f"SIGTERM, {workers or 'no'} actors", tries,
            f"exit code 143 after {max(leaving):.1f} s at most", "commits what is done and leaves within 3 s",
            seconds_lost=statistics.median(leaving),
        )
    )  # fmt: skip
    assert max(leaving) < 3.5, leaving
    store = open_store(str(root))
    plan = read_plan(store)
    for index in committed_shards(store):
        read_commit(store, plan, index)


@pytest.mark.parametrize(
    ("runtime", "told"),
    [
        ({"workers": 4, "cpus_per_worker": 400}, "4 workers with 400 CPU each do not fit: 0 fit"),
        ({"workers": 9000, "cpus_per_worker": 1}, "9000 workers with 1 CPU each do not fit"),
        ({"workers": 64, "gpus_per_worker": 8}, "64 workers with 0.5 CPU and 8 GPU each do not fit"),
    ],
)
def test_an_impossible_layout_is_refused_at_once(
    line: Line, tmp_path: Path, ledger: Ledger, runtime: dict[str, int], told: str
) -> None:
    config = write_yaml(line.generate(tmp_path / "data", runtime=runtime), tmp_path)
    command = [sys.executable, str(REPO / "jobs" / "generate.py"), "--config", str(config)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    took_s = time.monotonic() - began
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert "lower runtime.workers or what each worker asks for" in done.stderr
    assert not (tmp_path / "data").exists()
    began = time.monotonic()
    with pytest.raises(UserError, match="do not fit"):
        check_this_machine(runtime["workers"], runtime.get("cpus_per_worker", 0.5), runtime.get("gpus_per_worker", 0))
    check_s = time.monotonic() - began
    ledger.record(
        Finding(
            "never hangs",
            f"impossible layout: {', '.join(f'{k} {v}' for k, v in runtime.items())}",
            1,
            f"exit code 2 after {took_s:.1f} s from the start of the command, nearly all of it imports (the check itself "
            f"{1000 * check_s:.0f} ms); nothing written",
            "refused ≤ 5 s, with the fix",
        )
    )
    assert check_s < 5
