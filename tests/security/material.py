"""Good things to spoil: a bundle of untrained networks, a training's state, a small scan, records with a right digest."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from brainsynth.bundle.spec import AUTOENCODER_FILE, BUNDLE_FILE, DIFFUSION_FILE, BundleSpec, LatentSpec
from brainsynth.config.architectures import AutoencoderArchitecture, DenoiserArchitecture, DiffusionArchitecture
from brainsynth.config.training import ScheduleConfig
from brainsynth.covariates.distribution import fit_distribution
from brainsynth.models.autoencoder import build_autoencoder
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.weights import save_weights
from brainsynth.records import canonical_json, seal
from brainsynth.storage.filesystem import open_store
from brainsynth.training.ema import Ema
from brainsynth.training.state import TrainingState
from tests.conftest import GRID
from tests.storage.conftest import SCHEMA, tiny_plan, write_dataset

DENOISER = DiffusionArchitecture(
    channels=(4, 4), attention=(False, True), head_channels=4, num_res_blocks=1, norm_groups=4
)


def sealed(body: Any) -> bytes:
    """Any JSON with a right digest of its own: an attacker can count too."""
    return json.dumps({"sha256": hashlib.sha256(canonical_json(body)).hexdigest(), "record": body}).encode()


def reseal(file: Path, change: Any) -> None:
    """Change a sealed record and give it a right digest."""
    body = json.loads(file.read_bytes())["record"]
    change(body)
    file.write_bytes(sealed(body))


def write_bundle(folder: Path, denoiser: DenoiserArchitecture = DENOISER) -> Path:
    """A whole bundle of tiny untrained networks."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    architecture = AutoencoderArchitecture(channels=(4, 4), latent_channels=1, num_res_blocks=1, norm_groups=4)
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"age": rng.uniform(20, 80, 60), "sex": rng.choice(["F", "M"], 60)})
    weights = {
        AUTOENCODER_FILE: save_weights(build_autoencoder(architecture), folder / AUTOENCODER_FILE),
        DIFFUSION_FILE: save_weights(Denoiser(denoiser, 1, SCHEMA.context_size), folder / DIFFUSION_FILE),
    }
    spec = BundleSpec(
        name="untrained",
        autoencoder=architecture,
        diffusion=denoiser,
        schedule=ScheduleConfig(prediction="v"),
        latents=LatentSpec(shape_cxyz=(1, 4, 4, 4), shift=(0.0,), scale=(1.0,)),
        covariates=SCHEMA,
        distribution=fit_distribution(table, SCHEMA, "the table"),
        volume=GRID,
        weights=weights,
        licence="none",
        training_data="nothing",
        provenance={},
    )
    (folder / BUNDLE_FILE).write_bytes(seal(spec))
    return folder


def small_state() -> TrainingState:
    """What a training of one linear layer would resume."""
    module = torch.nn.Linear(2, 1)
    return TrainingState({"net": module}, {"net": Ema(module, 0.9)}, {"net": torch.optim.Adam(module.parameters())})


def write_small_dataset(folder: Path) -> Path:
    """A finished dataset of seven rows."""
    write_dataset(open_store(str(folder)), *tiny_plan())
    return folder


def nifti(shape: tuple[int, ...] = GRID.shape_xyz, **fields: Any) -> bytes:
    """A NIfTI-1 file of a bright box in the dark, with header fields that may be changed to lies."""
    voxels = np.zeros(GRID.shape_xyz, np.int16)
    voxels[5:15, 6:20, 5:15] = np.arange(10, dtype=np.int16)[:, None, None] + 100
    raw = bytearray(nib.Nifti1Image(voxels, GRID.affine).to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    if shape != GRID.shape_xyz:
        header["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.binaryblock
    return bytes(raw)


def zipped_zeros(mib: int, head: bytes = b"") -> bytes:
    """A gzip of `head` and then zeros: a thousandth of their size. Made of many equal members, so quick to make."""
    piece = gzip.compress(bytes(8 << 20), 9)
    return gzip.compress(head) + piece * (mib // 8)
