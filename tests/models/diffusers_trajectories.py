"""Makes diffusers_trajectories.npz: what diffusers' schedulers do with the exact network of a Gaussian. Not a test.

    pip install diffusers==0.42.1    # in an environment of its own; brainsynth does not depend on it
    python tests/models/diffusers_trajectories.py

Settings are those in which diffusers is right: `trailing` spacing with a number of steps that divides 1000, no clipping,
explicit timesteps for the multistep solvers, sigmas from 1 to 1/n for flow. Kept beside them are two that are not:
`linspace` takes steps of another length than the spacing of its timesteps, `leading` starts at t = 900 of 999.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import schedulers

MEAN, STD = 0.7, 0.5
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0205}
GRID = [999, 964, 917, 850, 760, 640, 490, 330, 190, 80]
START = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)


def network(kind: str, x: torch.Tensor, a: float, s: float) -> torch.Tensor:
    """The perfect prediction for data N(MEAN, STD²) in x = a x_0 + s e."""
    x0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)
    noise = (x - a * x0) / s
    return {"epsilon": noise, "v": a * noise - s * x0, "flow": noise - x0}[kind]


def variance_preserving(scheduler, kind: str, **step_options) -> np.ndarray:
    # Multistep schedulers want at least three dimensions.
    x, noises = START.clone().view(1, -1, 1), step_options.pop("noises", None)
    for index, t in enumerate(scheduler.timesteps):
        squared = float(scheduler.alphas_cumprod[int(t)])
        prediction = network(kind, x, squared**0.5, (1 - squared) ** 0.5)
        options = (
            {"variance_noise": noises[index].view(1, -1, 1), **step_options} if noises is not None else step_options
        )
        x = scheduler.step(prediction, t, x, **options).prev_sample.double()
    return x.flatten().numpy()


def main() -> None:
    kept: dict[str, np.ndarray] = {"version": np.array(diffusers.__version__), "start": START.numpy()}
    kept["grid"] = np.array(GRID)
    kinds = {"epsilon": "epsilon", "v": "v_prediction"}
    for kind, name in kinds.items():
        for steps in (10, 50):
            for spacing in ("trailing", "linspace", "leading"):
                ddim = schedulers.DDIMScheduler(
                    prediction_type=name, clip_sample=False, timestep_spacing=spacing, **BETAS
                )
                ddim.set_timesteps(steps)
                kept[f"ddim {kind} {steps} {spacing}"] = variance_preserving(ddim, kind)
        multistep = schedulers.DPMSolverMultistepScheduler(
            prediction_type=name, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero", **BETAS
        )
        multistep.set_timesteps(timesteps=GRID)
        kept[f"dpmpp_2m {kind}"] = variance_preserving(multistep, kind)
        unipc = schedulers.UniPCMultistepScheduler(
            prediction_type=name, solver_order=2, solver_type="bh2", final_sigmas_type="zero",
            timestep_spacing="trailing", **BETAS,
        )  # fmt: skip
        unipc.set_timesteps(200)
        kept[f"unipc {kind} 200"] = variance_preserving(unipc, kind)
    noises = torch.randn(10, len(START), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept["noises"] = noises.numpy()
    for eta in (0.5, 1.0):
        ddim = schedulers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **BETAS)
        ddim.set_timesteps(10)
        kept[f"ddim eta {eta}"] = variance_preserving(ddim, "epsilon", noises=noises, eta=eta)
    ddpm = schedulers.DDPMScheduler(clip_sample=False, timestep_spacing="trailing", **BETAS)
    ddpm.set_timesteps(10)
    drawn = iter(noises)
    schedulers.scheduling_ddpm.randn_tensor = lambda *_, **__: next(drawn).view(1, -1, 1)
    kept["ddpm"] = variance_preserving(ddpm, "epsilon")
    zero = schedulers.DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=True,
        **BETAS,
    )  # fmt: skip
    zero.set_timesteps(10)
    kept["zero terminal alphas_cumprod"] = zero.alphas_cumprod.double().numpy()
    kept["ddim v 10 zero terminal"] = variance_preserving(zero, "v")
    for shift in (1.0, 2.0):
        euler = schedulers.FlowMatchEulerDiscreteScheduler(shift=shift)
        euler.set_timesteps(sigmas=np.linspace(1, 0.1, 10).tolist())
        x = START.clone()
        for t, sigma in zip(euler.timesteps, euler.sigmas.tolist(), strict=False):
            x = euler.step(network("flow", x, 1 - sigma, sigma), t, x).prev_sample.double()
        kept[f"euler shift {shift}"] = x.numpy()
    np.savez(Path(__file__).with_suffix(".npz"), **kept)


if __name__ == "__main__":
    main()
