"""Encode a cohort once: latent means and sigmas to Zarr, and the shift and scale that whiten them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from brainsynth.bundle.spec import LatentSpec, check_latent_grid
from brainsynth.config.schema import SHIPPED_BUNDLE, EncodeConfig, RuntimeConfig
from brainsynth.errors import UserError
from brainsynth.manifest import SampleRecord, describe_sample
from brainsynth.models.autoencoder import build_autoencoder
from brainsynth.models.device import MicroBatch, choose_device, describe, set_threads
from brainsynth.models.pieces import in_pieces, numbers_per_cell
from brainsynth.models.weights import load_weights
from brainsynth.plan import ArraySpec, Plan, ShardSpec, table_digest
from brainsynth.reading.dataset import open_dataset, open_input
from brainsynth.records import seal, unseal
from brainsynth.storage.arrays import empty_arrays
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import Store, open_store, resolve_uri
from brainsynth.storage.work import ShardOutput, Work
from brainsynth.training.runs import trained_autoencoder
from brainsynth.volume import VolumeSpec, mirrored

LATENTS_KEY = "latents.json"
WHITENED_AS = "whitened_as"
"""In the identity of latents of a bundle's autoencoder: its digest. Shift and scale are the bundle's."""


def plan_latents(config: EncodeConfig) -> Work:
    """What encoding will store. Raises UserError when cohort and autoencoder do not fit."""
    cohort_uri = resolve_uri(config.cohort, "cohort")
    cohort_store = open_store(cohort_uri)
    cohort_plan = read_plan(cohort_store)
    run, file, bundle = trained_autoencoder(config.autoencoder, cohort_plan.covariates, cohort_plan.fingerprint)
    if bundle is not None and config.whitening != 1:
        raise UserError("whitening: latents of a bundle's autoencoder keep the bundle's shift and scale: leave it out")
    if cohort_plan.volume != run.volume:
        raise UserError(
            f"cohort {config.cohort} is on another grid than the autoencoder {config.autoencoder} was trained on"
        )
    cohort = open_input(config.cohort, "cohort")
    samples = read_samples(cohort_store, cohort_plan).iloc[cohort.rows].reset_index(drop=True)
    samples.insert(1, "cohort_row", cohort.rows)
    if config.mirror:
        samples = _with_mirrored(samples, run.volume)
    shape = check_latent_grid(run.volume, run.architecture)
    arrays = tuple(
        ArraySpec(
            name=name,
            sample_shape=shape,
            chunk_shape=shape,
            dimension_names=("subject", "c", "x", "y", "z"),
            dtype="float32",
        )
        for name in ("mean", "sigma")
    )
    plan = Plan(
        kind="latents",
        identity={
            "autoencoder": run.weights_sha256,
            "cohort": cohort_plan.fingerprint,
            **({"whitening": config.whitening} if config.whitening != 1 else {}),
            **({"mirror": True} if config.mirror else {}),
            **({} if bundle is None else {WHITENED_AS: bundle.digest}),
        },
        volume=run.volume,
        covariates=cohort_plan.covariates,
        arrays=arrays,
        num_samples=len(samples),
        samples_per_shard=config.samples_per_shard,
        samples_digest=table_digest(samples),
    )
    root = resolve_uri(config.output, "output")
    arguments = {
        "root": root,
        "plan": plan,
        "cohort_uri": cohort_uri,
        # Each node has its own copy of the bundled model.
        "autoencoder": config.autoencoder if config.autoencoder == SHIPPED_BUNDLE else str(file.parent),
        "runtime": config.runtime,
    }
    return Work(root, plan, samples, LatentEncoder, arguments)


def _with_mirrored(samples: pd.DataFrame, volume: VolumeSpec) -> pd.DataFrame:
    """Each training scan a second time, with `mirrored` true; raises UserError when the grid has no midline."""
    try:
        mirrored(np.zeros(volume.shape_xyz, np.uint8), volume)
    except ValueError as error:
        raise UserError(f"mirror: {error}") from None
    again = samples[samples["split"] == "train"].copy()
    again["sample_id"] += "mirrored"
    return pd.concat([samples.assign(mirrored=False), again.assign(mirrored=True)], ignore_index=True)


class LatentEncoder:
    """Encodes the scans of a shard."""

    def __init__(self, root: str, plan: Plan, cohort_uri: str, autoencoder: str, runtime: RuntimeConfig) -> None:
        self.plan, self.micro_batch = plan, MicroBatch(runtime.micro_batch)
        set_threads(runtime.threads_per_worker, runtime.workers)
        self.device = choose_device(runtime.gpus_per_worker > 0)
        run, file, _ = trained_autoencoder(autoencoder, plan.covariates, plan.identity["cohort"])
        self.network = build_autoencoder(run.architecture, run.covariates.context_size)
        load_weights(self.network, file)
        self.network.requires_grad_(False).eval().to(self.device)
        self._numbers = numbers_per_cell(self.network)
        self.cohort = open_dataset(cohort_uri)
        self.samples = read_samples(open_store(root), plan)
        self.place = {int(row): place for place, row in enumerate(self.cohort.rows)}

    @torch.no_grad()
    def make(self, shard: ShardSpec) -> ShardOutput:
        """Encode the scans of one shard: mean and sigma of each latent cell."""
        means, sigmas = empty_arrays(self.plan, shard)
        done = 0
        while done < shard.stop - shard.start:
            part = slice(done, min(done + self.micro_batch.size, shard.stop - shard.start))
            try:
                means[part], sigmas[part] = self.encode(range(shard.start + part.start, shard.start + part.stop))
            except Exception as error:
                self.micro_batch.shrink(error)
            else:
                done = part.stop
        ids = self.samples["sample_id"]
        records: list[SampleRecord] = [
            describe_sample(ids[shard.start + i], shard.start + i, [means[i], sigmas[i]]) for i in range(len(means))
        ]
        return ShardOutput([means, sigmas], records, describe(self.device))

    def encode(self, rows: range) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean and sigma of some rows."""
        x = torch.from_numpy(np.stack([self._scan(row) for row in rows]))[:, None].to(self.device)
        both = in_pieces(
            lambda part: torch.stack(self.network.encode(part), 1),
            x,
            self._numbers * math.prod(self.plan.arrays[0].sample_shape[1:]),
        )
        return both[:, 0].cpu().numpy(), both[:, 1].cpu().numpy()

    def _scan(self, row: int) -> npt.NDArray[np.float32]:
        sample = self.samples.iloc[row]
        scan = self.cohort.volume(self.place[int(sample["cohort_row"])])
        return mirrored(scan, self.plan.volume) if sample.get("mirrored", False) else scan


