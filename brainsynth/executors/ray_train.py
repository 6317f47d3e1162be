"""Ray Train around the plain training loops: data-parallel workers that are restarted when they die."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from brainsynth.config.cli import configure_logging
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from brainsynth.errors import UserError
from brainsynth.executors.session import check_resources, ray_session
from brainsynth.records import digest, from_dict, to_dict
from brainsynth.storage.filesystem import local_folder, resolve_uri
from brainsynth.training import autoencoder, diffusion

log = logging.getLogger(__name__)
TrainConfig = AutoencoderTrainConfig | DiffusionTrainConfig
_FITS: dict[str, tuple[type[Any], Callable[..., None]]] = {
    "autoencoder": (AutoencoderTrainConfig, autoencoder.fit),
    "diffusion": (DiffusionTrainConfig, diffusion.fit),
}


def _train(arguments: dict[str, Any]) -> None:
    """Runs in every worker: the plain loop; Ray only hears of the checkpoints."""
    import ray.train

    configure_logging()
    cls, fit = _FITS[arguments["kind"]]
    fit(from_dict(cls, arguments["config"], "the training config"), report=lambda metrics: ray.train.report(metrics))


def _with_absolute_places(config: TrainConfig) -> TrainConfig:
    """The config as workers need it: they run in folders of their own."""
    places = [name for name in ("cohort", "latents", "autoencoder", "output") if hasattr(config, name)]
    absolute: TrainConfig = dataclasses.replace(
        config,
        **{name: resolve_uri(getattr(config, name), name) for name in places},  # type: ignore[arg-type]
    )
    if isinstance(absolute, AutoencoderTrainConfig) and absolute.losses.perceptual_weights is not None:
        weights = resolve_uri(absolute.losses.perceptual_weights, "losses.perceptual_weights")
        absolute = dataclasses.replace(
            absolute, losses=dataclasses.replace(absolute.losses, perceptual_weights=weights)
        )
    return absolute


def train(kind: str, config: TrainConfig) -> None:
    """Train to the end, or go on where the last whole checkpoint is. Raises UserError before a worker starts."""
    config = _with_absolute_places(config)
    fit = _FITS[kind][1]
    check = autoencoder.check if kind == "autoencoder" else diffusion.check
    check(config)  # type: ignore[arg-type]
    runtime, batch = config.runtime, config.optimisation.batch_size
    if runtime.workers and batch % runtime.workers:
        raise UserError(f"optimisation.batch_size {batch} must be a multiple of runtime.workers {runtime.workers}")
    if runtime.workers == 0:
        fit(config)
        return
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    folder = local_folder(config.output, "output")
    with ray_session():
        check_resources(runtime.workers, runtime.cpus_per_worker, float(runtime.use_gpu), "runtime")
        # Ray silently resumes a run of the same name, so the name carries the config. Its own checkpoints are not used:
        # ours prove themselves by digest, and need no Ray to be read.
        trainer = TorchTrainer(
            _train,
            train_loop_config={"kind": kind, "config": to_dict(config)},
            scaling_config=ScalingConfig(
                num_workers=runtime.workers,
                use_gpu=runtime.use_gpu,
                resources_per_worker={"CPU": runtime.cpus_per_worker, **({"GPU": 1} if runtime.use_gpu else {})},
            ),
            run_config=RunConfig(
                name=f"{kind}-{digest(config)[:12]}",
                storage_path=str(folder / "ray"),
                logging_config=LoggingConfig(log_level="WARNING"),
                failure_config=FailureConfig(max_failures=runtime.max_failures),
            ),
        )
        trainer.fit()
