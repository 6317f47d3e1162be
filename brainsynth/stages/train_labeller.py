"""Prepared cohort with label maps → labeller, and perhaps a copy of a bundle that has it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from brainsynth.bundle.files import bundle_folder, check_bundle_files, read_bundle
from brainsynth.bundle.labeller import check_labeller_grid, write_labeller
from brainsynth.bundle.recommended import RECOMMENDED_FILE
from brainsynth.bundle.spec import BUNDLE_FILE, BundleSpec
from brainsynth.config.labelling import LabellerTrainConfig
from brainsynth.errors import UserError
from brainsynth.executors.ray_train import describe_training, train
from brainsynth.stages.export_bundle import check_empty, new_bundle, plan_labeller
from brainsynth.storage.filesystem import local_folder
from brainsynth.training.labeller import TRAINING

log = logging.getLogger(__name__)


def run(config: LabellerTrainConfig) -> None:
    """Prepared cohort with label maps → labeller; harmless to repeat."""
    copy = _copy(config)
    train(TRAINING, config)
    if copy is None:
        return
    source, bundle, folder = copy
    labeller = plan_labeller(local_folder(config.output, "output"), folder, bundle.volume, half=True)
    if (folder / BUNDLE_FILE).exists():
        check_bundle_files(folder, bundle)
        write_labeller(folder, *labeller)
    else:
        with new_bundle(folder) as temporary:
            for name in (*bundle.weights, BUNDLE_FILE, RECOMMENDED_FILE):
                if name != RECOMMENDED_FILE or (source / name).is_file():
                    shutil.copyfile(source / name, temporary / name)
            write_labeller(temporary, *labeller)
    log.info("bundle with a labeller: %s (digest %s, as before)", folder, bundle.digest[:12])


def describe(config: LabellerTrainConfig) -> str:
    """What train-labeller would do."""
    copy, inputs = _copy(config), TRAINING.check(config)
    made = "" if copy is None else f"\na copy of bundle {copy[1].name} that has it → {copy[2]}"
    return f"{len(inputs.labels.labels)} structures: {inputs.labels.source}\n{describe_training(config)}{made}"


def _copy(config: LabellerTrainConfig) -> tuple[Path, BundleSpec, Path] | None:
    """(folder of the bundle, its record, folder of the copy) where the config asks for one.

    Raises UserError when the bundle is damaged or of another grid than the cohort, or the copy cannot go there.
    """
    if config.bundle is None or config.bundle_output is None:
        return None
    source, folder = bundle_folder(config.bundle), local_folder(config.bundle_output, "bundle_output")
    bundle = read_bundle(source)
    check_bundle_files(source, bundle)
    check_labeller_grid(TRAINING.check(config).cohort.volume, bundle.volume)
    if folder in (source, local_folder(config.output, "output")):
        raise UserError(f"bundle_output: {folder} is also bundle or output; give another folder")
    if not (folder / BUNDLE_FILE).exists():
        check_empty(folder)
    elif read_bundle(folder).digest != bundle.digest:
        raise UserError(f"bundle_output: {folder} holds another bundle; give another folder")
    return source, bundle, folder
