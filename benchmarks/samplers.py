"""Quality against network evaluations for every sampler, on trained toy denoisers. Writes results/samplers.json, a figure.

    python -m benchmarks.samplers --cache FOLDER [--only NAME ...] [--samples 96]

Trains what FOLDER lacks (benchmarks/toy_latents.py) and caches every sample there. Scored are (1) the distance of each
latent to a reference of about 200 evaluations of the same network from the same noise (at the same first timestep, where
that was sampled), (2) a Fréchet distance to fresh heads and (3) how closely the requested volumes are followed. The
comparison is MONAI's scheduler at 50 steps, in the installed version and, for DDIM, with the timesteps of the version that
the paper's bundle pins. Non-inferior at n evaluations means: the upper end of the 95 % interval (bootstrap over samples,
the same for both) of our latent error minus theirs is not above 0, and that of our Fréchet distance minus theirs not above
MARGIN of theirs.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import monai
import numpy as np
import torch
from monai.networks.schedulers import DDIMScheduler, RFlowScheduler
from scipy.linalg import sqrtm
from torch import Tensor
from torch.nn.functional import conv3d

from benchmarks.toy_latents import SCHEDULES, SHAPE, Latents, trained
from brainsynth.config.schema import SamplerConfig
from brainsynth.models.sampling import Predict, draw_noise, guided, sample_latents
from brainsynth.models.schedule import NoiseSchedule

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARGIN = 0.05
STEPS = {"epsilon": 12000}  # epsilon needs far longer; the others 700
FEW, MORE = (4, 5, 6, 8, 10), (12, 15, 20)
BOOTSTRAP = 400
RESULTS, IMAGES = Path(__file__).parent / "results", Path(__file__).parents[1] / "docs" / "images"
Run = Callable[[Predict, Tensor, NoiseSchedule], Tensor]


def ours(method: str, steps: int, seeds: list[int], **options: Any) -> Run:
    config = SamplerConfig(method=method, steps=steps, **options)  # type: ignore[arg-type]

    def run(predict: Predict, noise: Tensor, schedule: NoiseSchedule) -> Tensor:
        return sample_latents(predict, noise, schedule, config, lambda step: draw_noise(seeds, SHAPE, step))

    return run


def monai_ddim(predict: Predict, x: Tensor, schedule: NoiseSchedule, steps: int, pinned: bool) -> Tensor:
    """The bundle's scheduler and loop; `pinned`: timesteps 980, 960 … 0 as MONAI 1.4 sets them."""
    config = schedule.config
    kind = "epsilon" if config.prediction == "epsilon" else "v_prediction"
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, schedule="scaled_linear_beta", beta_start=config.beta_start, beta_end=config.beta_end,
        clip_sample=False, prediction_type=kind,
    )  # fmt: skip
    scheduler.alphas_cumprod = torch.from_numpy(schedule.a**2).float()
    scheduler.set_timesteps(steps)
    times = range(1000 - 1000 // steps, -1, -(1000 // steps)) if pinned else scheduler.timesteps.tolist()
    for t in times:
        x, _ = scheduler.step(predict(x, float(t)), t, x)
    return x


def monai_flow(predict: Predict, x: Tensor, schedule: NoiseSchedule, steps: int) -> Tensor:
    """MONAI's rectified flow; its velocity points to the data, its time t is our network's t - 1."""
    scheduler = RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False)
    scheduler.set_timesteps(steps)
    times = [float(t) for t in scheduler.timesteps]
    for t, following in zip(times, [*times[1:], 0.0], strict=True):
        x, _ = scheduler.step(-predict(x, t - 1), t, x, following)
    return x