def whiten(root: str, config: EncodeConfig) -> LatentSpec:
    """Shift and scale of encoded latents, stored next to them: measured, or those of the bundle that encoded them."""
    store = open_store(root)
    plan = read_plan(store)
    bundle = trained_autoencoder(config.autoencoder, plan.covariates, plan.identity["cohort"]).bundle
    spec = measure_latents(root, config.whitening) if bundle is None else bundle.latents
    store.write(LATENTS_KEY, seal(spec))
    return spec


def measure_latents(root: str, whitening: float) -> LatentSpec:
    """Shift and scale per channel over the training split; see EncodeConfig.whitening.

    The variance counts what encoding adds by sampling: var(z) = var(mean) + E[sigma²].
    """
    means, sigmas = (open_dataset(root, split="train", array=name) for name in ("mean", "sigma"))
    count, total, square = 0, 0.0, 0.0
    for index in range(len(means)):
        mu, sigma = means.volume(index).astype(np.float64), sigmas.volume(index).astype(np.float64)
        count += mu[0].size
        total = total + mu.sum((1, 2, 3))
        square = square + (mu**2 + sigma**2).sum((1, 2, 3))
    shift = np.asarray(total) / count
    std = np.sqrt(np.maximum(np.asarray(square) / count - shift**2, 1e-12))
    scale = std**-whitening / np.sqrt(np.mean(std ** (2 - 2 * whitening)))
    x, y, z = means.volume(0).shape[1:]
    return LatentSpec(
        shape_cxyz=(len(shift), x, y, z), shift=tuple(float(s) for s in shift), scale=tuple(float(s) for s in scale)
    )


def read_latent_spec(store: Store) -> LatentSpec:
    """The stored shift and scale. Raises UserError when encoding has not finished."""
    try:
        return unseal(LatentSpec, store.read(LATENTS_KEY), f"{store.uri}/{LATENTS_KEY}")
    except FileNotFoundError:
        raise UserError(f"{store.uri} has no {LATENTS_KEY}; run `brainsynth encode-latents` (again)") from None
