"""The KubeRay files keep to KubeRay's schema and Kubernetes', and the check catches what a hand gets wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster.kuberay_schema import validate

KUBERAY = Path(__file__).parents[2] / "cluster" / "kuberay"
FILES = sorted(KUBERAY.glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_keeps_to_the_schema(path: Path) -> None:
    validate(read(path))


def job(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return spec


def workers(document: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return group


def container(document: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = workers(document)["template"]["spec"]["containers"][0]
    return first


MISTAKES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a misspelled key of the job": lambda d: job(d).update(backOffLimit=3),
    "a misspelled key of the cluster": lambda d: job(d)["rayClusterSpec"].update(authOption={"mode": "token"}),
    "a misspelled key of a group": lambda d: workers(d).update(maxReplica=3),
    "a key in the wrong place": lambda d: job(d).update(rayVersion="2.60.0"),
    "a missing key": lambda d: workers(d).pop("groupName"),
    "a wrong type": lambda d: workers(d).update(maxReplicas="64"),
    "a number where Ray wants text": lambda d: workers(d).update(rayStartParams={"num-cpus": 8}),
    "a negative count": lambda d: job(d).update(backoffLimit=-1),
    "a wrong choice": lambda d: job(d)["rayClusterSpec"]["authOptions"].update(mode="password"),
    "another wrong choice": lambda d: job(d).update(submissionMode="K8sMode"),
    "another version of the API": lambda d: d.update(apiVersion="ray.io/v1alpha1"),
    "a name with a capital": lambda d: d["metadata"].update(name="brainSynth"),
    "a name that is too long": lambda d: d["metadata"].update(name="b" * 48),
    "a time to live that nothing ends": lambda d: job(d).pop("shutdownAfterJobFinishes"),
    "a misspelled key of a pod": lambda d: workers(d)["template"]["spec"].update(toleration=[]),
    "a misspelled key of a container": lambda d: container(d).update(volumeMount=[]),
    "a wrong type in a container": lambda d: container(d).update(env={"A": "b"}),
    "a wrong type in a pod": lambda d: workers(d)["template"]["spec"].update(terminationGracePeriodSeconds="60"),
    "a misspelled secret": lambda d: container(d).update(envFrom=[{"secretref": {"name": "brainsynth-s3"}}]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_catches(mistake: str) -> None:
    document = read(KUBERAY / "rayjob-generate.yaml")
    wrong = copy.deepcopy(document)
    MISTAKES[mistake](wrong)
    assert wrong != document
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(wrong)
