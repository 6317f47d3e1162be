"""A layout is judged node by node; a cluster that will grow may be waited for."""

from __future__ import annotations

import logging

import pytest

from brainsynth.config.schema import RuntimeConfig
from brainsynth.config.training import TrainRuntimeConfig
from brainsynth.errors import UserError
from brainsynth.executors import preflight


def test_a_worker_lives_on_one_node() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}]
    assert preflight._problem(4, {"CPU": 4.0, "GPU": 0.0}, nodes) == ""
    assert "4 fit (16 CPU there)" in preflight._problem(5, {"CPU": 4.0, "GPU": 0.0}, nodes)
    assert "1 fit" in preflight._problem(2, {"CPU": 8.0, "GPU": 0.0}, nodes)  # 16 CPUs in all, but on three nodes
    assert preflight._problem(2, {"CPU": 4.0, "GPU": 1.0}, nodes) == ""
    assert "2 fit" in preflight._problem(3, {"CPU": 1.0, "GPU": 1.0}, nodes)
    assert preflight._problem(7, {"CPU": 0.0, "GPU": 0.0}, nodes) == ""
    assert "0 fit" in preflight._problem(1, {"CPU": 1.0, "GPU": 0.0}, [])


@pytest.mark.parametrize(
    "runtime",
    [
        RuntimeConfig(workers=2, cpus_per_worker=4000),
        RuntimeConfig(workers=1, gpus_per_worker=4000),
        TrainRuntimeConfig(workers=4000, cpus_per_worker=1),
    ],
)
def test_this_machine_refuses_before_ray_starts(
    runtime: RuntimeConfig | TrainRuntimeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"do not fit.*lower runtime\.workers"):
        preflight.check_layout(runtime)
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")  # of a cluster nothing is known yet
    preflight.check_layout(runtime)


def test_no_ray_no_layout() -> None:
    preflight.check_layout(RuntimeConfig(workers=0, cpus_per_worker=4000))


def test_a_joined_cluster_refuses_or_waits(ray_cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    preflight.check_cluster(1, 0.5, 0.0, wait_for_nodes=False)
    with pytest.raises(UserError, match=r"on 1 node\(s\).*runtime\.wait_for_nodes"):
        preflight.check_cluster(4000, 1.0, 0.0, wait_for_nodes=False)
    with caplog.at_level(logging.WARNING):
        preflight.check_cluster(4000, 1.0, 0.0, wait_for_nodes=True)
    assert "waiting for nodes to join" in caplog.text
    assert "CPU" in preflight.resource_table()
    assert "alive" in preflight.resource_table()
