"""Distil a bundle's denoiser: the same network learns to take its teacher's trajectory in 1, 2 or 4 evaluations.

The teacher's best solver, guidance included, samples trajectories from noise to latents; the student, which begins with the
teacher's weights, regresses the step from each of its timesteps to the next (models/few_steps.py). No data are needed.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from brainsynth.bundle.files import bundle_folder, check_bundle_files, file_sha256, read_bundle
from brainsynth.bundle.spec import DIFFUSION_FILE, BundleSpec
from brainsynth.config.distillation import StepDistillConfig
from brainsynth.errors import UserError
from brainsynth.models.device import able, autocast
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.few_steps import (
    check_teacher,
    fold_guidance,
    network_times,
    reference_sampler,
    step_targets,
    student_sampler,
    student_schedule,
    teacher_states,
)
from brainsynth.models.sampling import guided, sample_latents, sample_rows
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.models.weights import load_models
from brainsynth.reading.dataset import open_dataset
from brainsynth.records import digest, to_dict
from brainsynth.report.montage import grid
from brainsynth.stages.bundle import check_bundle_output
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import local_folder, open_store
from brainsynth.storage.whole_file import full_disk_told, replaced
from brainsynth.training.data import batch_indices
from brainsynth.training.ema import Ema
from brainsynth.training.generated_latents import TOGETHER, drawn_context, kept_in_files, row_seeds
from brainsynth.training.loop import Report, Worker, run
from brainsynth.training.preemption import Preempted, never
from brainsynth.training.runs import (
    HELD_OUT_FILE,
    StepDistillRun,
    finished,
    training_digest,
    write_run,
    write_weights,
)
from brainsynth.training.state import TrainingState
from brainsynth.training.trackers import check_trackers

log = logging.getLogger(__name__)


class StepDistillTask:
    """One step, validation and figures of the student."""

    def __init__(
        self, config: StepDistillConfig, worker: Worker, bundle: BundleSpec, folder: Path, preempted: Preempted
    ) -> None:
        self.config, self.worker, self.bundle = config, worker, bundle
        options, source = config.optimisation, bundle_folder(config.bundle)
        self.precision = able(worker.device, options.precision)
        self.sampler = student_sampler(config.trajectories.sampler, config.evaluations)
        self.schedule = NoiseSchedule(student_schedule(bundle.schedule))
        self.times = torch.tensor(network_times(self.schedule, self.sampler))
        self.autoencoder, teacher = load_models(source, bundle, worker.device, rewrites=True)
        counts = {"train": config.trajectories.count, "validation": config.trajectories.validation_count}
        self.contexts = {split: contexts(config, bundle, split, count) for split, count in counts.items()}
        self.made = self._trajectories(teacher, counts, folder, preempted)
        torch.manual_seed(options.seed)
        _, self.student = load_models(source, bundle, worker.device)
        fold_guidance(self.student, config.trajectories.sampler.guidance_scale)
        self.student.requires_grad_(True).train()
        self._student = worker.parallel(self.student)
        self.average = Ema(self.student, options.ema_decay)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), options.learning_rate, weight_decay=0.0)
        self.optimizer.param_groups[0]["lr_factor"] = 1.0
        self.state = TrainingState({"denoiser": self.student}, {"denoiser": self.average}, {"denoiser": self.optimizer})

    def _trajectories(
        self, teacher: Denoiser, counts: dict[str, int], folder: Path, preempted: Preempted
    ) -> dict[str, dict[str, Tensor]]:
        """`states` (N, n + 1, C, X, Y, Z) of each split, and for those to measure on the latents of other samplers."""
        wanted, options, device = self.config.trajectories, self.config.optimisation, self.worker.device
        schedule, shape = NoiseSchedule(self.bundle.schedule), self.bundle.latents.shape_cxyz
        identity = [self.bundle.digest, to_dict(wanted), self.config.evaluations, options.precision, options.seed]
        identity += [digest(context.tolist()) for context in self.contexts.values()]
        others = {
            "reference": reference_sampler(wanted.sampler, wanted.reference_steps),
            "teacher_in_as_few": dataclasses.replace(wanted.sampler, steps=self.config.evaluations),
        }

        @torch.no_grad()
        def sample(split: str, part: range) -> dict[str, Tensor]:
            context = self.contexts[split][part.start : part.stop].to(device)
            rows = (teacher, context, row_seeds(split, part, options.seed), shape, schedule)
            with autocast(device, self.precision):
                made = {"states": teacher_states(*rows, wanted.sampler, self.config.evaluations)}
                if split == "validation":
                    made |= {name: sample_rows(*rows, sampler) for name, sampler in others.items()}
            return {name: z.float().cpu() for name, z in made.items()}

        place = folder / f"trajectories-{digest(identity)[:12]}"
        return kept_in_files(place, counts, sample, self.worker, preempted)

    def step(self, step: int) -> dict[str, Tensor]:
        """One update: each pair of a trajectory and one of its steps is seen once an epoch."""
        options, device, evaluations = self.config.optimisation, self.worker.device, self.config.evaluations
        states = self.made["train"]["states"]
        indices = batch_indices(len(states) * evaluations, options.batch_size, step, options.seed)
        index = torch.from_numpy(indices[self.worker.rank :: self.worker.world_size])
        row, which = index // evaluations, index % evaluations
        x, target, length = step_targets(states[row], which, self.schedule.config, self.sampler)
        times, context = self.times[which].to(device), self.contexts["train"][row].to(device)
        with autocast(device, self.precision):
            prediction = self._student(x.to(device), times, context)
        # In units of the state that the step leads to, which is what the next step and the image see.
        error = (prediction.float() - target.to(device)).pow(2).flatten(1).mean(1)
        loss = (error * length.to(device) ** 2).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), options.gradient_clip)
        self.optimizer.step()
        self.average.update(self.student)
        return {"loss": loss, "gradient_norm": norm}

    def averaged(self) -> Denoiser:
        """The student with averaged weights, in evaluation mode."""
        network = copy.deepcopy(self.student)
        network.load_state_dict(self.average.state())
        return network.requires_grad_(False).eval()

    @torch.no_grad()
    def sampled(self, rows: int) -> Tensor:
        """(N, C, X, Y, Z) the student's latents of the first held-out rows, as generation makes them."""
        network, device, ends = self.averaged(), self.worker.device, []
        noises = self.made["validation"]["states"][:rows, 0].split(TOGETHER)
        for noise, context in zip(noises, self.contexts["validation"][:rows].split(TOGETHER), strict=True):
            with autocast(device, self.precision):
                predict = guided(network, context.to(device), 1.0)
                ends.append(sample_latents(predict, noise.to(device), self.schedule, self.sampler).float().cpu())
        return torch.cat(ends)

    def held_out(self) -> dict[str, Tensor]:
        """Latents of the held-out rows: those of MEASURED and of the `reference`."""
        made = dict(self.made["validation"])
        states = made.pop("states")
        return {**made, "teacher": states[:, -1], "student": self.sampled(len(states))}

    def validate(self) -> dict[str, float]:
        """Root mean square distance of held-out latents to the reference's, relative to their root mean square."""
        found = self.held_out()
        reference = found.pop("reference")
        power = reference.pow(2).mean()
        return {f"{name}_error": float(((z - reference).pow(2).mean() / power).sqrt()) for name, z in found.items()}

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """Volumes of held-out latents: of the reference (top) and of the student (below)."""
        latents = (self.made["validation"]["reference"][:4], self.sampled(4))
        rows = [self.autoencoder.decode(z.to(self.worker.device)) for z in latents]
        return {"steps": grid([list(row[:, 0].cpu().numpy()) for row in rows])}


