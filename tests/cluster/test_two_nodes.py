"""The jobs of cluster/kuberay, with a tiny model, on a Ray cluster of two nodes: no node can hold both workers."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import brainsynth
from brainsynth.storage.commit import committed_shards, read_commit, read_plan
from brainsynth.storage.filesystem import open_store
from tests.line import Line, write_yaml

REPO = Path(__file__).parents[2]
SPREAD = {"workers": 2, "cpus_per_worker": 0.6, "wait_for_nodes": True}


def script_of(job: str) -> str:
    """The script that a KubeRay job runs."""
    document = yaml.safe_load((REPO / "cluster" / "kuberay" / f"rayjob-{job}.yaml").read_text())
    return str(REPO / shlex.split(document["spec"]["entrypoint"])[1])


def run(*commands: list[str]) -> subprocess.CompletedProcess[str]:
    """On a new cluster, which is gone afterwards."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(REPO), "RAY_raylet_start_wait_time_s": "120", "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-m", "tests.chaos.two_nodes", *map(shlex.join, commands)]
    return subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_training_and_a_generation_that_is_resumed(line: Line, tmp_path: Path) -> None:
    training: dict[str, Any] = line.autoencoder(str(tmp_path / "autoencoder"), steps=4, validate_every=4)
    training["runtime"] = {**SPREAD, "threads_per_worker": 1, "trackers": []}
    data = tmp_path / "data"
    generation = line.generate(data, runtime={**SPREAD, "micro_batch": 3}, samples_per_shard=2)
    train = [sys.executable, script_of("train"), "--config", str(write_yaml(training, tmp_path, "train.yaml"))]
    generate = [
        sys.executable,
        script_of("generate"),
        "--config",
        str(write_yaml(generation, tmp_path, "generate.yaml")),
    ]

    first = run(train, generate)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-4000:]
    curve = [json.loads(text) for text in (tmp_path / "autoencoder" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve if "train/loss" in row] == [1, 2, 3, 4]
    store = open_store(str(data))
    plan = read_plan(store)
    assert committed_shards(store) == set(range(6))
    commits = [read_commit(store, plan, shard) for shard in range(6)]
    assert len({commit.runtime["pid"] for commit in commits}) == 2  # a worker on each node
    volumes = [np.asarray(brainsynth.open_dataset(str(data))[row]["image"]) for row in range(12)]

    # The cluster is gone, and with it two shards: the same command on a new one makes just these.
    for shard in (1, 4):
        (data / "commits" / f"shard-{shard:06d}.json").unlink()
    (data / "dataset.json").unlink()
    second = run(generate)
    assert second.returncode == 0, second.stdout[-4000:] + second.stderr[-4000:]
    again = [read_commit(store, plan, shard) for shard in range(6)]
    assert [shard for shard in range(6) if again[shard] != commits[shard]] == [1, 4]
    for row, volume in enumerate(volumes):
        found = np.asarray(brainsynth.open_dataset(str(data))[row]["image"])
        assert np.abs(found - volume).max() <= 2**-11
