"""Generation as benchmarks run it in an actor: with CPU seconds in the commit records, or on a stand-in for a device."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from scipy import ndimage

from brainsynth.bundle.files import read_bundle
from brainsynth.bundle.spec import BUNDLE_FILE, GATE_FILE
from brainsynth.executors import ray_data
from brainsynth.gate.features import Measured, measure
from brainsynth.gate.file import save_gate
from brainsynth.gate.gate import CHECKS, QualityGate, RulerSpec
from brainsynth.generate import DrawnShard, VolumeGenerator
from brainsynth.instruments.linear_ruler import LinearRuler
from brainsynth.instruments.tissue_features import tissue_length
from brainsynth.plan import ShardSpec
from brainsynth.records import seal
from brainsynth.storage.whole_file import file_sha256

Volumes = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class TimedShards(VolumeGenerator):
    """Generation itself, with the CPU seconds of the actor and of making in the records."""

    def make(self, shard: ShardSpec) -> DrawnShard:
        """Make a shard."""
        before, process = time.thread_time(), time.process_time()
        made = super().make(shard)
        seconds = {"make_cpu_s": time.thread_time() - before, "process_cpu_s": time.process_time()}
        made.runtime |= {**seconds, "process_cpu_before_s": process}
        return made


class StandInActor(ray_data._Actor):
    """The actor of a GPU that is not there."""

    def __init__(self, **arguments: Any) -> None:
        with mock.patch.object(ray_data, "check_gpu"):
            super().__init__(**arguments)


class StandInShards(TimedShards):
    """A device that takes `device_s` a volume and no CPU. Its volumes leave it as they are stored, as a GPU's do."""

    def __init__(self, device_s: float, serial: bool, scan: str = "", watch: str = "", **arguments: Any) -> None:
        settings = dataclasses.replace(arguments["settings"], use_gpu=False)
        super().__init__(**{**arguments, "settings": settings})
        self.ahead = 1  # as with a GPU
        self.device_s, self.serial = device_s, serial
        self.voxels = self.plan.volume.quantise(head(self.plan.volume.shape_xyz, scan))
        self.flag = Path(f"{watch}.flag") if watch else None
        if self.flag is not None:
            self.flag.write_bytes(IDLE)
            subprocess.Popen([sys.executable, "-S", "-c", WATCH, str(os.getpid()), str(self.flag), watch])

    def volumes(self, rows: pd.DataFrame, seconds: dict[str, float]) -> Any:
        """(B, X, Y, Z) in the stored dtype."""
        began = time.monotonic()
        if self.flag is not None:
            self.flag.write_bytes(BUSY)
        # The copy from the device, which counts as its time in generation, too.
        voxels = np.stack([self.voxels] * len(rows))
        time.sleep(max(0.0, self.device_s * len(rows) - (time.monotonic() - began)))
        if self.flag is not None:
            self.flag.write_bytes(IDLE)
        seconds["sample_s"] += time.monotonic() - began
        return voxels

    def make(self, shard: ShardSpec) -> Any:
        """Make a shard; with `serial` all of it."""
        made = super().make(shard)
        return self.finish(made) if self.serial else made


IDLE, BUSY = b"0", b"1"
WATCH = """
import os, sys, time
process, flag, out = sys.argv[1:]
with open(out, "w") as file:
    while os.path.isdir(f"/proc/{process}"):
        running = 0
        for task in os.listdir(f"/proc/{process}/task"):
            try:
                with open(f"/proc/{process}/task/{task}/stat") as stat:
                    running += stat.read().rpartition(")")[2].split()[0] == "R"
            except OSError:
                pass
        with open(flag) as now:
            file.write(f"{now.read(1)}{min(running, 9)} ")
        file.flush()
        time.sleep(0.02)
"""
"""Notes every 20 ms whether the device is busy, and how many threads of the actor run or could run."""


def waiting(watch: str, cores: int) -> dict[str, float]:
    """Of the time between the first and the last volume: how long the device waited, for cores and for anything else.

    It waits for cores while as many threads as there are cores run or could run.
    """
    notes = [note for note in Path(watch).read_text().split() if len(note) == 2]
    busy = [place for place, note in enumerate(notes) if note[0] == "1"]
    idle = [int(note[1]) for note in notes[busy[0] : busy[-1] + 1] if note[0] == "0"]
    total, for_cores = busy[-1] + 1 - busy[0], sum(running >= cores for running in idle)
    return {
        "device_waits_share": len(idle) / total,
        "device_waits_for_cores_share": for_cores / total,
        "device_waits_for_python_share": (len(idle) - for_cores) / total,
        "notes": total,
    }


def head(shape: tuple[int, int, int], scan: str = "") -> Volumes:
    """(X, Y, Z) float32 in [0, 1]: a scan of 1 mm, cut or padded; without one smooth noise in an ellipsoid."""
    if scan:
        import nibabel
        from monai.transforms import ResizeWithPadOrCrop

        data = np.asarray(nibabel.as_closest_canonical(nibabel.load(scan)).dataobj, np.float32)
        out = np.asarray(ResizeWithPadOrCrop(shape)(data[None]))[0]
        return np.asarray((out / np.percentile(out[out > 0], 99.8)).clip(0, 1), np.float32)
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape).astype(np.float32), 1.0)
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
    inside = sum(a**2 for a in axes) < 0.6
    return np.asarray(np.where(inside, 0.5 + 0.3 * noise / noise.std(), 0.0), dtype=np.float32).clip(0, 1)


def add_gate(bundle: Path, image: Volumes) -> None:
    """Give a bundle a gate whose usual volume is this one, with one ruler: its cost is that of any other of this grid."""
    spec = read_bundle(bundle)
    measured, random = measure(image, spec.volume.spacing_mm), np.random.default_rng(0)
    assert measured is not None

    def other() -> Measured:
        numbers = {name: value + 0.1 * random.standard_normal() for name, value in measured.numbers.items()}
        maps = {
            name: getattr(measured, name) + 0.02 * random.standard_normal(measured.bright.shape, np.float32)
            for name in ("bright", "filled", "void", "skew")
        }
        return Measured(numbers=numbers, **maps)

    gate = QualityGate.fit_measured([other() for _ in range(40)], 40, spec.volume, 0.01, tuple(SOFT))
    weights = np.zeros(tissue_length(spec.volume), np.float32)
    ruler = LinearRuler(kind="continuous", mean=weights, weights=weights, intercept=50.0, calibration=(0.0, 1.0))
    about = RulerSpec(name="age", unit="years", intercept=50.0, calibration=(0.0, 1.0), n=40, mae=5.0, r=0.5)
    save_gate(gate.with_rulers([about], [ruler]), bundle / GATE_FILE)
    named = {**spec.weights, GATE_FILE: file_sha256(bundle / GATE_FILE)}
    (bundle / BUNDLE_FILE).write_bytes(seal(dataclasses.replace(spec, weights=named)))


SOFT = [name for name in CHECKS if name not in ("finite", "range", "empty")]
