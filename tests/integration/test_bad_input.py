"""Every user mistake: one clear error, exit code 2, nothing half-written."""

from __future__ import annotations

import contextlib
import io
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from brainsynth.bundle.files import read_bundle
from brainsynth.config.schema import GenerateConfig
from brainsynth.planning import plan_generation
from brainsynth.stages import generate
from tests.line import Line, as_config, write_yaml

REPO = Path(__file__).parents[2]


def run_job(name: str, config: dict[str, Any], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The job's own script, in this process: importing torch anew for each mistake would take the tests' time."""
    script = REPO / "jobs" / f"{name}.py"
    command = [str(script), "--config", str(write_yaml(config, folder)), *arguments]
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = command
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(command, int(left.value.code or 0), out.getvalue(), err.getvalue())


def test_a_misspelt_key_is_told_by_the_script_itself(line: Line, tmp_path: Path) -> None:
    config = line.generate(tmp_path / "generated")
    expected = misspelt(config, tmp_path)
    command = [sys.executable, str(REPO / "jobs/generate.py"), "--config", str(write_yaml(config, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def misspelt(config: dict[str, Any], folder: Path) -> str:
    config["sampler"]["guidence_scale"] = config["sampler"].pop("guidance_scale")
    return "did you mean 'guidance_scale'"


def out_of_range(config: dict[str, Any], folder: Path) -> str:
    rows = {"age": [300.0], "sex": ["F"], "ventricular_volume": [30.0], "brain_volume": [1200.0]}
    pd.DataFrame(rows).to_csv(folder / "rows.csv", index=False)
    config["covariates"] = {"table": str(folder / "rows.csv")}
    return "outside the training support"


def missing_column(config: dict[str, Any], folder: Path) -> str:
    pd.DataFrame({"age": [50.0], "sex": ["F"]}).to_csv(folder / "rows.csv", index=False)
    config["covariates"] = {"table": str(folder / "rows.csv")}
    return "missing columns ventricular_volume, brain_volume"


def zero_rows(config: dict[str, Any], folder: Path) -> str:
    columns = ["age", "sex", "ventricular_volume", "brain_volume"]
    pd.DataFrame({name: [] for name in columns}).to_csv(folder / "rows.csv", index=False)
    config["covariates"] = {"table": str(folder / "rows.csv")}
    return "no rows"


def wrong_digest(config: dict[str, Any], folder: Path) -> str:
    broken = folder / "bundle"
    shutil.copytree(config["bundle"], broken)
    weights = bytearray((broken / "diffusion.safetensors").read_bytes())
    weights[-1] ^= 1
    (broken / "diffusion.safetensors").write_bytes(weights)
    config["bundle"] = str(broken)
    return "is not the file that the bundle names"


def damaged_bundle_record(config: dict[str, Any], folder: Path) -> str:
    broken = folder / "bundle"
    shutil.copytree(config["bundle"], broken)
    text = (broken / "bundle.json").read_text()
    (broken / "bundle.json").write_text(text.replace('"high": 95.0', '"high": 96.0'))
    config["bundle"] = str(broken)
    return "does not match its own sha256"


def no_bundle(config: dict[str, Any], folder: Path) -> str:
    config["bundle"] = str(folder / "nowhere")
    return "or name the bundled model, t1w-2mm"


def unwritable(config: dict[str, Any], folder: Path) -> str:
    (folder / "file").write_text("in the way")
    config["output"] = str(folder / "file" / "generated")
    return "generated cannot be a folder"


def unknown_dtype(config: dict[str, Any], folder: Path) -> str:
    config["stored_dtype"] = "float15"
    return "stored_dtype"


def wrong_sampler(config: dict[str, Any], folder: Path) -> str:
    config["sampler"]["method"] = "ddim"
    return "does not fit a network that predicts 'flow'"


def too_many_workers(config: dict[str, Any], folder: Path) -> str:
    config["runtime"] = {"workers": 4, "cpus_per_worker": 1000.0}
    return "do not fit"


@pytest.mark.parametrize(
    "spoil",
    [
        misspelt,
        out_of_range,
        missing_column,
        zero_rows,
        wrong_digest,
        damaged_bundle_record,
        no_bundle,
        unwritable,
        unknown_dtype,
        wrong_sampler,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_generate_refuses(spoil: Callable[[dict[str, Any], Path], str], line: Line, tmp_path: Path) -> None:
    config = line.generate(tmp_path / "generated")
    expected = spoil(config, tmp_path)
    done = run_job("generate", config, tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "generated").exists()


def test_generate_refuses_a_layout_that_cannot_run(line: Line, tmp_path: Path) -> None:
    config = line.generate(tmp_path / "generated")
    expected = too_many_workers(config, tmp_path)
    done = run_job("generate", config, tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr


def test_generate_refuses_the_folder_of_another_plan(line: Line, generated: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in generated.rglob("*")}
    done = run_job("generate", line.generate(generated, base_seed=5), tmp_path)
    assert done.returncode == 2
    assert "holds another plan" in done.stderr
    assert "identity.base_seed: the folder has 0, this run asks for 5" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in generated.rglob("*")} == before


def test_empty_cells_are_told_before_anything_is_made(
    line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = {"age": [50.0, 60.0], "sex": ["F", None], "ventricular_volume": [30.0, None], "brain_volume": [1200.0] * 2}
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    config = line.generate(tmp_path / "generated", covariates={"table": str(tmp_path / "rows.csv")})
    samples = plan_generation(as_config(config, GenerateConfig, tmp_path)).samples
    assert "empty cells: sex in 1, ventricular_volume in 1 of 2 rows; drawn from the bundle's" in caplog.text
    spec = read_bundle(Path(config["bundle"]))
    assert not samples[list(spec.covariates.names)].isna().any(axis=None)
    assert samples["ventricular_volume"][0] == 30.0
    assert samples["extrapolated"].tolist() == spec.extrapolated(samples).tolist()


def test_a_run_says_what_it_begins(line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    root = tmp_path / "generated"
    generate.run(as_config(line.generate(root), GenerateConfig, tmp_path))
    assert f"making 12 volumes in 4 shards: {root}" in caplog.text
    assert "0 failed\n" in (root / "README.md").read_text()  # and no word of a rejects.tsv that is not there
    assert not (root / "rejects.tsv").exists()


def test_dry_run_writes_nothing(line: Line, tmp_path: Path) -> None:
    done = run_job("generate", line.generate(tmp_path / "generated"), tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "12 rows in 4 shards" in done.stdout
    assert not (tmp_path / "generated").exists()


def test_ctrl_c_while_the_command_starts_is_no_crash(tmp_path: Path) -> None:
    meets = tmp_path / "meets_ctrl_c.py"
    meets.write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'pydantic':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['brainsynth', 'verify', 'x']\n"
        "from brainsynth.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, str(meets)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_verify_command_exit_codes(generated: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "brainsynth", "verify"]
    good = subprocess.run([*command, str(generated)], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    shard = generated / "dataset.zarr/t1w/c/1/0/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    bad = subprocess.run([*command, str(generated)], capture_output=True, text=True)
    assert bad.returncode == 1
    assert "corrupt: dataset.zarr/t1w/c/1/0/0/0" in bad.stdout
    none = subprocess.run([*command, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert none.returncode == 2
    assert "is not a brainsynth dataset" in none.stderr
