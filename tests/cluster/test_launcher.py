"""The launcher file is what Ray's own launcher takes, and its machines what EC2 takes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

REPO = Path(__file__).parents[2]
FILE = REPO / "cluster" / "launcher" / "aws.yaml"


def read() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return document


def validate(document: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does before it asks AWS for anything; gives the config with the defaults filled in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(document))
    validate_config(prepared)
    return prepared


@pytest.fixture(scope="module")
def run_instances() -> Callable[[dict[str, Any]], None]:
    """Checks what is asked of EC2 against AWS's own model of its API, where boto3 is installed."""
    pytest.importorskip("botocore", reason="boto3 is not locked: it wants an older python-dateutil")
    import botocore.session
    from botocore.validate import validate_parameters

    shape = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape

    def check(machine: dict[str, Any]) -> None:
        validate_parameters({"MinCount": 1, "MaxCount": 1, **machine}, shape)
        if machine["InstanceType"] not in shape.members["InstanceType"].enum:
            raise ValueError(f"EC2 has no {machine['InstanceType']}")

    return check


def test_ray_takes_it_and_fills_in_nothing_that_runs() -> None:
    document, prepared = read(), validate(read())
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert name in document
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert prepared[name] == document[name]
    wheels = [command for command in prepared["setup_commands"] if "ray-wheels" in command]
    assert not wheels  # Ray's defaults install a nightly build


def test_machines_are_what_ec2_takes(run_instances: Callable[[dict[str, Any]], None]) -> None:
    for kind in read()["available_node_types"].values():
        run_instances(kind["node_config"])


def test_gpu_machines_are_spot_come_when_asked_and_go_when_idle() -> None:
    document = read()
    kinds = document["available_node_types"]
    assert all("ImageId" in kind["node_config"] for kind in kinds.values())  # Ray's default has Python 3.6
    assert kinds["gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert kinds["gpu"]["min_workers"] == 0
    assert kinds[document["head_node_type"]]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in kinds[document["head_node_type"]]["node_config"]
    assert 0 < document["idle_timeout_minutes"] <= 15


def test_what_it_copies_is_there_and_no_secret_stands_in_it() -> None:
    document, text = read(), FILE.read_text()
    local = [Path(path) for path in document["file_mounts"].values()]
    assert all((REPO / path).is_file() for path in local if not str(path).startswith("~"))
    assert any("-r ~/brainsynth/requirements.lock" in command for command in document["setup_commands"])
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in document[name][-1]
    assert not re.search(r"AKIA|ASIA|(?i:secret_access_key|auth_token=)|[0-9a-f]{32}", text)


MISTAKES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a misspelled key": lambda d: d.update(idle_timeout_minute=5),
    "a wrong type": lambda d: d.update(max_workers="8"),
    "a misspelled key of a machine": lambda d: d["available_node_types"]["gpu"].update(max_worker=3),
    "resources of a wrong type": lambda d: d["available_node_types"]["head"].update(resources={"CPU": "0"}),
    "a head that is not there": lambda d: d.update(head_node_type="Head"),
    "more machines than allowed": lambda d: d["available_node_types"]["gpu"].update(min_workers=9),
    "a misspelled key of auth": lambda d: d["auth"].update(user="ubuntu"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_catches(mistake: str) -> None:
    wrong = read()
    MISTAKES[mistake](wrong)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate(wrong)


WRONG_MACHINES = [
    {"InstanceMarketOption": {"MarketType": "spot"}},
    {"IamInstanceProfile": "brainsynth"},
    {"InstanceType": "g6e.3xlarge"},
]


@pytest.mark.parametrize("wrong", WRONG_MACHINES, ids=lambda wrong: next(iter(wrong)))
def test_catches_what_ec2_does_not_take(wrong: dict[str, Any], run_instances: Callable[[dict[str, Any]], None]) -> None:
    machine = {**read()["available_node_types"]["gpu"]["node_config"], **wrong}
    with pytest.raises(Exception, match=r"Unknown parameter|Invalid type|EC2 has no"):
        run_instances(machine)
