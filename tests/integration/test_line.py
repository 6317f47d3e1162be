"""The whole line, small: what it leaves, and that its promises hold whoever runs it and however it dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainsynth import open_dataset
from brainsynth.config.schema import GenerateConfig
from brainsynth.errors import UserError
from brainsynth.manifest import MODEL_KEY, ModelRecord
from brainsynth.records import unseal
from brainsynth.stages import generate
from brainsynth.storage.commit import read_commit, read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from tests.line import Line, as_config, write_yaml

REPO = Path(__file__).parents[2]
# A voxel is stored on a grid of 2^-11; other batch sizes and thread counts may round it to the neighbouring step.
TOLERANCE = 2.0**-11


def records(root: Path) -> list[tuple[str, int, str]]:
    store = open_store(str(root))
    plan = read_plan(store)
    return [
        (sample.sample_id, index, sample.status)
        for index in range(plan.num_shards)
        for sample in read_commit(store, plan, index).samples
    ]


def run_generate(config: Path, **popen: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(REPO / "jobs" / "generate.py"), "--config", str(config)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,  # type: ignore[call-overload]
    )


def test_generated_dataset_is_whole_and_reported(generated: Path) -> None:
    report = verify_dataset(open_store(str(generated)))
    assert report.ok, report.summary()
    assert report.samples_ok == 12
    dataset = open_dataset(str(generated))
    assert len(dataset) == 12
    assert dataset[3]["image"].shape == (24, 32, 24)
    assert dataset.table["age"].between(18, 95).all()
    page = (generated / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 2
    assert "http://" not in page
    assert "https://" not in page
    model = unseal(ModelRecord, (generated / MODEL_KEY).read_bytes(), MODEL_KEY)
    assert (model.bundle, model.licence) == (read_plan(open_store(str(generated))).identity["bundle"], "Apache-2.0")
    assert (model.name, model.training_data) == ("tiny", "phantoms")


def test_same_plan_same_voxels_whoever_runs_it(line: Line, ray_cluster: None, tmp_path: Path) -> None:
    one = line.generate(tmp_path / "one", runtime={"workers": 1, "cpus_per_worker": 0.5, "micro_batch": 1})
    two = line.generate(tmp_path / "two", runtime={"workers": 2, "cpus_per_worker": 0.5, "micro_batch": 4})
    for number, config in enumerate((one, two)):
        (tmp_path / str(number)).mkdir()
        generate.run(as_config(config, GenerateConfig, tmp_path / str(number)))
    first, second = (open_dataset(str(tmp_path / name)) for name in ("one", "two"))
    assert records(tmp_path / "one") == records(tmp_path / "two")
    tables = [pd.read_parquet(tmp_path / name / "samples.parquet") for name in ("one", "two")]
    pd.testing.assert_frame_equal(*tables)
    assert first.manifest["plan_fingerprint"] == second.manifest["plan_fingerprint"]
    difference = np.abs(first.volumes() - second.volumes())
    assert difference.max() <= TOLERANCE
    assert np.abs(first.volume(0) - first.volume(1)).max() > 10 * TOLERANCE  # the subjects do differ


@pytest.mark.slow
def test_driver_killed_half_way_same_command_same_dataset(line: Line, tmp_path: Path) -> None:
    runtime = {"workers": 1, "cpus_per_worker": 0.5, "micro_batch": 1, "threads_per_worker": 1}
    changes = {"covariates": {"draw": 36}, "sampler": {"method": "ab2", "steps": 20}}
    undisturbed = tmp_path / "undisturbed"
    alone = {"workers": 0, "micro_batch": 1, "threads_per_worker": 1}
    generate.run(as_config(line.generate(undisturbed, **changes, runtime=alone), GenerateConfig, tmp_path))
    root = tmp_path / "killed"
    config = write_yaml(line.generate(root, **changes, runtime=runtime), tmp_path, "killed.yaml")
    process = run_generate(config, start_new_session=True)
    deadline = time.monotonic() + 240
    while len(list((root / "commits").glob("shard-*.json"))) < 4:
        assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in (root / "commits").glob("shard-*.json")}
    assert 4 <= len(before) < 12, "the kill came too late to test anything"
    assert not (root / "dataset.json").exists()
    again = run_generate(config)
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    resumed = re.search(r"resuming: (\d+) of 12 shards are committed", output)
    # An actor may outlive its driver by a moment and commit what it was making: that is kept too.
    assert resumed is not None
    assert len(before) <= int(resumed.group(1)) < 12
    after = {path.name: path.stat().st_mtime_ns for path in (root / "commits").glob("shard-*.json")}
    assert {name: after[name] for name in before} == before, "a committed shard was made again"
    assert open_dataset(str(root)).manifest["shards_digest"] == open_dataset(str(undisturbed)).manifest["shards_digest"]
    assert verify_dataset(open_store(str(root))).ok


def test_appending_rows_leaves_subjects_as_they_were(line: Line, tmp_path: Path) -> None:
    for name, draw in (("few", 4), ("more", 9)):
        (tmp_path / name).mkdir()
        config = line.generate(tmp_path / name / "data", covariates={"draw": draw})
        generate.run(as_config(config, GenerateConfig, tmp_path / name))
    few, more = (open_dataset(str(tmp_path / name / "data")) for name in ("few", "more"))
    pd.testing.assert_frame_equal(few.table, more.table.iloc[:4])
    assert np.abs(few.volumes() - more.volumes(range(4))).max() <= TOLERANCE


@pytest.mark.parametrize("codec", ["lz4", "zstd-1"])
def test_other_codecs_hold_the_same_voxels(line: Line, generated: Path, tmp_path: Path, codec: str) -> None:
    config = line.generate(tmp_path / codec, stored_codec=codec)
    generate.run(as_config(config, GenerateConfig, tmp_path))
    data = open_dataset(str(tmp_path / codec))
    np.testing.assert_array_equal(data.volumes(), open_dataset(str(generated)).volumes())
    assert f'"cname": "{codec.split("-")[0]}"' in (tmp_path / codec / "dataset.zarr" / "t1w" / "zarr.json").read_text()
    assert verify_dataset(open_store(str(tmp_path / codec))).ok
    with pytest.raises(UserError, match=r"arrays.*codec"):
        generate.run(as_config(config | {"stored_codec": "zstd-3"}, GenerateConfig, tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "uint16", "uint8"])
def test_other_stored_types_hold_the_same_pictures(line: Line, generated: Path, tmp_path: Path, dtype: str) -> None:
    other = tmp_path / dtype
    generate.run(as_config(line.generate(other, stored_dtype=dtype), GenerateConfig, tmp_path))
    assert np.abs(open_dataset(str(other)).volumes() - open_dataset(str(generated)).volumes()).max() <= 1 / 255
    assert verify_dataset(open_store(str(other))).ok
