"""The table of samplers, and which suits which denoiser. Needs no torch: a plan is checked without it.

A new sampler is its function in solvers.py, an entry of METHODS, and its name in `SamplerConfig.method`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from brainsynth.bundle.spec import BundleSpec
from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import DecoderChoice, ScheduleConfig
from brainsynth.errors import UserError
from brainsynth.models.schedule import Float64s, NoiseSchedule, flow_times, log_snr_timesteps, timesteps
from brainsynth.models.solvers import Predict, StepNoise, ddim, dpmpp_2m, flow, heun
from brainsynth.records import to_dict

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Run:
    """What a solver is given."""

    predict: Predict
    noise: Tensor
    """(B, C, X, Y, Z) standard normal: where to start."""
    schedule: NoiseSchedule
    sampler: SamplerConfig
    grid: Any
    """The method's own: what its `grid` returned, or one near it."""
    step_noise: StepNoise | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """One sampler. Which options of `SamplerConfig` it takes: `config.schema.SAMPLER_OPTIONS`."""

    predictions: tuple[str, ...]
    """What a network must predict."""
    grid: Callable[[NoiseSchedule, SamplerConfig], list[int] | Float64s]
    """Where it evaluates the network, from noise downwards: timesteps, or for flow times and their end."""
    solve: Callable[[Run], Tensor]
    """From noise to latents."""
    last_log_snr: float | None = None
    """Of methods that step evenly in log(a/s): where the last evaluation is best at about eight of them."""


def log_snr_grid(schedule: NoiseSchedule, sampler: SamplerConfig) -> list[int]:
    """Timesteps even in log(a/s)."""
    return log_snr_timesteps(schedule, sampler.steps, _last_log_snr(sampler), sampler.first_timestep)


def _even(schedule: NoiseSchedule, sampler: SamplerConfig) -> list[int]:
    return timesteps(len(schedule.a), sampler.steps)


def _times(schedule: NoiseSchedule, sampler: SamplerConfig) -> Float64s:
    return flow_times(sampler.steps, sampler.time_shift)


def _ddim(run: Run, eta: float) -> Tensor:
    if eta > 0 and run.step_noise is None:
        raise ValueError(f"{run.sampler.method} with eta {eta:g} needs step_noise")
    return ddim(run.predict, run.noise, run.schedule, run.grid, eta, run.step_noise)


def _dpmpp_2m(run: Run, corrected: bool) -> Tensor:
    return dpmpp_2m(run.predict, run.noise, run.schedule, run.grid, corrected)


def _flow(run: Run, second_order: bool) -> Tensor:
    return flow(run.predict, run.noise, run.schedule, run.grid, second_order)


_DIFFUSION, _FLOW = ("epsilon", "v"), ("flow",)
METHODS = {
    "ddpm": Method(_DIFFUSION, _even, lambda run: _ddim(run, eta=1.0)),
    "ddim": Method(_DIFFUSION, _even, lambda run: _ddim(run, eta=run.sampler.eta)),
    "dpmpp_2m": Method(_DIFFUSION, log_snr_grid, lambda run: _dpmpp_2m(run, corrected=False), last_log_snr=2.0),
    "unipc": Method(_DIFFUSION, log_snr_grid, lambda run: _dpmpp_2m(run, corrected=True), last_log_snr=2.5),
    "euler": Method(_FLOW, _times, lambda run: _flow(run, second_order=False)),
    "heun": Method(_FLOW, _times, lambda run: heun(run.predict, run.noise, run.schedule, run.grid)),
    "ab2": Method(_FLOW, _times, lambda run: _flow(run, second_order=True)),
}


def integrates_flow(sampler: SamplerConfig) -> bool:
    """Whether the sampler is for networks that predict a flow."""
    return METHODS[sampler.method].predictions == _FLOW


def steps_in_log_snr(sampler: SamplerConfig) -> bool:
    """Whether the sampler's timesteps are those of `log_snr_grid`."""
    return METHODS[sampler.method].last_log_snr is not None


def _last_log_snr(sampler: SamplerConfig) -> float:
    best = METHODS[sampler.method].last_log_snr
    assert best is not None
    return best if sampler.last_log_snr is None else sampler.last_log_snr


def check_sampler(schedule: ScheduleConfig, sampler: SamplerConfig, guidable: bool = True) -> None:
    """Raises UserError when the method does not fit what the network predicts, or has more steps than were trained.

    `guidable`: whether the network was trained with conditioning dropout.
    """
    if schedule.prediction not in METHODS[sampler.method].predictions:
        fitting = [name for name, method in METHODS.items() if schedule.prediction in method.predictions]
        raise UserError(
            f"sampler.method {sampler.method!r} does not fit a network that predicts {schedule.prediction!r}; "
            f"use {', '.join(fitting[:-1])} or {fitting[-1]}"
        )
    if sampler.steps > schedule.num_train_timesteps:
        raise UserError(
            f"sampler.steps {sampler.steps} is more than the {schedule.num_train_timesteps} trained timesteps"
        )
    first = sampler.first_timestep
    if first is not None:
        if not sampler.steps <= first < schedule.num_train_timesteps:
            raise UserError(
                f"sampler.first_timestep {first} must be from sampler.steps, {sampler.steps}, to "
                f"{schedule.num_train_timesteps - 1}, the last trained timestep"
            )
        if NoiseSchedule(schedule).log_snr()[first] >= _last_log_snr(sampler):
            raise UserError(
                f"sampler.first_timestep {first} has less noise than the last evaluation; take a larger one"
            )
    if sampler.guidance_scale != 1 and not guidable:
        raise UserError("sampler.guidance_scale must be 1: this model was trained without conditioning dropout")


def check_inversion(bundle: BundleSpec, sampler: SamplerConfig, decoder: DecoderChoice) -> None:
    """Raises UserError where the flow of a bundle cannot be run from a scan to its noise and back."""
    reasons = {
        "its denoiser predicts no flow": bundle.schedule.prediction != "flow",
        "its denoiser was distilled for few evaluations": bundle.few_steps is not None,
        "its decoder draws noise (architecture.kind: pyramid)": bundle.autoencoder.kind == "pyramid",
        "sampler.guidance_scale must be 1: with guidance the way back is another": sampler.guidance_scale != 1,
        "decoder must be `own`: the others have other errors": decoder != "own",
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UserError(f"--scan: the bundle {bundle.name} cannot take a scan: {'; '.join(found)}")


def check_bundle_sampler(bundle: BundleSpec, sampler: SamplerConfig) -> None:
    """`check_sampler` for a bundle's denoiser; one that was distilled runs with the sampler that it was distilled for."""
    if bundle.few_steps is not None and sampler != bundle.few_steps.sampler:
        wanted, folded = bundle.few_steps.sampler, bundle.few_steps.teacher_sampler.guidance_scale
        asked = ", ".join(f"{key}: {value}" for key, value in to_dict(wanted).items() if key != "guidance_scale")
        raise UserError(
            f"sampler: the denoiser of the bundle {bundle.name} was distilled for {wanted.steps} evaluations, with guidance "
            f"{folded:g} folded in; give {{{asked}}} and nothing else"
        )
    check_sampler(bundle.schedule, sampler, guidable=bundle.covariates.missing != "refuse")
