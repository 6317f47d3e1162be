"""What KubeRay 1.7 lets a RayJob and a RayCluster say, as a JSON schema, and Kubernetes' own for the pod templates in them.

Written by hand after the operator's API (`ray.io/v1`: rayjob_types.go and raycluster_types.go); no package carries its
resource definitions. It holds the fields that these files use or are likely to use, and refuses every other, so a new field
is added here first. The API server itself would drop a field that it does not know without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES = "1.34"
"""The pod templates are judged as this version has them; what we use is older than KubeRay's oldest."""
Schema = dict[str, Any]


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


STRING: Schema = {"type": "string", "minLength": 1}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
AT_LEAST_ONE: Schema = {**COUNT, "minimum": 1}
NUMBER: Schema = {"type": "number", "minimum": 0}
STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
POD_TEMPLATE: Schema = _object(("spec",), metadata={"type": "object"}, spec={"type": "object"})
CONTAINER_PARTS: Schema = {"type": "array", "items": {"type": "object"}}
AUTH = _object(mode=_one_of("disabled", "token"), secretName=STRING, enableK8sTokenAuth=BOOLEAN)
AUTOSCALER = _object(
    version=_one_of("v1", "v2"),
    upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=COUNT,
    image=STRING,
    imagePullPolicy=_one_of("Always", "IfNotPresent", "Never"),
    resources={"type": "object"},
    env=CONTAINER_PARTS,
    envFrom=CONTAINER_PARTS,
)
HEAD = _object(
    ("template",),
    template=POD_TEMPLATE,
    rayStartParams=STRINGS,
    serviceType=_one_of("ClusterIP", "NodePort", "LoadBalancer"),
    enableIngress=BOOLEAN,
    resources=STRINGS,
    labels=STRINGS,
)
WORKERS = _object(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=STRING,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=AT_LEAST_ONE,
    idleTimeoutSeconds=COUNT,
    priority={"type": "integer"},
    suspend=BOOLEAN,
    rayStartParams=STRINGS,
    resources=STRINGS,
    labels=STRINGS,
    template=POD_TEMPLATE,
)
CLUSTER = _object(
    ("headGroupSpec",),
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=AUTH,
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=STRINGS,
    suspend=BOOLEAN,
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
JOB = _object(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    metadata=STRINGS,
    submissionMode=_one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=_object(backoffLimit=COUNT),
    submitterPodTemplate=POD_TEMPLATE,
    backoffLimit=COUNT,
    activeDeadlineSeconds=AT_LEAST_ONE,
    preRunningDeadlineSeconds=AT_LEAST_ONE,
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=COUNT,
    suspend=BOOLEAN,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=STRING,
    rayClusterSpec=CLUSTER,
)
JOB["dependentSchemas"] = {  # the operator refuses a time to live without it
    "ttlSecondsAfterFinished": {
        "properties": {"shutdownAfterJobFinishes": {"const": True}},
        "required": ["shutdownAfterJobFinishes"],
    }
}


def _kind(kind: str, longest_name: int, spec: Schema) -> Schema:
    """The operator makes names of pods and services of the name, so it may not be long."""
    name = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": longest_name}
    metadata = _object(("name",), name=name, namespace=STRING, labels=STRINGS, annotations=STRINGS)
    return _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion=_one_of("ray.io/v1"),
        kind=_one_of(kind),
        metadata=metadata,
        spec=spec,
    )


KINDS = {"RayJob": _kind("RayJob", 47, JOB), "RayCluster": _kind("RayCluster", 50, CLUSTER)}


def pod_templates(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every pod template of a document that keeps to its schema."""
    spec = document["spec"]
    if "submitterPodTemplate" in spec:
        yield spec["submitterPodTemplate"]
    cluster = spec.get("rayClusterSpec", spec)
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", ())):
        yield group["template"]


def validate(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError, which names the place, for the first thing that would be refused or dropped."""
    jsonschema.validate(document, KINDS[document["kind"]], cls=jsonschema.Draft202012Validator)
    for template in pod_templates(document):
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)
