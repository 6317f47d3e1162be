"""The pyramid of configs/t1w-2mm-pyramid, wider, on one GPU: unpack, train, generate, judge, pack.

    python -m recipes.pyramid.one_gpu pack runs/t1w-2mm/cohort PARTS
    python -m recipes.pyramid.one_gpu run PARTS OUTPUT [--minutes 10] [--device cpu --small]

`pack` writes a prepared cohort as numbered files of at most 30 MiB, for machines that a cohort reaches in pieces only; it
shows real people. `run` needs no Ray. Decoder and denoiser train on the same GPU at once, since the encoder only averages.
Each first takes 200 steps, which measure its rate, and continues from there with as many as the rest of the minutes allows,
so that learning rates decay to their end. Generation, `evaluate`, `audit` and `recipes.pyramid.stats` come after that.
OUTPUT gets the bundle as files of at most 16 MiB (`cat bundle.tar.* | tar x` joins them), reports, and `run.json`: seconds
and exit code of each command. It ends at a command that fails, except for the three that judge.
`--device cpu --small` is the dry run: the same commands on a narrow pyramid.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from brainsynth.storage.whole_file import write_whole

CONFIGS = Path(__file__).parents[2] / "configs" / "t1w-2mm-pyramid"
JUDGES = ("evaluate", "audit", "stats")
COHORT_PART, WEIGHTS_PART = 30 * 2**20, 16 * 2**20
WIDE = "{kind: pyramid, stages: [{width: 192, noise: 8}, {width: 128, noise: 4}], intensity_scale: 1.15}"
NARROW = "{kind: pyramid, stages: [{width: 16, blocks: 1, noise: 4}, {width: 16, blocks: 1, noise: 4}]}"
DENOISER = "{kind: gaussian, rank: 128, rank_channels: 1, channels: [%s], norm_groups: 8}"


def pack(folder: Path, parts: Path, name: str, part_bytes: int) -> None:
    """A folder as NAME.tar.000, NAME.tar.001, ... of at most `part_bytes` each."""
    parts.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        tar.add(folder, arcname=name)
    packed = whole.getvalue()
    for number, start in enumerate(range(0, len(packed), part_bytes)):
        write_whole(parts / f"{name}.tar.{number:03d}", packed[start : start + part_bytes])


def unpack(parts: Path, name: str, into: Path) -> Path:
    """The folder that `pack` took apart."""
    files = sorted(parts.glob(f"{name}.tar.*"))
    if not files:
        raise SystemExit(f"{parts} has no {name}.tar.000: `pack` writes it")
    with tarfile.open(fileobj=io.BytesIO(b"".join(file.read_bytes() for file in files))) as tar:
        tar.extractall(into, filter="data")
    return into / name


class Commands:
    """Runs brainsynth's commands and records what became of them."""

    def __init__(self, output: Path, device: str) -> None:
        self.output, self.record = output, output / "run.json"
        self.cuda = device == "cuda"
        self.done: list[dict[str, object]] = []

    def start(self, job: str, config: str, name: str, settings: dict[str, object]) -> subprocess.Popen[bytes]:
        """Begin one; its output goes to NAME.log."""
        pairs = [f"{key}={value}" for key, value in settings.items()]
        if job != "export-bundle":
            asks = (
                f"use_gpu: {str(self.cuda).lower()}"
                if job.startswith("train")
                else f"gpus_per_worker: {int(self.cuda)}"
            )
            pairs.append(f"runtime={{workers: 0, {asks}}}")
        options = [word for pair in pairs for word in ("--set", pair)]
        command = [sys.executable, "-m", "brainsynth", job, "--config", str(CONFIGS / config), *options]
        return self.begin(command, name)

    def begin(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        """Begin any command."""
        with (self.output / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603

    def wait(self, **processes: subprocess.Popen[bytes]) -> float:
        """Wait for processes that were begun together; returns the seconds of the longest."""
        began = time.monotonic()
        for name, process in processes.items():
            code = process.wait()
            entry = {"name": name, "exit_code": code, "seconds": round(time.monotonic() - began, 1)}
            self.done.append(entry)
            print(entry, flush=True)
            write_whole(self.record, json.dumps(self.done, indent=1).encode())
        failed = [str(entry["name"]) for entry in self.done if entry["exit_code"] and entry["name"] not in JUDGES]
        if failed:
            raise SystemExit(f"{failed[0]} failed; see {self.output / failed[0]}.log")
        return time.monotonic() - began

    def run(self, job: str, config: str, name: str, **settings: object) -> float:
        """One command from beginning to end."""
        return self.wait(**{name: self.start(job, config, name, settings)})


def trainings(small: bool) -> dict[str, tuple[str, str, int, dict[str, object]]]:
    """By name: the job, its config, steps that calibrate, and settings."""
    batch = 1 if small else 8
    critic = {"losses.discriminator_channels": 8 if small else 96, "crops.cells": 8 if small else 16}
    return {
        "autoencoder": (
            "train-autoencoder",
            "2-autoencoder.yaml",
            4 if small else 200,
            {"architecture": NARROW if small else WIDE, "optimisation.batch_size": batch, **critic},
        ),
        "diffusion": (
            "train-diffusion",
            "4-diffusion.yaml",
            4 if small else 200,
            {
                "architecture": DENOISER % ("8, 8, 8" if small else "96, 192, 256"),
                "optimisation.batch_size": 2 if small else 16,
            },
        ),
    }


class Plan:
    """The trainings of one run: where each writes, what each needs, and how long each may take."""

    def __init__(self, commands: Commands, cohort: Path, small: bool) -> None:
        self.commands, self.output, self.small = commands, commands.output, small
        self.settings = trainings(small)
        self.own: dict[str, dict[str, object]] = {
            "autoencoder": {"cohort": cohort},
            "diffusion": {"latents": self.output / "latents", "autoencoder": self.place("autoencoder", "first")},
        }

    def place(self, name: str, which: str) -> Path:
        """Output of a training."""
        return self.output / f"{name}-{which}"

    def begin(self, name: str, which: str, steps: int, **more: object) -> subprocess.Popen[bytes]:
        """Start a training of that many steps."""
        job, config, _, settings = self.settings[name]
        every = {f"optimisation.{key}": max(1, steps // 4) for key in ("validate_every", "checkpoint_every")}
        fixed = {"output": self.place(name, which), "optimisation.steps": steps, "optimisation.log_every": 2}
        return self.commands.start(
            job, config, f"{name}-{which}", {**settings, **self.own[name], **fixed, **every, **more}
        )

    def first(self, name: str, **more: object) -> float:
        """The steps that measure the rate, alone; returns their seconds."""
        return self.commands.wait(**{f"{name}-first": self.begin(name, "first", self.settings[name][2], **more)})

    def last(self, spent: dict[str, float], left: float) -> None:
        """Both trainings side by side for `left` seconds; at worst each has half its rate alone."""
        more = {"autoencoder": {"losses.adversarial_start": 0}, "diffusion": {}}
        begun = {}
        for name, seconds in spent.items():
            steps = max(2, int(self.settings[name][2] * left / seconds / 2))
            start = self.place(name, "first")
            begun[f"{name}-last"] = self.begin(name, "last", steps, start_from=start, **more[name])
        self.commands.wait(**begun)


def one_run(parts: Path, output: Path, minutes: float, device: str, small: bool) -> int:
    """The whole of it; returns 1 if a command failed."""
    output.mkdir(parents=True, exist_ok=True)
    commands, until = Commands(output, device), time.monotonic() + 60 * minutes
    cohort = unpack(parts, "cohort", output)
    plan = Plan(commands, cohort, small)
    latents, bundle, generated = (output / name for name in ("latents", "bundle", "generated"))
    spent = {"autoencoder": plan.first("autoencoder", **{"losses.adversarial_start": 2})}
    encoder = plan.place("autoencoder", "first")
    commands.run("encode-latents", "3-latents.yaml", "latents", cohort=cohort, autoencoder=encoder, output=latents)
    spent["diffusion"] = plan.first("diffusion")
    plan.last(spent, max(1.0, until - time.monotonic()))
    ends = {name: plan.place(name, "last") for name in spent}
    commands.run("export-bundle", "5-bundle.yaml", "bundle", output=bundle, **ends, **{"gate.cohort": cohort})
    pack(bundle, output / "weights", "bundle", WEIGHTS_PART)
    draw = {"covariates.draw": 8 if small else 96}
    commands.run("generate", "6-generate.yaml", "generate", bundle=bundle, output=generated, **draw)
    judged = {"dataset": generated, "reference": cohort}
    commands.run("evaluate", "7-evaluate.yaml", "evaluate", output=output / "evaluation", **judged)
    commands.run("audit", "8-audit.yaml", "audit", output=output / "audit", bundle=bundle, **judged)
    stats = [sys.executable, "-m", "recipes.pyramid.stats", str(generated), "--cohort", str(cohort), "--by", "cohort"]
    commands.wait(stats=commands.begin(stats, "stats"))
    shutil.rmtree(cohort)
    return int(any(entry["exit_code"] for entry in commands.done))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="a prepared cohort as small files")
    packing.add_argument("cohort", type=Path)
    packing.add_argument("parts", type=Path)
    running = commands.add_parser("run", help="train, generate and judge")
    running.add_argument("parts", type=Path)
    running.add_argument("output", type=Path)
    running.add_argument("--minutes", type=float, default=10.0, help="until both trainings have ended")
    running.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    running.add_argument("--small", action="store_true", help="a narrow pyramid and few volumes: does everything run?")
    options = parser.parse_args()
    if options.command == "pack":
        pack(options.cohort, options.parts, "cohort", COHORT_PART)
        return 0
    return one_run(options.parts, options.output, options.minutes, options.device, options.small)


if __name__ == "__main__":
    sys.exit(main())
