"""Distil a bundle's decoder: a light network learns to make, from latents alone, the images that the decoder makes.

The target is the decoder's image, never a scan. So it needs the bundle and latents: of scans where there are some, sampled
by the bundle's own denoiser where there are none, or both.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from brainsynth.bundle.spec import AUTOENCODER_FILE, DECODER_FILE, BundleSpec, DecoderFidelity, DistilledSpec
from brainsynth.config.distillation import DistillConfig
from brainsynth.errors import UserError
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.device import able, autocast, layout
from brainsynth.models.distilled_decoder import DistilledDecoder, decode_flops
from brainsynth.models.loading import load_models
from brainsynth.models.sampler_rules import check_bundle_sampler
from brainsynth.report.montage import grid
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import local_folder, open_store
from brainsynth.training.data import batch_indices, check_splits, weights_seed
from brainsynth.training.diffusion import LatentTable
from brainsynth.training.generated_latents import Teacher, generated_latents, read_teacher
from brainsynth.training.image_quality import closeness, sharpness
from brainsynth.training.latents import read_latent_spec
from brainsynth.training.learner import Learner
from brainsynth.training.loop import Worker
from brainsynth.training.losses import check_perceptual, gradient_difference, perceptual_loss
from brainsynth.training.runner import Training
from brainsynth.training.runs import DistillRun, Finished, write_weights

log = logging.getLogger(__name__)
MEASURED_AT_MOST = 64
"""Held-out latents of scans; of generated ones as many as the config says."""


class DistillTask:
    """One step, validation and figures of the distilled decoder."""

    def __init__(self, config: DistillConfig, source: Teacher, worker: Worker) -> None:
        self.config, self.source, self.worker = config, source, worker
        options, bundle = config.optimisation, source.bundle
        log.info("%s", describe_cost(config, bundle))
        self.precision = able(worker.device, options.precision)
        self.teacher, denoiser = load_models(source.folder, bundle, worker.device, rewrites=True)
        self.generated, held_out = generated_latents(config, bundle, denoiser, self.precision, worker)
        self.held_out = {"generated": held_out}
        self.encoded: LatentTable | None = None
        if config.latents is not None:
            self.encoded = LatentTable(config.latents, "train", bundle.covariates, bundle.latents)
            unseen = LatentTable(config.latents, "validation", bundle.covariates, bundle.latents)
            self.held_out["encoded"] = unseen.mean[:MEASURED_AT_MOST]
        torch.manual_seed(weights_seed(options.seed))
        student = DistilledDecoder(config.architecture, bundle.autoencoder).to(worker.device)
        layout(student)
        self.perceptual = perceptual_loss(config.losses, worker.device)
        self.learner = Learner(student, worker, options)
        self.state = self.learner.state("decoder")

    def latents(self, step: int) -> Tensor:
        """This worker's latents (B, C, X, Y, Z) of a step: those of scans lie anywhere between mean and posterior sample.

        Means alone would be few, samples alone would leave out the means that validation and encoding go by.
        """
        options = self.config.optimisation

        def mine(count: int) -> Tensor:
            return self.worker.share(batch_indices(count, options.batch_size, step, options.seed))

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
        return self.learner.update_in_parts((self.latents(step),), self._loss)

    def _loss(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.config.losses
        with autocast(self.worker.device, self.precision):
            with torch.no_grad():
                target = self.teacher.decode(z).flip(self.teacher.flipped)  # along the network's own axes
            made = self.learner.parallel(z)
        made = made.float()
        values = {"l1": nn.functional.l1_loss(made, target)}
        values["gradient"] = gradient_difference(made, target, weights.gradient_scales)
        loss = values["l1"] + weights.gradient_weight * values["gradient"]
        if self.perceptual is not None:
            with autocast(self.worker.device, self.precision):
                values["perceptual"] = self.perceptual(made, target)
            loss = loss + weights.perceptual_weight * values["perceptual"]
        return loss, values

    def _both(self, z: Tensor, distilled: DistilledDecoder) -> tuple[Tensor, Tensor]:
        """Images by the distilled and by the bundle's own decoder, as generation makes them."""
        z = z.to(self.worker.device)
        with autocast(self.worker.device, self.precision):
            own = self.teacher.decode(z)
            self.teacher.distilled = distilled
            try:
                return self.teacher.decode(z), own
            finally:
                self.teacher.distilled = None

    @torch.no_grad()
    def validate(self) -> list[dict[str, float]]:
        """L1, PSNR (dB), SSIM and sharpness ratio to the original decoder's images, per kind of held-out latents."""
        distilled = self.learner.averaged()
        rows = []
        for kind, latents in self.held_out.items():
            for z in self.worker.part(torch.split(latents, 1)):
                made, own = self._both(z, distilled)
                row = {**closeness(made, own), "sharpness_ratio": sharpness(made) / max(sharpness(own), 1e-12)}
                rows.append({f"{kind}_{name}": value for name, value in row.items()})
        return rows

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """Generated latents as the bundle's own decoder (top) and the distilled one (below) show them."""
        distilled = self.learner.averaged()
        pairs = [self._both(z, distilled) for z in torch.split(self.held_out["generated"][:4], 1)]
        rows = [[pair[which][0, 0].cpu().numpy() for pair in pairs] for which in (1, 0)]
        return {"decoders": grid(rows)}

    def record(self, finished: Finished) -> DistillRun:
        """Write the averaged weights; returns the record of the training, with the last validation's figures."""
        own, light = flops(self.config, self.source.bundle)
        names = ("psnr_db", "ssim", "l1", "sharpness_ratio")
        fidelity = {
            kind: DecoderFidelity(count=len(z), **{name: finished.metrics[f"{kind}_{name}"] for name in names})
            for kind, z in self.held_out.items()
        }
        distilled = DistilledSpec(
            architecture=self.config.architecture,
            flops_ratio=own / light,
            on_generated=fidelity["generated"],
            on_encoded=fidelity.get("encoded"),
        )
        return DistillRun(
            config_digest=finished.config_digest,
            bundle_digest=self.source.bundle.digest,
            distilled=distilled,
            weights_sha256=write_weights(self.learner.averaged(), self.worker.folder / DECODER_FILE),
            metrics=finished.metrics,
            elapsed_s=finished.elapsed_s,
        )


def flops(config: DistillConfig, bundle: BundleSpec) -> tuple[int, int]:
    """Operations of one decode by the bundle's own decoder, and by the distilled one."""
    shape = bundle.latents.shape_cxyz
    own = decode_flops(lambda: Autoencoder(build_autoencoder(bundle.autoencoder), bundle.latents).decode, shape)
    return own, decode_flops(lambda: DistilledDecoder(config.architecture, bundle.autoencoder), shape)


def describe_cost(config: DistillConfig, bundle: BundleSpec) -> str:
    """Both decoders' operations, in a line."""
    own, distilled = flops(config, bundle)
    return f"GFLOP of a decode: {own / 1e9:.3g} by the bundle's own decoder, {distilled / 1e9:.3g} distilled"


def check(config: DistillConfig) -> Teacher:
    """Everything that can be refused before a worker starts, and what was read for it. Raises UserError."""
    local_folder(config.output, "output")
    source = read_teacher(config)
    folder, bundle = source.folder, source.bundle
    if bundle.autoencoder.kind == "pyramid":
        raise UserError(
            f"bundle: the decoder of {folder} is a pyramid, which draws from noise and covariates; a distilled decoder "
            "makes images from latents alone"
        )
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
        check_splits(config.latents, "latents")
    check_perceptual(config.losses)
    return source


TRAINING = Training("decoder", check, DistillTask, DistillRun)