def runs(name: str, seeds: list[int]) -> dict[str, tuple[int, Run]]:
    """Label → (evaluations, sampler). "reference" is what latents are compared with, "peer" what is to be matched."""
    if name == "flow":
        found = {"reference": (199, ours("heun", 100, seeds)), "peer": (50, functools.partial(monai_flow, steps=50))}
        found |= {f"euler {n}": (n, ours("euler", n, seeds)) for n in (*FEW, 20, 50)}
        found |= {f"heun {2 * n - 1}": (2 * n - 1, ours("heun", n, seeds)) for n in (3, 5, 8)}
        found |= {f"ab2 {n}": (n, ours("ab2", n, seeds)) for n in (3, *FEW, *MORE)}
        for shift in (0.7, 1.5, 2.0):
            found |= {f"ab2 shift {shift} {n}": (n, ours("ab2", n, seeds, time_shift=shift)) for n in (4, 6, 8, 10)}
        return found
    found = {
        "reference": (200, ours("dpmpp_2m", 200, seeds, last_log_snr=10.0)),
        "peer": (50, functools.partial(monai_ddim, steps=50, pinned=False)),
        "peer pinned": (50, functools.partial(monai_ddim, steps=50, pinned=True)),
        "ddpm 50": (50, ours("ddpm", 50, seeds)),
    }
    found |= {f"ddim {n}": (n, ours("ddim", n, seeds)) for n in (5, 10, 20, 50)}
    found["ddim 200"] = (200, ours("ddim", 200, seeds))
    found |= {f"dpmpp_2m {n}": (n, ours("dpmpp_2m", n, seeds)) for n in (*FEW, *MORE)}
    for last in (2.0, 2.5, 3.2):
        found |= {f"unipc to {last} {n}": (n, ours("unipc", n, seeds, last_log_snr=last)) for n in (*FEW, *MORE)}
    later = {"first_timestep": 980}  # where the pinned peer begins
    found["reference from 980"] = (200, ours("dpmpp_2m", 200, seeds, last_log_snr=10.0, **later))
    found |= {f"unipc from 980 {n}": (n, ours("unipc", n, seeds, **later)) for n in (*FEW, *MORE)}
    return found


def reference_of(label: str, found: Mapping[str, Any]) -> str:
    """What a run converges to: the reference that begins where it does, if that was sampled."""
    later = "from 980" in label or label == "peer pinned"
    return "reference from 980" if later and "reference from 980" in found else "reference"


def sampled(name: str, count: int, folder: Path, labels: list[str] | None) -> dict[str, np.ndarray]:
    """The latents of every run, or of those with these labels, computed once."""
    path = folder / f"samples-{name.replace(', ', '-').replace(' ', '-')}-{count}.npz"
    kept = dict(np.load(path)) if path.exists() else {}
    network, schedule = trained(name, STEPS.get(name, 700), folder), NoiseSchedule(SCHEDULES[name])
    _, context = Latents().draw(count, torch.Generator().manual_seed(100))
    seeds = list(range(count))
    wanted = {label: run for label, run in runs(name, seeds).items() if labels is None or label in labels}
    with torch.no_grad():
        for label, (_, run) in wanted.items():
            if label not in kept:
                kept[label] = run(guided(network, context, 1.0), draw_noise(seeds, SHAPE), schedule).numpy()
                np.savez(path, **kept)
                print(name, label, flush=True)
    return {label: kept[label] for label in wanted}


