"""The feature network of an evaluation: the user's file, or an embedder trained here on the reference's training split."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from pathlib import Path

import numpy as np

from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.instruments.alignment import to_working_grid, working_grid
from brainsynth.instruments.feature_network import FeatureNetwork
from brainsynth.instruments.measurement import open_volumes, weights_file
from brainsynth.models.device import choose_device
from brainsynth.models.embedder import load_embedder, save_embedder
from brainsynth.models.medicalnet import load_medicalnet
from brainsynth.records import digest, to_dict
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store, resolve_uri
from brainsynth.storage.whole_file import file_sha256
from brainsynth.training.embedder import EmbedderTraining, train_embedder

log = logging.getLogger(__name__)
MOST_SCANS = 1000
"""Training scans that an embedder sees at most, drawn at random: they are in memory together."""


def feature_network(config: EvaluateConfig, make: bool) -> FeatureNetwork | None:
    """The network that the config asks for; None where it asks for none. The file is read once to see that it fits.

    Args:
        make: train an embedder that is needed and not there yet, and store it in the output; else only name it.

    Raises:
        UserError: a file is missing, damaged or of another network; or the reference cannot train one.
    """
    options = config.features
    if options is None:
        return None
    cpu = choose_device(False)
    if options.medicalnet is not None:
        path = Path(weights_file(options.medicalnet, "features.medicalnet"))
        load_medicalnet(path, cpu)
        return _given("medicalnet", path)
    if options.embedder is not None:
        path = Path(weights_file(options.embedder, "features.embedder"))
        load_embedder(path, cpu)
        return _given("embedder", path)
    return _trained(config, EmbedderTraining(steps=options.steps), make)


def _given(kind: str, path: Path) -> FeatureNetwork:
    file = path.resolve()
    return FeatureNetwork(kind=kind, folder=str(file.parent), key=file.name, sha256=file_sha256(file))  # type: ignore[arg-type]


def _trained(config: EvaluateConfig, training: EmbedderTraining, make: bool) -> FeatureNetwork:
    reference = open_volumes(config.reference, "reference", split="train")
    recipe = digest_of(reference.manifest["shards_digest"], training)
    folder, key = resolve_uri(config.output, "output"), f"embedder-{recipe[:12]}.safetensors"
    store = open_store(folder)
    try:
        data = store.read(key)
    except FileNotFoundError:
        if not make:
            return FeatureNetwork(kind="embedder", folder=folder, key=key, sha256="to be trained")
        chosen = np.random.default_rng(0).permutation(len(reference))[:MOST_SCANS]
        grid = read_plan(open_store(reference.uri)).volume
        log.info("features: training an embedder on %d scans, %d steps", len(chosen), training.steps)
        scans = np.stack([to_working_grid(reference.volume(int(i)), grid) for i in chosen])
        embedder = train_embedder(scans, working_grid(grid).spacing_mm, training, choose_device(False))
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / key
            save_embedder(embedder, file)
            data = file.read_bytes()
        store.write(key, data)
    return FeatureNetwork(kind="embedder", folder=folder, key=key, sha256=hashlib.sha256(data).hexdigest())


def digest_of(scans: str, training: EmbedderTraining) -> str:
    """What decides the weights of an embedder that is trained here."""
    return digest({"scans": scans, "most_scans": MOST_SCANS, "training": to_dict(training)})
