"""Latents that a bundle's own denoiser samples: what a distilled decoder trains on where there are no scans."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from brainsynth.bundle import BundleSpec
from brainsynth.config.distillation import DistillConfig
from brainsynth.models.device import able, autocast
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.sampling import sample_rows
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.plan import seed_for
from brainsynth.records import digest, to_dict
from brainsynth.training.disk import replaced
from brainsynth.training.loop import Worker
from brainsynth.training.preemption import Left, Listener, Preempted, Request

log = logging.getLogger(__name__)
_TOGETHER = 8
"""Latents in a file, which go through the denoiser together: a kill loses no more than these."""


def generated_latents(
    config: DistillConfig, worker: Worker, bundle: BundleSpec, denoiser: Denoiser, folder: Path, preempted: Preempted
) -> tuple[Tensor, Tensor]:
    """Latents (N, C, X, Y, Z) to train on and others to measure on; sampled once by all workers, kept in files.

    Rows are drawn from the bundle's covariate distribution, and every latent has a noise of its own.

    Raises:
        Left: `preempted` asked for it; the files that are written stay.
    """
    wanted = config.generated
    options = config.optimisation
    identity = {"bundle": bundle.digest, "generated": to_dict(wanted), "precision": options.precision}
    place = folder / f"latents-{digest({**identity, 'seed': options.seed})[:12]}"
    place.mkdir(parents=True, exist_ok=True)
    splits = {"train": wanted.count, "validation": wanted.validation_count}
    parts = [(split, start) for split, count in splits.items() for start in range(0, count, _TOGETHER)]
    listener = Listener(preempted, worker, 0)
    for turn in range(-(-len(parts) // worker.world_size)):
        if listener.request(turn) is Request.LEAVE:
            raise Left(0)
        for split, start in parts[turn * worker.world_size :][worker.rank : worker.rank + 1]:
            path = place / f"{split}-{start:06d}.safetensors"
            if _read(path) is None:
                part = range(start, min(start + _TOGETHER, splits[split]))
                with replaced(path) as temporary:
                    save_file({"latents": _sample(config, worker, bundle, denoiser, split, part)}, temporary)
                log.info("generated latents: %s of %s", path.name, splits)
    if worker.world_size > 1:
        dist.barrier()
    files = {name: [f"{name}-{start:06d}.safetensors" for split, start in parts if split == name] for name in splits}
    train, validation = (torch.cat([load_file(place / file)["latents"] for file in files[name]]) for name in splits)
    return train, validation


def _read(path: Path) -> Tensor | None:
    """A file's latents; None when it is missing or damaged."""
    try:
        return load_file(path).get("latents")
    except (FileNotFoundError, SafetensorError):
        return None


@torch.no_grad()
def _sample(
    config: DistillConfig, worker: Worker, bundle: BundleSpec, denoiser: Denoiser, split: str, part: range
) -> Tensor:
    seed, counts = config.optimisation.seed, {"train": config.generated.count}
    assert bundle.distribution is not None
    # Another draw for those to measure on, as another noise: nothing that is measured was trained on.
    rows = bundle.distribution.draw(counts.get(split, config.generated.validation_count), seed_for(seed, split) % 2**32)
    context = torch.from_numpy(bundle.covariates.encode(rows.iloc[part.start : part.stop])).to(worker.device)
    seeds = [seed_for(seed, f"{split}-{row}") for row in part]
    schedule, shape = NoiseSchedule(bundle.schedule), bundle.latents.shape_cxyz
    with autocast(worker.device, able(worker.device, config.optimisation.precision)):
        z = sample_rows(denoiser, context, seeds, shape, schedule, config.generated.sampler)
    return z.float().cpu().contiguous()