class Judge:
    """Fréchet distance on fixed random features, and a linear ruler for the two volumes; both from fresh heads."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(200)
        z, self.context = Latents().draw(4096, rng)
        self.filters = torch.randn(8, SHAPE[0], 3, 3, 3, generator=rng) / 10
        features = self._raw(z)
        self.scale = features.std(0)
        truth = self.features(z.numpy())
        self.moments = truth.mean(0), np.cov(truth.T), sqrtm(np.cov(truth.T)).real
        x = torch.cat([z.flatten(1), torch.ones(len(z), 1)], 1)
        self.ruler = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ self.context[:, :2])
        self.floor_latents, _ = Latents().draw(96, rng)

    def _raw(self, z: Tensor) -> Tensor:
        found = torch.relu(conv3d(z, self.filters, padding=1)).flatten(2)
        return torch.cat([found.mean(2), found.std(2)], 1)

    def features(self, z: np.ndarray) -> np.ndarray:
        """(B, 16) float64."""
        return (self._raw(torch.from_numpy(z)) / self.scale).double().numpy()

    def frechet(self, features: np.ndarray) -> float:
        """To the true heads."""
        a, (mean, b, root) = np.cov(features.T), self.moments
        cross = np.sqrt(np.linalg.eigvalsh(root @ a @ root).clip(0)).sum()
        return float(((features.mean(0) - mean) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross)

    def obeyed(self, z: np.ndarray, context: Tensor) -> list[float]:
        """Correlation of requested and measured brain and ventricular volume."""
        flat = torch.from_numpy(z).flatten(1)
        measured = torch.cat([flat, torch.ones(len(flat), 1)], 1) @ self.ruler
        return [float(np.corrcoef(measured[:, k], context[:, k])[0, 1]) for k in (0, 1)]


def interval(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.quantile(values, [0.025, 0.975])]


def judge(name: str, found: dict[str, np.ndarray], judge_by: Judge) -> dict[str, Any]:
    """Figures of every run, with intervals, and its verdicts against each peer."""
    count = len(found["reference"])
    _, context = Latents().draw(count, torch.Generator().manual_seed(100))
    rng = np.random.default_rng(300)
    draws = [rng.integers(0, count, count) for _ in range(BOOTSTRAP)]
    power = float((found["reference"] ** 2).mean())
    error = {k: ((z - found[reference_of(k, found)]) ** 2).reshape(count, -1).mean(1) / power for k, z in found.items()}
    features = {k: judge_by.features(z) for k, z in found.items()}
    again = {k: np.array([judge_by.frechet(f[i]) for i in draws]) for k, f in features.items()}
    errors = {k: np.array([np.sqrt(e[i].mean()) for i in draws]) for k, e in error.items()}
    table, evaluations = {}, runs(name, list(range(count)))
    peers = [p for p in ("peer", "peer pinned") if p in found]
    for label in found:
        verdicts = {}
        for peer in peers:
            margin = MARGIN * judge_by.frechet(features[peer])
            latent, frechet = interval(errors[label] - errors[peer]), interval(again[label] - again[peer])
            good = latent[1] <= 0 and frechet[1] <= margin
            verdicts[peer] = {"latent_difference": latent, "frechet_difference": frechet, "non_inferior": bool(good)}
        table[label] = {
            "evaluations": evaluations[label][0],
            "latent_error": float(np.sqrt(error[label].mean())),
            "latent_error_interval": interval(errors[label]),
            "frechet": judge_by.frechet(features[label]),
            "frechet_interval": interval(again[label]),
            "obeyed": judge_by.obeyed(found[label], context),
            "against": verdicts,
        }
    return table


def figure(results: dict[str, Any], path: Path) -> None:
    """Latent error and Fréchet distance against evaluations, one column a network."""
    names = list(results)
    plot, axes = plt.subplots(2, len(names), figsize=(4.2 * len(names), 6.4), squeeze=False, sharey="row")
    for column, name in enumerate(names):
        families: dict[str, list[str]] = {}
        for label in results[name]:
            if "reference" not in label and not label.startswith("peer"):
                families.setdefault(label.rsplit(" ", 1)[0], []).append(label)
        for row, key in enumerate(("latent_error", "frechet")):
            axis = axes[row, column]
            for number, (family, labels) in enumerate(families.items()):
                cells = [results[name][k] for k in labels]
                at, value = [c["evaluations"] for c in cells], np.array([c[key] for c in cells])
                ends = np.abs(np.array([c[f"{key}_interval"] for c in cells]).T - value)
                axis.errorbar(at, value, yerr=ends, marker="o", ms=3, lw=1, capsize=2, label=family, color=f"C{number}")
            for peer, line in (("peer", "--"), ("peer pinned", ":")):
                if peer in results[name]:
                    axis.axhline(results[name][peer][key], color="k", ls=line, lw=1, label=f"{peer} 50")
            axis.set(xscale="log", yscale="log", xticks=[4, 6, 8, 10, 15, 20, 50])
            axis.set_xticklabels(["4", "6", "8", "10", "15", "20", "50"])
            axis.minorticks_off()
        axes[0, column].set_title(name)
        axes[0, column].legend(fontsize=7)
        axes[1, column].set_xlabel("network evaluations")
    axes[0, 0].set_ylabel("latent error (relative RMS)")
    axes[1, 0].set_ylabel("Fréchet distance")
    plot.tight_layout()
    plot.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["epsilon", "v", "flow"])
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--labels", nargs="*", help="only these runs; must include reference and peer")
    parser.add_argument("--out", type=Path, default=RESULTS / "samplers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge_by, results = Judge(), {}
    for name in options.only:
        results[name] = judge(name, sampled(name, options.samples, options.cache, options.labels), judge_by)
    floor = judge_by.frechet(judge_by.features(judge_by.floor_latents.numpy()))
    head = {"monai": monai.__version__, "samples": options.samples, "bootstrap": BOOTSTRAP, "margin": MARGIN}
    text = json.dumps(head | {"frechet_of_96_true_heads": floor, "networks": results}, indent=1)
    options.out.write_text(text + "\n")
    if options.labels is None:
        figure(results, IMAGES / "samplers.png")
    print("\n".join(line for name, table in results.items() for line in markdown(name, table)))


def markdown(name: str, table: dict[str, Any]) -> list[str]:
    """The table of one network, as in docs/samplers.md."""
    lines = [f"### {name}", "", "| sampler | evaluations | latent error | minus the peer's | Fréchet | obeyed |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for label, cell in table.items():
        low, high = cell["against"]["peer"]["latent_difference"]
        obeyed = " / ".join(f"{r:.2f}" for r in cell["obeyed"])
        lines.append(
            f"| {label} | {cell['evaluations']} | {cell['latent_error']:.4f} | {low:+.4f} … {high:+.4f} | "
            f"{cell['frechet']:.2f} | {obeyed} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
