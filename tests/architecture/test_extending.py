"""CONTRIBUTING.md is followed in a copy of the package: a toy sampler and a toy export, in no other files than it names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
DATASET = REPO / "tests" / "stored" / "v1" / "dataset"


class Copy:
    """A copy of the package, and which of its files were changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.changed: set[str] = set()
        shutil.copytree(
            REPO / "brainsynth", root / "brainsynth", ignore=shutil.ignore_patterns("__pycache__", "t1w-2mm")
        )

    def replace(self, file: str, old: str, new: str) -> None:
        text = (self.root / file).read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
        (self.root / file).write_text(text.replace(old, new))
        self.changed.add(file)

    def write(self, file: str, text: str, append: bool = False) -> None:
        before = (self.root / file).read_text() if append else ""
        (self.root / file).write_text(before + textwrap.dedent(text))
        self.changed.add(file)

    def python(self, *words: str) -> str:
        """What Python prints when it uses the copy."""
        environment = os.environ | {"PYTHONPATH": str(self.root)}
        done = subprocess.run([sys.executable, *words], cwd=self.root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path / "copy")


def named_files(what: str) -> set[str]:
    """The files that CONTRIBUTING.md names for an extension, the new file as NAME."""
    text = (REPO / "CONTRIBUTING.md").read_text()
    part = re.search(rf"^\*\*{what}\.\*\*(.+?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert part, what
    return set(re.findall(r"^\d\. `([^`]+)`", part[1], re.MULTILINE))


def test_every_package_is_in_its_table() -> None:
    rows = re.findall(r"^\| `([a-z_ ]+)` \|", (REPO / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    there = {path.stem for path in (REPO / "brainsynth").glob("[!_.]*") if path.is_dir() or path.suffix == ".py"}
    assert {name for row in rows for name in row.split()} == there


def test_every_file_that_it_names_is_there() -> None:
    text = (REPO / "CONTRIBUTING.md").read_text()
    named = [name for name in re.findall(r"^\d\. `([^`]+)`", text, re.MULTILINE) if "NAME" not in name]
    assert len(named) >= 10
    assert [name for name in named if not (REPO / name).is_file()] == []


def test_a_sampler(copy: Copy) -> None:
    copy.write(
        "brainsynth/models/solvers.py",
        '''

        def one_jump(predict: Predict, x: Tensor, schedule: NoiseSchedule, times: Float64s) -> Tensor:
            """From noise to latents by one evaluation."""
            return x - predict(x, _network_time(schedule, times[0]))
        ''',
        append=True,
    )
    rules = "brainsynth/models/sampler_rules.py"
    copy.replace(rules, "import Predict, StepNoise, ddim,", "import Predict, StepNoise, one_jump, ddim,")
    entry = '    "jump": Method(_FLOW, _times, lambda run: one_jump(run.predict, run.noise, run.schedule, run.grid)),\n'
    copy.replace(rules, "METHODS = {\n", "METHODS = {\n" + entry)
    copy.replace("brainsynth/config/schema.py", '"heun", "ab2"]', '"heun", "ab2", "jump"]')
    assert copy.changed == named_files("A sampler")

    code = """
        import torch
        from brainsynth.config.schema import SamplerConfig
        from brainsynth.config.training import ScheduleConfig
        from brainsynth.models.sampling import sample_latents
        from brainsynth.models.schedule import NoiseSchedule
        from brainsynth.records import from_dict

        sampler = from_dict(SamplerConfig, {"method": "jump", "steps": 1}, "a config")
        noise = torch.ones(2, 1, 2, 2, 2)
        made = sample_latents(lambda x, t: x / 4, noise, NoiseSchedule(ScheduleConfig(prediction="flow")), sampler)
        print(float(made.mean()), made.shape == noise.shape)
    """
    assert copy.python("-c", textwrap.dedent(code)).split() == ["0.75", "True"]


def test_an_export(copy: Copy, tmp_path: Path) -> None:
    copy.write(
        "brainsynth/export/npy.py",
        '''
        """NumPy: one float32 .npy per volume."""

        from pathlib import Path

        import numpy as np

        from brainsynth.export.file_format import FileFormat


        def _write(path: Path, volumes) -> None:
            (volume,) = volumes
            with path.open("wb") as file:
                np.save(file, volume.image)


        FORMAT = FileFormat(path="sub-{id}_T1w.npy", about="`sub-<id>_T1w.npy`: float32 NumPy", write=_write)
        ''',
    )
    formats = "brainsynth/export/formats.py"
    copy.replace(formats, "import dicom, nifti,", "import dicom, npy, nifti,")
    copy.replace(formats, '    "nifti": nifti.FORMAT,\n', '    "nifti": nifti.FORMAT,\n    "npy": npy.FORMAT,\n')
    copy.replace("brainsynth/config/schema.py", '"webdataset"]', '"webdataset", "npy"]')
    assert {name.replace("npy.py", "NAME.py") for name in copy.changed} == named_files("An export")

    output = tmp_path / "exported"
    copy.python("-m", "brainsynth", "export", str(DATASET), "--to", "npy", "--output", str(output))
    code = f"""
        import brainsynth, numpy, pathlib
        dataset = brainsynth.open_dataset({str(DATASET)!r})
        for sample in (dataset[i] for i in range(len(dataset))):
            file = pathlib.Path({str(output)!r}) / f"sub-{{sample['sample_id']}}_T1w.npy"
            assert numpy.array_equal(numpy.load(file), sample["image"])
        print(len(dataset))
    """
    assert int(copy.python("-c", textwrap.dedent(code))) > 2
