"""Distil a bundle's decoder: a light network learns to make, from latents alone, the images that the decoder makes.

The target is the decoder's image, never a scan. So it needs the bundle and latents: of scans where there are some, sampled
by the bundle's own denoiser where there are none, or both.
"""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brainsynth.bundle.files import bundle_folder, check_bundle_files, read_bundle
from brainsynth.bundle.spec import AUTOENCODER_FILE, DECODER_FILE, BundleSpec, DecoderFidelity, DistilledSpec
from brainsynth.config.distillation import DistillConfig
from brainsynth.errors import UserError
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.device import able, autocast, layout
from brainsynth.models.distilled_decoder import DistilledDecoder, decode_flops
from brainsynth.models.sampler_rules import check_bundle_sampler
from brainsynth.models.weights import load_models
from brainsynth.reading.dataset import open_dataset
from brainsynth.records import digest, to_dict
from brainsynth.report.montage import grid
from brainsynth.stages.bundle import check_bundle_output
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import local_folder, open_store
from brainsynth.storage.whole_file import full_disk_told
from brainsynth.training.data import batch_indices
from brainsynth.training.diffusion import LatentTable
from brainsynth.training.ema import Ema
from brainsynth.training.generated_latents import generated_latents
from brainsynth.training.image_quality import closeness, mean_closeness, sharpness
from brainsynth.training.latents import read_latent_spec
from brainsynth.training.loop import Report, Worker, run
from brainsynth.training.losses import check_perceptual, gradient_difference, perceptual_loss
from brainsynth.training.preemption import Preempted, never
from brainsynth.training.runs import DistillRun, finished, training_digest, write_run, write_weights
from brainsynth.training.state import TrainingState
from brainsynth.training.trackers import check_trackers

log = logging.getLogger(__name__)
MEASURED_AT_MOST = 64
"""Held-out latents of scans; of generated ones as many as the config says."""


