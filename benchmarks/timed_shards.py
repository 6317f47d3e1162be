"""Generation as benchmarks run it in an actor: with CPU seconds in the commit records, or on a stand-in for a device."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage

from brainsynth.generate import DrawnShard, VolumeGenerator
from brainsynth.plan import ShardSpec

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


class StandInShards(TimedShards):
    """A device that takes `device_s` a volume and no CPU; its volumes look like heads, so that they compress like heads."""

    def __init__(self, device_s: float, serial: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.device_s, self.serial = device_s, serial

    @functools.cached_property
    def head(self) -> Volumes:
        """(X, Y, Z) float32: smooth noise inside an ellipsoid that fills a quarter of the grid."""
        shape = self.plan.volume.shape_xyz
        noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape).astype(np.float32), 1.0)
        axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
        inside = sum(a**2 for a in axes) < 0.6
        return np.asarray(np.where(inside, 0.5 + 0.3 * noise / noise.std(), 0.0), dtype=np.float32)

    def volumes(self, rows: pd.DataFrame, seconds: dict[str, float]) -> Volumes:
        """(B, X, Y, Z) float32."""
        began = time.monotonic()
        images = np.stack(
            [self.head] * len(rows)
        )  # the copy from the device, which counts as its time in generation, too
        time.sleep(max(0.0, self.device_s * len(rows) - (time.monotonic() - began)))
        seconds["sample_s"] += time.monotonic() - began
        return images

    def make(self, shard: ShardSpec) -> Any:
        """Make a shard; with `serial` all of it."""
        made = super().make(shard)
        return self.finish(made) if self.serial else made
