"""A generator of ten lines, outside of the package: made, killed half-way, resumed, verified, gated, audited, released."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from brainsynth import cli, open_dataset
from brainsynth.bundle.spec import GATE_FILE
from brainsynth.config.audit import AuditConfig
from brainsynth.config.release import ReleaseConfig
from brainsynth.gate.file import save_gate
from brainsynth.gate.gate import QualityGate
from brainsynth.stages import release
from brainsynth.stages.audit import run as audit
from brainsynth.stages.regenerate import regenerate
from brainsynth.storage.verify import verify_dataset
from brainsynth.volume import VolumeSpec
from tests.instruments.heads import SHAPE, SPACING, heads
from tests.integration.test_audit import cohort
from tests.line import as_config

REPO = Path(__file__).parents[2]
GRID = VolumeSpec(shape_xyz=SHAPE, spacing_mm=SPACING, origin_mm=(-76.0, -100.0, -76.0))
TEN_LINES = """\
import numpy as np, json, os, pathlib, time
from brainsynth import Covariate, CovariateSchema, GeneratorSpec, VolumeSpec
from tests.instruments.heads import heads

class Heads:
    folder = pathlib.Path(__file__).parent
    def __init__(self, brightness=1.0): self.brightness = brightness
    def describe(self): return GeneratorSpec(**json.loads((self.folder / "heads.json").read_text()), volume=VolumeSpec(**VOLUME), covariates=CovariateSchema(covariates=(Covariate(name="age", kind="continuous", unit="years", low=18.0, high=95.0), Covariate(name="sex", kind="binary", categories=("F", "M")))))
    def load(self, device): self.device = device
    def sample(self, rows, seeds): return np.stack([one(seed) * self.brightness for seed in seeds])

"""  # noqa: E501
REST = """
VOLUME = {"shape_xyz": (20, 26, 20), "spacing_mm": (8.0, 8.0, 8.0), "origin_mm": (-76.0, -100.0, -76.0)}
def one(seed):
    time.sleep(float(os.environ.get("SECONDS_A_VOLUME", "0")))
    return heads(1, seed)[0]
"""


class Laboratory:
    """A folder with the generator's module, its gate, the cohort that it says it was trained on, and rows."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reference = cohort(root, "reference", heads(44, 1), 1)
        (root / "tengen.py").write_text(TEN_LINES + REST)
        save_gate(QualityGate.fit(iter(heads(60, 2)), GRID, 0.05), root / GATE_FILE)
        trained_on = open_dataset(self.reference).manifest["plan_fingerprint"]
        about: dict[str, Any] = {"name": "ten lines", "licence": "CC-BY-4.0", "training_data": "invented heads"}
        about |= {"content": "v1", "provenance": {"cohort_fingerprint": trained_on}}
        about["weights"] = {GATE_FILE: hashlib.sha256((root / GATE_FILE).read_bytes()).hexdigest()}
        (root / "heads.json").write_text(json.dumps(about))
        rows = pd.DataFrame({"age": [20.0 + 4 * n for n in range(16)], "sex": ["F", "M"] * 8})
        rows.to_csv(root / "rows.csv", index=False)

    def config(self, name: str, **changes: Any) -> Path:
        config: dict[str, Any] = {
            "bundle": "tengen:Heads",
            "output": str(self.root / name),
            "covariates": {"table": str(self.root / "rows.csv")},
            "samples_per_shard": 2,
            "gate": {"max_attempts": 2},
            "runtime": {"workers": 0, "threads_per_worker": 1, "micro_batch": 2},
        }
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config | changes))
        return path

    def start(self, config: Path, seconds: float = 0.0) -> subprocess.Popen[str]:
        environment = {**os.environ, "SECONDS_A_VOLUME": str(seconds), "PYTHONPATH": f"{REPO}:{self.root}"}
        command = [sys.executable, "-m", "brainsynth", "generate", "--config", str(config)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def made(self, name: str) -> dict[str, str]:
        """Row → digest of its voxels, as committed."""
        commits = [
            json.loads(path.read_text())["record"] for path in (self.root / name / "commits").glob("shard-*.json")
        ]
        return {one["sample_id"]: one["voxel_sha256"] or one["status"] for each in commits for one in each["samples"]}


def generate(config: Path) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--config", str(config)])
    return int(str(ended.value.code))


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("laboratory"))