class DistillTask:
    """One step, validation and figures of the distilled decoder."""

    def __init__(
        self, config: DistillConfig, worker: Worker, bundle: BundleSpec, folder: Path, preempted: Preempted
    ) -> None:
        self.config, self.worker = config, worker
        options = config.optimisation
        self.precision = able(worker.device, options.precision)
        source = bundle_folder(config.bundle)
        self.teacher, denoiser = load_models(source, bundle, worker.device, rewrites=True)
        self.generated, held_out = generated_latents(
            config, worker, bundle, denoiser, self.precision, folder, preempted
        )
        self.held_out = {"generated": held_out}
        self.encoded: LatentTable | None = None
        if config.latents is not None:
            schema = bundle.covariates
            self.encoded = LatentTable(config.latents, "train", schema, bundle.latents)
            unseen = LatentTable(config.latents, "validation", schema, bundle.latents)
            self.held_out["encoded"] = unseen.mean[:MEASURED_AT_MOST]
        torch.manual_seed(options.seed)
        self.student = DistilledDecoder(config.architecture, bundle.autoencoder).to(worker.device)
        layout(self.student)
        self.perceptual = perceptual_loss(config.losses, worker.device)
        self._student = worker.parallel(self.student)
        self.average = Ema(self.student, options.ema_decay)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), options.learning_rate, weight_decay=0.0)
        self.optimizer.param_groups[0]["lr_factor"] = 1.0
        self.state = TrainingState({"decoder": self.student}, {"decoder": self.average}, {"decoder": self.optimizer})

    def latents(self, step: int) -> Tensor:
        """This worker's latents (B, C, X, Y, Z) of a step: those of scans lie anywhere between mean and posterior sample.

        Means alone would be few, samples alone would leave out the means that validation and encoding go by.
        """
        options = self.config.optimisation

        def mine(count: int) -> Tensor:
            indices = batch_indices(count, options.batch_size, step, options.seed)
            return torch.from_numpy(indices[self.worker.rank :: self.worker.world_size])

        z = self.generated[mine(len(self.generated))]
        if self.encoded is not None:
            index = mine(len(self.encoded))
            mean, sigma = self.encoded.mean[index], self.encoded.sigma[index]
            generated = torch.rand(len(index)) < self.config.generated.share
            spread = torch.rand(len(index), 1, 1, 1, 1) * sigma
            z = torch.where(generated.view(-1, 1, 1, 1, 1), z, mean + spread * torch.randn_like(mean))
        return z.to(self.worker.device)

    def step(self, step: int) -> dict[str, Tensor]:
        """One update."""
        weights, options = self.config.losses, self.config.optimisation
        z = self.latents(step)
        with autocast(self.worker.device, self.precision):
            with torch.no_grad():
                target = self.teacher.decode(z).flip(self.teacher.flipped)  # along the network's own axes
            made = self._student(z)
        made = made.float()
        values = {"l1": nn.functional.l1_loss(made, target)}
        values["gradient"] = gradient_difference(made, target, weights.gradient_scales)
        loss = values["l1"] + weights.gradient_weight * values["gradient"]
        if self.perceptual is not None:
            values["perceptual"] = self.perceptual(made, target)
            loss = loss + weights.perceptual_weight * values["perceptual"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        values["gradient_norm"] = nn.utils.clip_grad_norm_(self.student.parameters(), options.gradient_clip)
        self.optimizer.step()
        self.average.update(self.student)
        return {"loss": loss, **values}

    def averaged(self) -> DistilledDecoder:
        """The student with averaged weights, in evaluation mode."""
        network = copy.deepcopy(self.student)
        network.load_state_dict(self.average.state())
        return network.requires_grad_(False).eval()

    def _both(self, z: Tensor, distilled: DistilledDecoder) -> tuple[Tensor, Tensor]:
        """Images by the distilled and by the own decoder, float32, as generation makes them."""
        z = z.to(self.worker.device)
        own = self.teacher.decode(z)
        self.teacher.distilled = distilled
        try:
            return self.teacher.decode(z).cpu(), own.cpu()
        finally:
            self.teacher.distilled = None

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """L1, PSNR (dB), SSIM and sharpness ratio to the own decoder's images, per kind of held-out latents."""
        distilled, metrics = self.averaged(), {}
        for kind, latents in self.held_out.items():
            rows = []
            for z in latents.split(1):
                made, own = self._both(z, distilled)
                rows.append({**closeness(made, own), "sharpness_ratio": sharpness(made) / max(sharpness(own), 1e-12)})
            metrics |= {f"{kind}_{name}": value for name, value in mean_closeness(rows).items()}
        return metrics

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """Generated latents as the own decoder (top) and the distilled one (below) show them."""
        made, own = self._both(self.held_out["generated"][:4], self.averaged())
        return {"decoders": grid([list(own[:, 0].numpy()), list(made[:, 0].numpy())])}

    def measured(self, kind: str, metrics: dict[str, float]) -> DecoderFidelity | None:
        """The last validation's figures of one kind of latents; None where there are no such latents."""
        if kind not in self.held_out:
            return None
        names = ("psnr_db", "ssim", "l1", "sharpness_ratio")
        return DecoderFidelity(count=len(self.held_out[kind]), **{name: metrics[f"{kind}_{name}"] for name in names})


def flops(config: DistillConfig, bundle: BundleSpec) -> tuple[int, int]:
    """Operations of one decode by the bundle's own decoder, and by the distilled one."""
    shape = bundle.latents.shape_cxyz
    own = decode_flops(lambda: Autoencoder(build_autoencoder(bundle.autoencoder), bundle.latents).decode, shape)
    return own, decode_flops(lambda: DistilledDecoder(config.architecture, bundle.autoencoder), shape)


def describe_cost(config: DistillConfig, bundle: BundleSpec) -> str:
    """Both decoders' operations, in a line."""
    own, distilled = flops(config, bundle)
    return (
        f"own decoder {own / 1e9:.3g} GFLOP, distilled {distilled / 1e9:.3g} GFLOP: {own / distilled:.1f} times fewer"
    )


def check(config: DistillConfig) -> BundleSpec:
    """Everything that can be refused before a worker starts. Raises UserError."""
    check_trackers(config.runtime.trackers)
    folder = bundle_folder(config.bundle)
    bundle = read_bundle(folder)
    check_bundle_files(folder, bundle)
    check_bundle_sampler(bundle, config.generated.sampler)
    try:
        own, distilled = flops(config, bundle)
    except ValueError as error:
        raise UserError(f"architecture: {error}") from None
    if distilled >= own:
        raise UserError(
            f"architecture: the distilled decoder would take {distilled / 1e9:.3g} GFLOP and the bundle's own takes "
            f"{own / 1e9:.3g}: give it fewer channels or blocks"
        )
    if bundle.distribution is None:
        raise UserError(
            f"the bundle {folder} has no covariate distribution from which to draw the rows of generated latents; import it "
            "again with --covariates TABLE"
        )
    if config.latents is not None:
        store = open_store(config.latents)
        made_by = read_plan(store).identity.get("autoencoder")
        as_exported_or_trained = (bundle.weights[AUTOENCODER_FILE], bundle.provenance.get("trained_autoencoder_sha256"))
        if made_by not in as_exported_or_trained or read_latent_spec(store) != bundle.latents:
            raise UserError(
                f"latents {config.latents} were not made by the autoencoder of the bundle {config.bundle}; "
                "give its own, or leave latents out and set generated.share to 1"
            )
        try:
            for split in ("train", "validation"):
                open_dataset(config.latents, split=split)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"latents: {error}") from None
    check_perceptual(config.losses)
    local_folder(config.output, "output")
    check_bundle_output(config, bundle)
    return bundle


def fit(config: DistillConfig, report: Report = lambda metrics: None, preempted: Preempted = never) -> None:
    """Train, or go on training, and leave averaged weights and run.json in `config.output`.

    Raises:
        Left: `preempted` asked for it; what was done is saved.
    """
    bundle = check(config)
    folder = local_folder(config.output, "output")
    with full_disk_told(folder, "the training's output"):
        folder.mkdir(parents=True, exist_ok=True)
        _fit(config, folder, bundle, report, preempted)


def _fit(config: DistillConfig, folder: Path, bundle: BundleSpec, report: Report, preempted: Preempted) -> None:
    latents = None if config.latents is None else read_plan(open_store(config.latents)).fingerprint
    config_digest = training_digest(config, digest({"bundle": bundle.digest, "latents": latents}))
    if finished(folder, DistillRun, config_digest):
        log.info("already trained: %s", folder)
        return
    log.info("%s", describe_cost(config, bundle))
    began = time.monotonic()
    worker = Worker(config.runtime)
    task = DistillTask(config, worker, bundle, folder, preempted)
    options, trackers = config.optimisation, config.runtime.trackers
    metrics = run(task, worker, options, folder, config_digest, trackers, to_dict(config), report, preempted)
    if worker.rank == 0:
        own, light = flops(config, bundle)
        on_generated = task.measured("generated", metrics)
        assert on_generated is not None
        distilled = DistilledSpec(
            architecture=config.architecture,
            flops_ratio=own / light,
            on_generated=on_generated,
            on_encoded=task.measured("encoded", metrics),
        )
        record = DistillRun(
            config_digest=config_digest,
            bundle_digest=bundle.digest,
            distilled=distilled,
            weights_sha256=write_weights(task.averaged(), folder / DECODER_FILE),
            metrics=metrics,
            elapsed_s=time.monotonic() - began,
        )
        write_run(folder, record)