def contexts(config: StepDistillConfig, bundle: BundleSpec, split: str, count: int) -> Tensor:
    """(N, K) contexts of a split's rows: drawn, or those of the scans, again and again with other noises."""
    seed = config.optimisation.seed
    if config.latents is None:
        return drawn_context(bundle, split, count, seed)
    scans = bundle.covariates.encode(open_dataset(config.latents, split=split, array="mean").table)
    return torch.from_numpy(scans[batch_indices(len(scans), count, 0, seed)])


def describe_cost(config: StepDistillConfig) -> str:
    """Evaluations of the network per volume before and after, in a line."""
    sampler = config.trajectories.sampler
    steps = 2 * sampler.steps - 1 if sampler.method == "heun" else sampler.steps
    guidance = ", each of a batch of twice the size for guidance" if sampler.guidance_scale != 1 else ""
    return f"teacher {steps} evaluations a volume{guidance}; student {config.evaluations}, guidance folded in"


def check(config: StepDistillConfig) -> BundleSpec:
    """Everything that can be refused before a worker starts. Raises UserError."""
    check_trackers(config.runtime.trackers)
    folder, wanted = bundle_folder(config.bundle), config.trajectories
    bundle = read_bundle(folder)
    check_bundle_files(folder, bundle)
    if bundle.few_steps is not None:
        raise UserError(
            f"bundle: the denoiser of {folder} is itself distilled, for {bundle.few_steps.sampler.steps} evaluations; "
            f"distil its teacher instead, the bundle with the digest {bundle.few_steps.distilled_from[:12]}"
        )
    guidable = bundle.covariates.missing != "refuse"
    try:
        check_teacher(bundle.schedule, wanted.sampler, config.evaluations, guidable)
    except UserError as error:
        raise UserError(f"trajectories.{error}") from None
    if wanted.reference_steps > bundle.schedule.num_train_timesteps:
        raise UserError(
            f"trajectories.reference_steps {wanted.reference_steps} is more than the {bundle.schedule.num_train_timesteps} "
            "trained timesteps"
        )
    if config.latents is not None:
        _check_scans(config.latents, config.bundle, bundle)
    elif bundle.distribution is None:
        raise UserError(
            f"the bundle {folder} has no covariate distribution from which to draw rows; name latents of scans, whose "
            "covariates are taken, or import it again with --covariates TABLE"
        )
    local_folder(config.output, "output")
    check_bundle_output(config, bundle)
    return bundle


