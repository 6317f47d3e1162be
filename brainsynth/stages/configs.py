"""`brainsynth configs`: the example configs of the package."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import brainsynth
from brainsynth.errors import UserError
from brainsynth.storage.filesystem import local_folder


def examples() -> Path:
    """The folder of the examples: in the package where it was installed, else in the checkout."""
    package = Path(brainsynth.__file__).parent
    packaged = package / "example_configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def command(arguments: argparse.Namespace) -> int:
    """Lists the examples, shows the files of one, or copies them."""
    names = sorted(path.name for path in examples().iterdir() if path.is_dir())
    if arguments.name is None:
        if arguments.output is not None:
            raise UserError(f"--output: name the example to write: one of {', '.join(names)}")
        for name in names:
            print(f"{name}: {', '.join(file.name for file in sorted((examples() / name).iterdir()))}")
        return 0
    if arguments.name not in names:
        raise UserError(f"there is no example {arguments.name!r}; there are {', '.join(names)}")
    source = examples() / arguments.name
    if arguments.output is None:
        for file in sorted(source.iterdir()):
            print(f"# {file.name}\n{file.read_text(encoding='utf-8')}")
        return 0
    folder = local_folder(arguments.output, "--output")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output: {folder} is there already and not empty; give a new folder")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for file in sorted(folder.iterdir()):
        print(file)
    return 0
