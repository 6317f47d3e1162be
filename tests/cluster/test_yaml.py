"""The cluster files: valid, complete, of the locked Ray version, and their entrypoints would start."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from brainsynth.config.load import load_config
from brainsynth.config.schema import GenerateConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig

REPO = Path(__file__).parents[2]
CLUSTER = REPO / "cluster"
JOBS: dict[str, type[Any]] = {
    "jobs/train_autoencoder.py": AutoencoderTrainConfig,
    "jobs/train_diffusion.py": DiffusionTrainConfig,
    "jobs/generate.py": GenerateConfig,
}
FILES = sorted((CLUSTER / "kuberay").glob("rayjob-*.yaml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def job(request: pytest.FixtureRequest) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(request.param.read_text())
    return document


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def options(command: list[str], name: str) -> list[str]:
    return [value for flag, value in itertools.pairwise(command) if flag == name]


def config_of(job: dict[str, Any]) -> Any:
    """The config as the entrypoint would load it, overrides applied."""
    command = shlex.split(job["spec"]["entrypoint"])
    (config,) = options(command, "--config")
    assert set(command[2::2]) == {"--config", "--set"}
    assert not Path(config).is_absolute()
    return load_config(REPO / config, JOBS[command[1]], options(command, "--set"))


def test_both_jobs_are_there_and_every_yaml_parses() -> None:
    assert {path.name for path in FILES} == {"rayjob-train.yaml", "rayjob-generate.yaml"}
    for path in CLUSTER.rglob("*.y*ml"):
        assert yaml.safe_load(path.read_text()), path


def test_the_cluster_for_interactive_use_is_that_of_the_jobs() -> None:
    cluster = yaml.safe_load((CLUSTER / "kuberay" / "raycluster.yaml").read_text())["spec"]
    for path in FILES:
        of_job = yaml.safe_load(path.read_text())["spec"]["rayClusterSpec"]
        for name in ("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"):
            assert cluster[name] == of_job[name], (path, name)
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == 0  # costs nothing while nobody asks


def test_job_has_what_kuberay_asks_for(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["metadata"]["name"]
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    head_env = {item["name"]: item["value"] for item in pods(job)[0]["containers"][0]["env"]}
    assert int(head_env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert any(toleration["key"] == "spot" for toleration in group["template"]["spec"]["tolerations"])


def test_ray_is_the_locked_one(job: dict[str, Any]) -> None:
    (locked,) = re.findall(r"^ray==(\S+)", (REPO / "requirements.lock").read_text(), re.MULTILINE)
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == locked


def test_pods_mount_what_they_declare_and_are_not_root(job: dict[str, Any]) -> None:
    for pod in pods(job):
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"data": "/data", "shm": "/dev/shm"}  # noqa: S108
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(volumes) == set(mounts)
        assert "persistentVolumeClaim" in volumes["data"]


def test_entrypoint_is_one_command_whose_script_and_config_exist(job: dict[str, Any]) -> None:
    entrypoint = job["spec"]["entrypoint"]
    assert not re.search(r"[;&|<>$`\n]", entrypoint.strip())  # a shell would split it in the submitter pod
    command = shlex.split(entrypoint)
    assert command[0] == "python"
    assert command[1] in JOBS
    assert (REPO / command[1]).is_file()
    config_of(job)


def test_the_workers_fit_on_the_pods(job: dict[str, Any]) -> None:
    runtime = config_of(job).runtime
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus, cpus = int(limits["nvidia.com/gpu"]), int(limits["cpu"])
    assert runtime.workers <= group["maxReplicas"] * gpus
    assert runtime.cpus_per_worker * gpus <= cpus


def test_workers_of_a_training_share_a_pod() -> None:
    """Between pods NCCL has the pod network alone, even on one machine."""
    job = yaml.safe_load((CLUSTER / "kuberay" / "rayjob-train.yaml").read_text())
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == config_of(job).runtime.workers


@pytest.mark.parametrize(
    "file", ["README.md", "cluster/README.md", "cluster/Dockerfile", "cluster/launcher/aws.yaml", "docs/gpu.md"]
)
def test_the_driver_of_the_locked_torch_is_named(file: str) -> None:
    from brainsynth.models.driver import needed_driver

    (locked,) = re.findall(r"^torch==(\S+)", (REPO / "requirements.lock").read_text(), re.MULTILINE)
    if torch.__version__.split("+")[0] != locked or torch.version.cuda is None:
        pytest.skip("another torch than the locked one")
    branch = needed_driver(torch.version.cuda).split()[3]
    assert re.search(rf"driver {branch} or newer", (REPO / file).read_text())


def test_generation_writes_to_a_bucket_with_credentials_from_a_secret() -> None:
    job = yaml.safe_load((CLUSTER / "kuberay" / "rayjob-generate.yaml").read_text())
    assert config_of(job).output.startswith("s3://")
    assert config_of(job).runtime.gpus_per_worker == 1
    for pod in pods(job):
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "brainsynth-s3"}}]


def test_training_writes_to_the_shared_volume() -> None:
    config = config_of(yaml.safe_load((CLUSTER / "kuberay" / "rayjob-train.yaml").read_text()))
    assert config.output.startswith("/data/")
    assert config.runtime.use_gpu
    assert config.optimisation.batch_size % config.runtime.workers == 0


def test_image_is_built_from_the_lock_and_does_not_run_as_root() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("FROM")] == ["FROM python:3.11-slim"]
    assert any("-r requirements.lock" in line for line in lines)
    assert [line for line in lines if line.startswith("USER")] == ["USER brainsynth"]
    for name in ("pyproject.toml", "LICENSE", "requirements.lock", "brainsynth", "jobs", "configs"):
        assert (REPO / name).exists()
