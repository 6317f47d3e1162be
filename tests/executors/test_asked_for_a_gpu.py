"""A GPU that was asked for and cannot be used is an error, whoever asks; a plan for GPUs needs none to be checked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from brainsynth.errors import UserError
from brainsynth.models import device, driver
from brainsynth.stages.jobs import JOBS
from tests.line import Line, write_yaml

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
NAMED = ("cannot use one here: its CUDA", "NVIDIA driver 580 or newer", "no NVIDIA driver was found here")


def test_the_error_names_cuda_and_both_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        device.choose_device(use_gpu=True)
    assert all(words in str(caught.value) for words in NAMED)
    monkeypatch.setattr(driver, "nvidia_driver", lambda: "535.104.05")
    assert "the driver found here is 535.104.05" in device.why_no_gpu()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA (the driver found here is 535.104.05)" in device.why_no_gpu()


def test_the_driver_is_read_from_nvidia_smi_or_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_LOADED", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver.nvidia_driver() is None
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\n")
    assert driver.nvidia_driver() == "570.86.15"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    tool.chmod(0o755)
    assert driver.nvidia_driver() == "580.65.06"
    assert driver.needed_driver("12.8") == "an NVIDIA driver 525 or newer"
    assert driver.needed_driver("99.0") == "a recent NVIDIA driver"


def configs(line: Line, folder: Path) -> dict[str, dict[str, Any]]:
    out = str(folder / "out")
    return {
        "train-autoencoder": line.autoencoder(out),
        "encode-latents": line.latents() | {"output": out},
        "train-diffusion": line.diffusion(out),
        "distill-decoder": line.distillation(out),
        "distill-steps": line.step_distillation(out),
        "generate": line.generate(out),
    }


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("job", ["train-autoencoder", "encode-latents", "train-diffusion", "generate"])
def test_jobs_refuse_before_anything_is_written(line: Line, tmp_path: Path, job: str, workers: int) -> None:
    from brainsynth.config.load import load_config
    from brainsynth.stages.jobs import run_job

    config = configs(line, tmp_path)[job]
    asked = {"use_gpu": True} if job.startswith("train") else {"gpus_per_worker": 1}
    config["runtime"] = {**config["runtime"], **asked, "workers": workers}
    with pytest.raises(UserError) as caught:
        run_job(job, load_config(write_yaml(config, tmp_path), JOBS[job].config))
    assert all(words in str(caught.value) for words in NAMED)
    assert not (tmp_path / "out").exists()


def test_a_command_ends_with_code_2_at_once(line: Line, tmp_path: Path) -> None:
    config = line.generate(tmp_path / "out", runtime={"workers": 0, "gpus_per_worker": 1})
    command = [sys.executable, "-m", "brainsynth", "generate", "--config", str(write_yaml(config, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert all(words in done.stderr for words in NAMED)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_for_gpus_times_no_cpu(line: Line, tmp_path: Path) -> None:
    runtime = {"workers": 64, "gpus_per_worker": 1, "wait_for_nodes": True}
    config = line.generate(tmp_path / "out", runtime=runtime, covariates={"draw": 20_000})
    command = [
        sys.executable,
        "-m",
        "brainsynth",
        "generate",
        "--config",
        str(write_yaml(config, tmp_path)),
        "--dry-run",
    ]
    environment = {**os.environ, "RAY_ADDRESS": "head:6379"}
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    print(f"dry run of a plan for 64 GPUs: {time.monotonic() - began:.1f} s")
    assert done.returncode == 0, done.stderr
    assert "64 workers" in done.stdout
    assert "no estimate of the time" in done.stdout


RAY_COUNTS_A_GPU = """
import os, sys, time
import ray
from brainsynth.config.job import guarded
from brainsynth.config.load import load_config
from brainsynth.executors.session import _private_token
from brainsynth.stages.jobs import JOBS, stage
_private_token()
ray.init(address="local", num_gpus=1, num_cpus=2, logging_level="WARNING", dashboard_host="127.0.0.1")
os.environ["RAY_ADDRESS"] = "auto"  # as on a cluster: this process need not have what its workers have
for job, path in (("generate", sys.argv[1]), ("train-autoencoder", sys.argv[2])):
    began = time.monotonic()
    code = guarded(lambda: stage(job).run(load_config(path, JOBS[job].config)))
    print(f"{job} ended with code {code} after {time.monotonic() - began:.1f} s", flush=True)
"""


@pytest.mark.slow
def test_workers_on_a_machine_whose_driver_is_too_old_end_the_job(line: Line, tmp_path: Path) -> None:
    """Ray counts GPUs by itself, so such a machine gets work."""
    generate = line.generate(tmp_path / "made", runtime={"workers": 1, "gpus_per_worker": 1, "cpus_per_worker": 0.5})
    training = line.autoencoder(str(tmp_path / "trained"))
    training["runtime"] = {"workers": 1, "use_gpu": True, "cpus_per_worker": 0.5, "trackers": []}
    paths = [str(write_yaml(c, tmp_path, f"{n}.yaml")) for n, c in (("generate", generate), ("train", training))]
    command = [sys.executable, "-c", RAY_COUNTS_A_GPU, *paths]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    print(done.stdout)
    for job in ("generate", "train-autoencoder"):
        assert f"{job} ended with code 2" in done.stdout, done.stdout + done.stderr[-3000:]
    errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) == 2, done.stderr
    assert all(words in error for words in NAMED for error in errors)
    assert not list((tmp_path / "made").glob("commits/*"))


def test_threads_are_those_that_were_reserved_or_may_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from brainsynth.models import cpus

    monkeypatch.setattr(cpus, "_QUOTA_V2", tmp_path / "none")
    monkeypatch.setattr(cpus, "_QUOTA_V1", (tmp_path / "none", tmp_path / "none"))
    monkeypatch.setattr(cpus, "_reserved", 0.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    assert cpus.threads_of_worker(0) == 24
    assert cpus.threads_of_worker(8) == 3
    cpus.reserve(6)
    assert cpus.threads_of_worker(64) == 6, "64 workers are on many machines"
    (tmp_path / "max").write_text("400000 100000\n")
    monkeypatch.setattr(cpus, "_QUOTA_V2", tmp_path / "max")
    assert cpus.threads_of_worker(64) == 4
    (tmp_path / "max").write_text("max 100000\n")
    assert cpus.threads_of_worker(64) == 6
    cpus.reserve(0.5)
    assert cpus.threads_of_worker(64) == 1