def _check_scans(latents: str, name: str, bundle: BundleSpec) -> None:
    plan = read_plan(open_store(latents))
    if plan.kind != "latents" or plan.covariates != bundle.covariates:
        raise UserError(f"latents {latents} are no latents of scans with the covariates of the bundle {name}")
    try:
        for split in ("train", "validation"):
            open_dataset(latents, split=split, array="mean")
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"latents: {error}") from None


def fit(config: StepDistillConfig, report: Report = lambda metrics: None, preempted: Preempted = never) -> None:
    """Train, or go on training, and leave averaged weights, held-out latents and run.json in `config.output`.

    Raises:
        Left: `preempted` asked for it; what was done is saved.
    """
    bundle = check(config)
    folder = local_folder(config.output, "output")
    with full_disk_told(folder, "the training's output"):
        folder.mkdir(parents=True, exist_ok=True)
        _fit(config, folder, bundle, report, preempted)


def _fit(config: StepDistillConfig, folder: Path, bundle: BundleSpec, report: Report, preempted: Preempted) -> None:
    latents = None if config.latents is None else read_plan(open_store(config.latents)).fingerprint
    config_digest = training_digest(config, digest({"bundle": bundle.digest, "latents": latents}))
    if finished(folder, StepDistillRun, config_digest):
        log.info("already trained: %s", folder)
        return
    log.info("%s", describe_cost(config))
    began = time.monotonic()
    worker = Worker(config.runtime)
    task = StepDistillTask(config, worker, bundle, folder, preempted)
    options, trackers = config.optimisation, config.runtime.trackers
    metrics = run(task, worker, options, folder, config_digest, trackers, to_dict(config), report, preempted)
    if worker.rank == 0:
        with replaced(folder / HELD_OUT_FILE) as temporary:
            save_file({name: z.contiguous() for name, z in task.held_out().items()}, temporary)
        weights = {
            DIFFUSION_FILE: write_weights(task.averaged(), folder / DIFFUSION_FILE),
            HELD_OUT_FILE: file_sha256(folder / HELD_OUT_FILE),
        }
        record = StepDistillRun(
            config_digest=config_digest,
            bundle_digest=bundle.digest,
            weights=weights,
            metrics=metrics,
            elapsed_s=time.monotonic() - began,
        )
        write_run(folder, record)
