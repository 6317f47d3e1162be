"""`ray job submit` to a real head node with token authentication: the line as jobs, and how a user's mistakes look."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from brainsynth import open_dataset
from brainsynth.cohort.phantom_cohort import write_phantom_cohort
from tests.line import GRID, Line, write_yaml
from tests.servers.swift import free_ports

REPO = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
SUBJECTS = 24
START_S, JOB_S = 240, 300
# One process for three short jobs: each start costs the imports.
BETWEEN = """
import runpy, sys
for job, config in (("encode_latents", "latents"), ("train_diffusion", "diffusion"), ("export_bundle", "bundle")):
    sys.argv = [job, "--config", f"{config}.yaml"]
    try:
        runpy.run_path(f"jobs/{job}.py", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


@dataclass(frozen=True)
class Head:
    """A running head node and the code to submit to it."""

    address: str
    code: Path
    environment: dict[str, str]

    def submit(self, *command: str, ship: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Submit one command, follow its log to the end, and return exit code and output of the client.

        The job server answers before the agent that runs jobs is up: until then a job is submitted again.
        """
        shipped = ["--working-dir", str(self.code)] if ship else []
        deadline = time.monotonic() + START_S
        while True:
            result = subprocess.run(
                [RAY, "job", "submit", "--address", self.address, *shipped, "--", *command],
                env=self.environment | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=JOB_S,
                check=False,
            )
            if "No available agent to submit job" not in result.stdout or time.monotonic() > deadline:
                return result
            time.sleep(1)


def processes_of(folder: str) -> list[int]:
    """Ids of the processes of the Ray session below a temporary folder that is ours alone."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                details = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if folder.encode() in details:
                    found.append(int(entry.name))
    return found


def stop(process: subprocess.Popen[bytes], folder: str) -> None:
    """End this head and whatever it left; never `ray stop`, which ends every Ray on the machine.

    At once: asked politely, `ray start --block` takes half a minute, and nothing here is worth saving.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    process.wait(timeout=20)


def wait_until_up(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the job server answers; a head that died shows its log."""
    request = urllib.request.Request(f"{head.address}/api/version")  # noqa: S310
    request.add_header("Authorization", f"Bearer {head.environment['RAY_AUTH_TOKEN']}")
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):  # noqa: S310
            return
        time.sleep(0.5)
    pytest.fail(f"the head node did not come up:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head node of our own, in its own session, folder and ports."""
    code = tmp_path_factory.mktemp("code")
    for name in ("brainsynth", "jobs"):
        shutil.copytree(REPO / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tempfile.mkdtemp(prefix="bs-", dir="/tmp")  # socket paths must be short
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # `python` in a job is the head's
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "200",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_COLOR_PREFIX": "0",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    gcs, dashboard, client, agent, metrics, grpc = free_ports(6)
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", "--disable-usage-stats"]
    command += [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", "--include-dashboard=true"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
    command += [f"--dashboard-agent-grpc-port={grpc}", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--object-store-memory=100000000"]
    log = code.with_name("head.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=code, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    head = Head(f"http://127.0.0.1:{dashboard}", code, environment)
    try:
        wait_until_up(head, process, log)
        yield head
    finally:
        stop(process, folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def submitted(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The configs of a tiny line, inside the code that is shipped, and phantoms to begin with."""
    root = tmp_path_factory.mktemp("submitted")
    line = Line(root)
    write_phantom_cohort(root / "phantoms", SUBJECTS, 5, GRID)
    configs = {
        "cohort": line.prepare(),
        "autoencoder": line.autoencoder() | {"runtime": {"workers": 1, "cpus_per_worker": 1.0, "trackers": []}},
        "latents": line.latents(),
        "diffusion": line.diffusion(),
        "bundle": line.bundle(),
        "generate": line.generate(root / "unset", covariates={"draw": 6}),
    }
    for name, config in configs.items():
        write_yaml(config, head.code, f"{name}.yaml")
    (head.code / "between.py").write_text(BETWEEN)
    return line


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    """The output of a submission that must have worked."""
    assert result.returncode == 0, result.stdout
    assert "succeeded" in result.stdout
    return result.stdout


def test_a_wrong_token_is_refused(head: Head) -> None:
    result = head.submit("python", "-c", "pass", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert result.returncode != 0
    assert "Invalid authentication token" in result.stdout, result.stdout


def test_a_client_that_sends_no_token_is_refused(head: Head) -> None:
    result = head.submit("python", "-c", "pass", RAY_AUTH_MODE="disabled")
    assert result.returncode != 0
    assert "401" in result.stdout or "Unauthorized" in result.stdout, result.stdout


def test_a_misspelt_key_fails_the_job_and_says_what_was_meant(head: Head, submitted: Line) -> None:
    result = head.submit("python", "jobs/generate.py", "--config", "generate.yaml", "--set", "runtime.worker=3")
    assert result.returncode == 1, result.stdout
    assert "--set runtime.worker=3" in result.stdout
    assert "did you mean 'workers'?" in result.stdout


def test_a_relative_output_is_refused(head: Head, submitted: Line) -> None:
    result = head.submit("python", "jobs/prepare_cohort.py", "--config", "cohort.yaml", "--set", "output=out/cohort")
    assert result.returncode == 1, result.stdout
    assert "'out/cohort' is a relative path" in result.stdout
    assert "give an absolute path or a URI" in result.stdout


def test_without_a_working_folder_a_job_runs_where_the_head_was_started(head: Head) -> None:
    """The relative paths of the entrypoints in cluster/kuberay rest on it: there the head starts in the image's /app."""
    log = succeeded(head.submit("python", "-c", "import os; print('cwd', os.getcwd())", ship=False))
    assert f"cwd {head.code}\n" in log


@pytest.mark.slow
def test_the_line_runs_as_submitted_jobs(head: Head, submitted: Line) -> None:
    root = submitted.root
    log = succeeded(head.submit("python", "jobs/prepare_cohort.py", "--config", "cohort.yaml"))
    assert f"{SUBJECTS}/{SUBJECTS} volumes" in log
    cohort = open_dataset(str(root / "cohort"))
    assert len(cohort) == SUBJECTS
    assert cohort[0]["image"].shape == GRID.shape_xyz

    log = succeeded(
        head.submit(
            "python", "jobs/train_autoencoder.py", "--config", "autoencoder.yaml", "--set", "optimisation.steps=4"
        )
    )
    assert "4/4" in log or "step 4" in log, log
    assert (root / "autoencoder" / "run.json").is_file()

    succeeded(head.submit("python", "between.py"))
    assert (root / "bundle" / "bundle.json").is_file()

    output = root / "generated"
    command = ["python", "jobs/generate.py", "--config", "generate.yaml", "--set", f"output={output}"]
    log = succeeded(head.submit(*command, "--set", "runtime.workers=2", "--set", "runtime.cpus_per_worker=0.5"))
    assert "finished" in log
    generated = open_dataset(str(output))
    assert len(generated) == 6
    assert generated[5]["image"].shape == GRID.shape_xyz
    assert (output / "report.html").is_file()
