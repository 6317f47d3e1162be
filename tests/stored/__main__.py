"""`python -m tests.stored`: stores a bundle and a dataset in today's formats, once per version of the records.

A format changed, so `records.SCHEMA_VERSION` was raised: this makes the next folder `v…`. Those that are there are never
made again: what an earlier brainsynth wrote is what they are for.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from brainsynth import open_dataset
from brainsynth.bundle.files import read_bundle
from brainsynth.cohort.phantom_cohort import write_phantom_cohort
from brainsynth.config.schema import EncodeConfig, ExportConfig, GenerateConfig, PrepareConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from brainsynth.records import SCHEMA_VERSION
from brainsynth.stages import (
    encode_latents,
    export_bundle,
    generate,
    prepare_cohort,
    train_autoencoder,
    train_diffusion,
)
from tests.line import GRID, Line, as_config

EXPECTED, REPORTS = "expected.json", ("report.html", "report.json")
PATCHES = {"kind": "patch", "patch": 4, "latent_channels": 4, "width": 8, "blocks": 1}
VOXEL = (12, 16, 12)
"""One voxel within the brain, of which each volume's intensity is noted."""


def make(folder: Path, scratch: Path) -> None:
    """The bundle of a tiny line for small cohorts, six rows that it generated, and the figures that a reader must find."""
    line = Line(scratch)
    write_phantom_cohort(scratch / "phantoms", 32, 3, GRID)
    prepare_cohort.run(as_config(line.prepare(), PrepareConfig, scratch))
    autoencoder = line.autoencoder() | {"architecture": PATCHES}
    autoencoder["losses"] |= {"kl_weight": 0.0, "square_weight": 1.0}
    train_autoencoder.run(as_config(autoencoder, AutoencoderTrainConfig, scratch))
    encode_latents.run(as_config(line.latents(), EncodeConfig, scratch))
    train_diffusion.run(as_config(line.diffusion(kind="gaussian"), DiffusionTrainConfig, scratch))
    export_bundle.run(as_config(line.bundle() | {"weights": "float16"}, ExportConfig, scratch))
    rows = {"covariates": {"draw": 6}, "samples_per_shard": 3}
    generate.run(as_config(line.generate(scratch / "dataset", **rows), GenerateConfig, scratch))
    for report in REPORTS:
        (scratch / "dataset" / report).unlink()
    for part in ("bundle", "dataset"):
        shutil.copytree(scratch / part, folder / part)
    (folder / EXPECTED).write_text(json.dumps(expected(folder), indent=1) + "\n")


def expected(folder: Path) -> dict[str, Any]:
    """What is in the folder, by the code that wrote it."""
    dataset = open_dataset(str(folder / "dataset"))
    rows = [dataset.facts(index) for index in range(len(dataset))]
    return {
        "bundle": read_bundle(folder / "bundle").digest,
        "plan": dataset.manifest["plan_fingerprint"],
        "shards": dataset.manifest["shards_digest"],
        "schemas": {
            path.relative_to(folder).as_posix(): json.loads(path.read_text())["schema"]
            for path in sorted(folder.rglob("*.json"))
            if "sha256" in json.loads(path.read_text())
        },
        "affine": dataset.affine.tolist(),
        "covariates": [{name: value for name, value in row.items() if name != "affine"} for row in rows],
        "voxels": [hashlib.sha256(dataset.stored(index).tobytes()).hexdigest() for index in range(len(dataset))],
        "intensities": [float(dataset.volume(index)[VOXEL]) for index in range(len(dataset))],
    }


if __name__ == "__main__":
    target = Path(__file__).parent / f"v{SCHEMA_VERSION}"
    if target.exists():
        sys.exit(f"{target} is there, and stays as it was written; raise records.SCHEMA_VERSION when a format changes")
    platform.node = lambda: "somewhere"  # the fixture is published: no machine's name in its records
    with tempfile.TemporaryDirectory() as scratch:
        make(target, Path(scratch))
