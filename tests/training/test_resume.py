"""What a resume does to the logs, and how several workers come to leave at the same step."""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog

from brainsynth.training.preemption import Listener, Request
from brainsynth.training.trackers import MetricsLog


def log_steps(folder: Path, start: int, stop: int, tensorboard: bool = False) -> None:
    metrics = MetricsLog(folder, tensorboard, start)
    for step in range(start + 1, stop + 1):
        metrics.scalars(step, {"loss": step / 8})
    metrics.close()


def steps(folder: Path) -> list[int]:
    return [json.loads(text)["step"] for text in (folder / "metrics.jsonl").read_text().splitlines()]


def test_no_step_is_logged_twice(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 7)
    log_steps(tmp_path, 5, 9)
    assert steps(tmp_path) == list(range(1, 10))


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    for torn in ('{"step": 4, "lo', "\0" * 40, "4", '{"loss": 1}'):
        log_steps(tmp_path, 0, 3)
        with open(tmp_path / "metrics.jsonl", "a") as handle:
            handle.write(torn)
        log_steps(tmp_path, 3, 5)
        assert steps(tmp_path) == [1, 2, 3, 4, 5]


def events(path: Path) -> list[Event]:
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_tensorboard_is_told_which_steps_come_again(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 7, tensorboard=True)
    log_steps(tmp_path, 5, 9, tensorboard=True)
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    assert [event.step for event in events(first) if event.summary.value] == [1, 2, 3, 4, 5, 6, 7]
    again = [event.step for event in events(second) if event.session_log.status == SessionLog.START]
    assert again == [6]  # TensorBoard drops step 6 and all after it from the files before
    assert [event.step for event in events(second) if event.summary.value] == [6, 7, 8, 9]


class Pair:
    """One of two workers that talk through a barrier."""

    world_size = 2

    def __init__(self, barrier: threading.Barrier, said: list[list[float]], rank: int) -> None:
        self.barrier, self.said, self.rank = barrier, said, rank

    def largest(self, values: list[float]) -> list[float]:
        self.said[self.rank] = values
        self.barrier.wait(10)
        found = [max(pair) for pair in zip(*self.said, strict=True)]
        self.barrier.wait(10)
        return found


def test_all_workers_leave_at_the_step_where_one_was_asked_to() -> None:
    barrier, said = threading.Barrier(2), [[0.0, 0.0], [0.0, 0.0]]
    asked, left = threading.Event(), [0, 0]

    def work(rank: int) -> None:
        def preempted() -> Request:
            return Request.LEAVE if rank == 1 and asked.is_set() else Request.NOTHING

        listener = Listener(preempted, Pair(barrier, said, rank), 0)
        for step in range(100_000):
            if rank == 1 and step == 500:
                asked.set()
            if listener.request(step) is Request.LEAVE:
                left[rank] = step
                return

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert left[0] == left[1] >= 500
