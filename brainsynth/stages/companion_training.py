"""Train a labeller or a renderer, and make the copy of a bundle that has it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from brainsynth.bundle.companion import Companion
from brainsynth.bundle.files import bundle_folder, check_bundle_files, read_bundle
from brainsynth.bundle.recommended import RECOMMENDED_FILE
from brainsynth.bundle.renderer import COMPANIONS
from brainsynth.bundle.spec import BUNDLE_FILE, BundleSpec
from brainsynth.config.labelling import LabellerTrainConfig, RendererTrainConfig
from brainsynth.errors import UserError
from brainsynth.executors.ray_train import describe_training, train
from brainsynth.stages.companion import Planned
from brainsynth.stages.new_bundle import check_empty, new_bundle
from brainsynth.storage.filesystem import local_folder
from brainsynth.training.runner import Training

log = logging.getLogger(__name__)
Plan = Callable[..., Planned[Any]]
"""`plan_labeller` or `plan_renderer`."""
Config = LabellerTrainConfig | RendererTrainConfig


def train_companion(training: Training[Any, Any], config: Config, kind: Companion[Any], plan: Plan) -> None:
    """Train it, and make the copy of a bundle that has it where the config asks for one."""
    copy = _copy(training, config, kind)
    train(training, config)
    if copy is None:
        return
    source, bundle, folder = copy
    planned = plan(local_folder(config.output, "output"), folder, bundle.volume, half=True)
    if (folder / BUNDLE_FILE).exists():
        check_bundle_files(folder, bundle)
        planned.write(folder)
    else:
        with new_bundle(folder) as temporary:
            for name in (*bundle.weights, BUNDLE_FILE, RECOMMENDED_FILE):
                if name != RECOMMENDED_FILE or (source / name).is_file():
                    shutil.copyfile(source / name, temporary / name)
            for companion in COMPANIONS:
                companion.copy(source, temporary)
            planned.write(temporary)
    log.info("bundle with a %s: %s (digest %s, as before)", kind.name, folder, bundle.digest[:12])


def describe_companion(training: Training[Any, Any], config: Config, kind: Companion[Any]) -> str:
    """What that would do."""
    copy, inputs = _copy(training, config, kind), training.check(config)
    made = "" if copy is None else f"\na copy of bundle {copy[1].name} that has it → {copy[2]}"
    return f"{len(inputs.labels.labels)} structures: {inputs.labels.source}\n{describe_training(config)}{made}"


def _copy(training: Training[Any, Any], config: Config, kind: Companion[Any]) -> tuple[Path, BundleSpec, Path] | None:
    """(folder of the bundle, its record, folder of the copy) where the config asks for one.

    Raises UserError when the bundle is damaged or of another grid than the cohort, or the copy cannot go there.
    """
    if config.bundle is None or config.bundle_output is None:
        return None
    source, folder = bundle_folder(config.bundle), local_folder(config.bundle_output, "bundle_output")
    bundle = read_bundle(source)
    check_bundle_files(source, bundle)
    kind.check_grid(training.check(config).cohort.volume, bundle.volume)
    if folder in (source, local_folder(config.output, "output")):
        raise UserError(f"bundle_output: {folder} is also bundle or output; give another folder")
    if not (folder / BUNDLE_FILE).exists():
        check_empty(folder)
    elif read_bundle(folder).digest != bundle.digest:
        raise UserError(f"bundle_output: {folder} holds another bundle; give another folder")
    return source, bundle, folder
