"""Which sampler suits which denoiser, and at which timesteps it looks. Needs no torch: a plan is checked without it."""

from __future__ import annotations

from brainsynth.bundle.spec import BundleSpec
from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import ScheduleConfig
from brainsynth.errors import UserError
from brainsynth.models.schedule import NoiseSchedule, log_snr_timesteps
from brainsynth.records import to_dict

FLOW_METHODS = ("euler", "heun", "ab2")
LAST_LOG_SNR = {"dpmpp_2m": 2.0, "unipc": 2.5}
"""Where the last evaluation is best at about eight of them."""


def log_snr_grid(schedule: NoiseSchedule, sampler: SamplerConfig) -> list[int]:
    """The timesteps of `dpmpp_2m` and `unipc`, from noise downwards."""
    return log_snr_timesteps(schedule, sampler.steps, _last_log_snr(sampler), sampler.first_timestep)


def _last_log_snr(sampler: SamplerConfig) -> float:
    return LAST_LOG_SNR[sampler.method] if sampler.last_log_snr is None else sampler.last_log_snr


def check_sampler(schedule: ScheduleConfig, sampler: SamplerConfig, guidable: bool = True) -> None:
    """Raises UserError when the method does not fit what the network predicts, or has more steps than were trained.

    `guidable`: whether the network was trained with conditioning dropout.
    """
    flows = schedule.prediction == "flow"
    if flows != (sampler.method in FLOW_METHODS):
        fitting = FLOW_METHODS if flows else ("ddpm", "ddim", "dpmpp_2m", "unipc")
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
