"""What a bundle's own denoiser samples before a distillation starts: latents, or whole trajectories, kept in files."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from brainsynth.bundle.files import bundle_folder, check_bundle_files, read_bundle
from brainsynth.bundle.spec import BundleSpec
from brainsynth.config.distillation import DistillConfig, StepDistillConfig
from brainsynth.config.training import Precision
from brainsynth.models.device import autocast
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.sampling import sample_rows
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.plan import seed_for
from brainsynth.progress import in_minutes
from brainsynth.records import digest, to_dict
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.whole_file import replaced
from brainsynth.training.loop import Worker
from brainsynth.training.preemption import Left, Listener, Request

log = logging.getLogger(__name__)
TOGETHER = 8
"""Rows in a file, which go through the denoiser together: a kill loses no more than these."""
Sample = Callable[[str, range], dict[str, Tensor]]
"""Split and rows → what is sampled for them, rows along the first axis."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What is distilled: a bundle, and the latents of scans, if any."""

    folder: Path
    bundle: BundleSpec
    latents: str | None
    """Fingerprint of their plan."""

    @property
    def fingerprint(self) -> str:
        """Of all that a distillation learns from."""
        return digest({"bundle": self.bundle.digest, "latents": self.latents})


def read_teacher(config: DistillConfig | StepDistillConfig) -> Teacher:
    """The bundle, its files compared with its record. Raises UserError when bundle or latents are missing or damaged."""
    folder = bundle_folder(config.bundle)
    bundle = read_bundle(folder)
    check_bundle_files(folder, bundle)
    latents = None if config.latents is None else read_plan(open_store(config.latents)).fingerprint
    return Teacher(folder, bundle, latents)


def kept_in_files(place: Path, splits: dict[str, int], sample: Sample, worker: Worker) -> dict[str, dict[str, Tensor]]:
    """What `sample` makes of each split's rows; made once by all workers, in files below `place`.

    Raises:
        Left: the worker was asked to leave; the files that are written stay.
    """
    place.mkdir(parents=True, exist_ok=True)
    parts = [(split, start) for split, count in splits.items() for start in range(0, count, TOGETHER)]
    listener, total, done, began = Listener(worker.preempted, worker, 0), sum(splits.values()), 0, time.monotonic()
    for turn in range(-(-len(parts) // worker.world_size)):
        if listener.request(turn) is Request.LEAVE:
            raise Left(0)
        for split, start in parts[turn * worker.world_size :][worker.rank : worker.rank + 1]:
            path = place / f"{split}-{start:06d}.safetensors"
            rows = range(start, min(start + TOGETHER, splits[split]))
            if _whole(path):
                total -= len(rows) * worker.world_size
                continue
            made = sample(split, rows)
            with replaced(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in made.items()}, temporary)
            done += len(rows) * worker.world_size
            left_s = max(total - done, 0) / done * (time.monotonic() - began)
            log.info("%s: %d of %d rows  ETA %s", place.name, done, total, in_minutes(left_s))
    if worker.world_size > 1:
        dist.barrier()
    kept = {}
    for split in splits:
        files = [load_file(place / f"{name}-{start:06d}.safetensors") for name, start in parts if name == split]
        kept[split] = {name: torch.cat([file[name] for file in files]) for name in files[0]}
    return kept


def _whole(path: Path) -> bool:
    try:
        return bool(load_file(path))
    except (FileNotFoundError, SafetensorError):
        return False


def generated_latents(
    config: DistillConfig, bundle: BundleSpec, denoiser: Denoiser, precision: Precision, worker: Worker
) -> tuple[Tensor, Tensor]:
    """Latents (N, C, X, Y, Z) to train on and others to measure on.

    Rows are drawn from the bundle's covariate distribution, and every latent has a noise of its own.

    Raises:
        Left: as `kept_in_files`.
    """
    wanted, options = config.generated, config.optimisation
    identity = {"bundle": bundle.digest, "generated": to_dict(wanted), "precision": options.precision}
    place = worker.folder / f"latents-{digest({**identity, 'seed': options.seed})[:12]}"
    splits = {"train": wanted.count, "validation": wanted.validation_count}
    contexts = {split: drawn_context(bundle, split, count, options.seed) for split, count in splits.items()}
    schedule, shape = NoiseSchedule(bundle.schedule), bundle.latents.shape_cxyz

    @torch.no_grad()
    def sample(split: str, part: range) -> dict[str, Tensor]:
        context = contexts[split][part.start : part.stop].to(worker.device)
        with autocast(worker.device, precision):
            z = sample_rows(denoiser, context, row_seeds(split, part, options.seed), shape, schedule, wanted.sampler)
        return {"latents": z.float().cpu()}

    kept = kept_in_files(place, splits, sample, worker)
    return kept["train"]["latents"], kept["validation"]["latents"]


def drawn_context(bundle: BundleSpec, split: str, count: int, seed: int) -> Tensor:
    """(N, K) contexts of rows from the bundle's covariate distribution; each split has another draw."""
    assert bundle.distribution is not None
    rows = bundle.distribution.draw(count, seed_for(seed, split) % 2**32)
    return torch.from_numpy(bundle.covariates.encode(rows))


def row_seeds(split: str, part: range, seed: int) -> list[int]:
    """Noise seeds of a split's rows: nothing that is measured was trained on."""
    return [seed_for(seed, f"{split}-{row}") for row in part]