@pytest.fixture(autouse=True)
def importable(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(laboratory.root))


def test_ten_lines_are_killed_resumed_verified_gated_audited_and_released(laboratory: Laboratory) -> None:
    assert len(TEN_LINES.strip().splitlines()) <= 10
    root = laboratory.root
    assert generate(laboratory.config("undisturbed")) == 0
    process = laboratory.start(laboratory.config("killed"), seconds=0.2)
    while len(laboratory.made("killed")) < 8:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 8 <= len(laboratory.made("killed")) < 16, "it was not killed half-way"
    resumed = laboratory.start(root / "killed.yaml")
    assert resumed.wait() == 0, resumed.communicate()[1]
    assert laboratory.made("killed") == laboratory.made("undisturbed")
    assert len(laboratory.made("killed")) == 16
    plans = [json.loads((root / name / "plan.json").read_text()) for name in ("killed", "undisturbed")]
    assert plans[0] == plans[1]
    assert verify_dataset(str(root / "killed")).ok
    opened = open_dataset(str(root / "killed"))
    attempts = [sample["extra"]["gate_attempts"] for path in sorted((root / "killed" / "commits").glob("shard-*.json"))
                for sample in json.loads(path.read_text())["record"]["samples"]]  # fmt: skip
    assert len(attempts) == 16, "each volume passed the gate, or was drawn again"
    assert "the generator&#x27;s own" in (root / "killed" / "report.html").read_text()
    compared = list(regenerate(str(root / "killed"), "tengen:Heads", [0, 7, 15]))
    assert all(one.same_voxels and one.as_recorded for one in compared)
    judged: dict[str, Any] = {"dataset": str(root / "killed"), "reference": laboratory.reference, "pictures": False}
    judged |= {"bundle": "tengen:Heads", "output": str(root / "audit"), "false_alarm_rate": 0.1}
    judged["runtime"] = {"workers": 0, "threads_per_worker": 1, "micro_batch": 16}
    passed = audit(as_config(judged, AuditConfig, root))
    assert passed.passed, passed.reasons
    published: dict[str, Any] = {
        "dataset": str(root / "killed"), "bundle": "tengen:Heads", "audit": str(root / "audit"),
        "output": str(root / "released"), "title": "Heads", "description": "Heads of nobody.", "licence": "CC-BY-4.0",
        "source_terms": "Nobody's data was used.", "creators": [{"name": "The Example Group"}],
        "contact": "https://example.org/contact", "published": "2026-11-26", "url": "https://example.org/heads",
    }  # fmt: skip
    release.run(as_config(published, ReleaseConfig, root))
    card = (root / "released" / "MODEL_CARD.md").read_text()
    assert "A generator of T1-weighted brain MRI, conditioned on covariates, from another package" in card
    assert len(open_dataset(str(root / "released" / "data"))) == len(opened)


def test_options_and_content_are_part_of_the_plan(laboratory: Laboratory, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(laboratory.config("options")) == 0
    other = laboratory.config("options", options={"brightness": 0.5})
    assert generate(other) == 2
    assert "brightness" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bundle", "changes", "message"),
    [
        ("tengen:Nothing", {}, "the module tengen has no Nothing"),
        ("nowhere:Heads", {}, "there is no module nowhere; install it, or add its folder to PYTHONPATH"),
        ("generator:nowhere", {}, "no installed package has this generator"),
        ("json:JSONDecoder", {}, "has no method describe, load, sample"),
        ("tengen:Heads", {"options": {"colour": 1}}, "cannot be built with the options"),
        ("tengen:Heads", {"sampler": {"method": "ab2", "steps": 3}}, "sampler: these are keys for bundles"),
        ("t1w-2mm", {}, "the key sampler is missing"),
        ("./a:b", {}, "the key sampler is missing"),
    ],
)
def test_a_mistake_is_one_error(
    laboratory: Laboratory, capsys: pytest.CaptureFixture[str], bundle: str, changes: dict[str, Any], message: str
) -> None:
    path = laboratory.config("mistake", bundle=bundle, **changes)
    assert generate(path) == 2
    assert message in capsys.readouterr().err
    assert not (laboratory.root / "mistake").exists(), "something was written"
