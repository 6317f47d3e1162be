"""Distil a bundle's denoiser: the same network learns to take its teacher's trajectory in 1, 2 or 4 evaluations.

The teacher's best solver, guidance included, samples trajectories from noise to latents; the student, which begins with the
teacher's weights, regresses the step from each of its timesteps to the next (models/few_steps.py). No data are needed.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

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
from brainsynth.models.loading import load_models
from brainsynth.models.sampling import guided, sample_latents, sample_rows
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.reading.dataset import open_dataset
from brainsynth.records import digest, to_dict
from brainsynth.report.montage import grid
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import local_folder, open_store
from brainsynth.storage.whole_file import file_sha256, replaced
from brainsynth.training.data import batch_indices, check_splits, weights_seed
from brainsynth.training.generated_latents import (
    TOGETHER,
    Teacher,
    drawn_context,
    kept_in_files,
    read_teacher,
    row_seeds,
)
from brainsynth.training.learner import Learner
from brainsynth.training.loop import Worker
from brainsynth.training.runner import Training
from brainsynth.training.runs import (
    HELD_OUT_FILE,
    Finished,
    StepDistillRun,
    write_weights,
)

log = logging.getLogger(__name__)


class StepDistillTask:
    """One step, validation and figures of the student."""

    def __init__(self, config: StepDistillConfig, source: Teacher, worker: Worker) -> None:
        self.config, self.bundle, self.worker = config, source.bundle, worker
        options, bundle = config.optimisation, source.bundle
        log.info("%s", describe_cost(config))
        self.precision = able(worker.device, options.precision)
        self.sampler = student_sampler(config.trajectories.sampler, config.evaluations)
        self.schedule = NoiseSchedule(student_schedule(bundle.schedule))
        self.times = torch.tensor(network_times(self.schedule, self.sampler))
        self.autoencoder, teacher = load_models(source.folder, bundle, worker.device, rewrites=True)
        counts = {"train": config.trajectories.count, "validation": config.trajectories.validation_count}
        self.contexts = {split: contexts(config, bundle, split, count) for split, count in counts.items()}
        self.made = self._trajectories(teacher, counts)
        torch.manual_seed(weights_seed(options.seed))
        _, student = load_models(source.folder, bundle, worker.device)
        fold_guidance(student, config.trajectories.sampler.guidance_scale)
        self.learner = Learner(student.requires_grad_(True).train(), worker, options)
        self.state = self.learner.state("denoiser")

    def _trajectories(self, teacher: Denoiser, counts: dict[str, int]) -> dict[str, dict[str, Tensor]]:
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
            seeds = row_seeds(split, part, options.seed)
            with autocast(device, self.precision):
                made = {
                    "states": teacher_states(
                        teacher, context, seeds, shape, schedule, wanted.sampler, self.config.evaluations
                    )
                }
                if split == "validation":
                    for name, sampler in others.items():
                        made[name] = sample_rows(teacher, context, seeds, shape, schedule, sampler)
            return {name: z.float().cpu() for name, z in made.items()}

        place = self.worker.folder / f"trajectories-{digest(identity)[:12]}"
        return kept_in_files(place, counts, sample, self.worker)

    def step(self, step: int) -> dict[str, Tensor]:
        """One update: each pair of a trajectory and one of its steps is seen once an epoch."""
        options, device, evaluations = self.config.optimisation, self.worker.device, self.config.evaluations
        states = self.made["train"]["states"]
        indices = batch_indices(len(states) * evaluations, options.batch_size, step, options.seed)
        index = self.worker.share(indices)
        row, which = index // evaluations, index % evaluations
        x, target, length = step_targets(states[row], which, self.schedule.config, self.sampler)
        times, context = self.times[which].to(device), self.contexts["train"][row].to(device)
        return self.learner.update_in_parts(
            (x.to(device), times, context, target.to(device), length.to(device)), self._loss
        )

    def _loss(
        self, x: Tensor, times: Tensor, context: Tensor, target: Tensor, length: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """In units of the state that the step leads to, which is what the next step and the image see."""
        with autocast(self.worker.device, self.precision):
            prediction = self.learner.parallel(x, times, context)
        error = (prediction.float() - target).pow(2).flatten(1).mean(1)
        return (error * length**2).mean(), {}

    @torch.no_grad()
    def sampled(self, rows: int) -> Tensor:
        """(N, C, X, Y, Z) the student's latents of the first held-out rows, as generation makes them."""
        network, device, ends = self.learner.averaged(), self.worker.device, []
        noises = torch.split(self.made["validation"]["states"][:rows, 0], TOGETHER)
        for noise, context in zip(noises, torch.split(self.contexts["validation"][:rows], TOGETHER), strict=True):
            with autocast(device, self.precision):
                predict = guided(network, context.to(device), 1.0)
                ends.append(sample_latents(predict, noise.to(device), self.schedule, self.sampler).float().cpu())
        return torch.cat(ends)

    def held_out(self) -> dict[str, Tensor]:
        """Latents of the held-out rows: those of MEASURED and of the `reference`."""
        made = dict(self.made["validation"])
        states = made.pop("states")
        return {**made, "teacher": states[:, -1], "student": self.sampled(len(states))}

    def validate(self) -> list[dict[str, float]]:
        """Root mean square distance of held-out latents to the reference's, relative to their root mean square.

        A ratio of means over all rows, so the first worker measures it alone; latents are small.
        """
        if self.worker.rank > 0:
            return []
        latents = self.held_out()
        reference = latents.pop("reference")
        power = reference.pow(2).mean()
        return [{f"{name}_error": float(((z - reference).pow(2).mean() / power).sqrt()) for name, z in latents.items()}]

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """Volumes of held-out latents: of the reference (top) and of the student (below)."""
        latents = (self.made["validation"]["reference"][:4], self.sampled(4))
        context = torch.split(self.contexts["validation"][:4].to(self.worker.device), 1)
        device = self.worker.device
        with autocast(device, self.precision):
            rows = [
                [
                    self.autoencoder.decode(one.to(device), known)
                    for one, known in zip(torch.split(z, 1), context, strict=False)
                ]
                for z in latents
            ]
        return {"steps": grid([[x[0, 0].cpu().numpy() for x in row] for row in rows])}

    def record(self, finished: Finished) -> StepDistillRun:
        """Write the averaged weights and the held-out latents; returns the record of the training."""
        folder = self.worker.folder
        with replaced(folder / HELD_OUT_FILE) as temporary:
            save_file({name: z.contiguous() for name, z in self.held_out().items()}, temporary)
        weights = {
            DIFFUSION_FILE: write_weights(self.learner.averaged(), folder / DIFFUSION_FILE),
            HELD_OUT_FILE: file_sha256(folder / HELD_OUT_FILE),
        }
        return StepDistillRun(
            config_digest=finished.config_digest,
            bundle_digest=self.bundle.digest,
            weights=weights,
            metrics=finished.metrics,
            elapsed_s=finished.elapsed_s,
        )


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


def check(config: StepDistillConfig) -> Teacher:
    """Everything that can be refused before a worker starts, and what was read for it. Raises UserError."""
    local_folder(config.output, "output")
    source, wanted = read_teacher(config), config.trajectories
    folder, bundle = source.folder, source.bundle
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
    return source


def _check_scans(latents: str, name: str, bundle: BundleSpec) -> None:
    plan = read_plan(open_store(latents))
    if plan.kind != "latents" or plan.covariates != bundle.covariates:
        raise UserError(f"latents {latents} are not latents of scans with the covariates of the bundle {name}")
    check_splits(latents, "latents", array="mean")


TRAINING = Training("steps", check, StepDistillTask, StepDistillRun)
