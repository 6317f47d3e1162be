"""A config is read strictly: every mistake at once, each with file and line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from brainsynth.config.audit import AuditConfig
from brainsynth.config.distillation import DistillConfig, StepDistillConfig
from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.config.labelling import LabellerTrainConfig, RendererTrainConfig
from brainsynth.config.load import load_config
from brainsynth.config.release import ReleaseConfig
from brainsynth.config.schema import EncodeConfig, ExportConfig, GenerateConfig, PhantomConfig, PrepareConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from brainsynth.errors import UserError

REPO = Path(__file__).parents[2]
CLASSES = {
    "phantoms": PhantomConfig,
    "cohort": PrepareConfig,
    "cohort-labels": PrepareConfig,
    "labeller": LabellerTrainConfig,
    "renderer": RendererTrainConfig,
    "renderer-texture": RendererTrainConfig,
    "autoencoder": AutoencoderTrainConfig,
    "latents": EncodeConfig,
    "diffusion": DiffusionTrainConfig,
    "diffusion-transformer": DiffusionTrainConfig,
    "diffusion-deeper": DiffusionTrainConfig,
    "diffusion-crossed": DiffusionTrainConfig,
    "bundle": ExportConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "audit": AuditConfig,
    "distill-decoder": DistillConfig,
    "distill-steps": StepDistillConfig,
    "release": ReleaseConfig,
}
GOOD = """\
bundle: runs/bundle
output: runs/generated
covariates: {draw: 8}
sampler:
  method: ab2
  steps: 8
base_seed: 3
runtime: {workers: 0}
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "job.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(folder: Path, text: str | bytes, *overrides: str, cls: type[Any] = GenerateConfig) -> str:
    with pytest.raises(UserError) as caught:
        load_config(write(folder, text), cls, overrides)
    return str(caught.value)


def test_a_good_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), GenerateConfig)
    assert (config.sampler.method, config.sampler.steps, config.sampler.guidance_scale) == ("ab2", 8, 1.0)
    assert (config.base_seed, config.runtime.workers, config.stored_dtype) == (3, 0, "float16")


def test_every_mistake_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
bundle: runs/bundle
covariates: {draw: 8, tabel: x.csv}
sampler:
  method: ddmi
  steps: eight
  guidence_scale: 1.5
base_seed: 1
base_seed: 2
precision: float16
samples_per_shard: 16.5
runtime:
  workers: "2"
  zebra: 1
"""
    path = tmp_path / "job.yaml"
    lines = refusal(tmp_path, text).splitlines()
    expected = [
        (1, "output: required key is missing"),
        (2, "covariates.tabel: unknown key; did you mean 'table'?"),
        (4, "sampler.method: Input should be 'ddpm', 'ddim', 'dpmpp_2m', 'unipc', 'euler', 'heun' or 'ab2'"),
        (5, "sampler.steps: Input should be a valid integer"),
        (6, "sampler.guidence_scale: unknown key; did you mean 'guidance_scale'?"),
        (8, f"base_seed: duplicated key, first given at {path}:7"),
        (9, "precision: Input should be 'float32' or 'bfloat16'"),
        (10, "samples_per_shard: Input should be a valid integer"),
        (12, "runtime.workers: Input should be a valid integer"),
        (13, "runtime.zebra: unknown key; known keys: workers, cpus_per_worker"),
    ]
    assert lines[0] == f"{path} cannot be used ({len(expected)} problems)"
    assert len(lines) == len(expected) + 1
    for shown, (line, problem) in zip(lines[1:], expected, strict=True):
        assert shown.startswith(f"  {path}:{line}: {problem}")


def test_a_list_is_named_by_index_and_line(tmp_path: Path) -> None:
    text = """\
source: {path: scans}
output: cohort
covariates:
  covariates:
    - {name: age, kind: continuous, low: 18.0, high: 90.0}
    - {name: sex, kind: binary, categories: [F, M], levels: 2}
    - {name: site, kind: categorical, categories: [only]}
volume: {shape_xyz: [8, 8], spacing_mm: [1.0, 1.0, 1.0], origin_mm: [0.0, 0.0, .nan]}
"""
    told = refusal(tmp_path, text, cls=PrepareConfig)
    assert "job.yaml:6: covariates.covariates.1.levels: unknown key" in told
    assert "job.yaml:7: covariates.covariates.2: covariate 'site' needs at least two different categories" in told
    assert "job.yaml:8: volume.shape_xyz.2: required key is missing" in told
    assert "job.yaml:8: volume.origin_mm.2: Input should be a finite number" in told


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "+1e-04"])
def test_floats_are_read_as_yaml_1_2_does(tmp_path: Path, text: str) -> None:
    config = load_config(write(tmp_path, GOOD + f"# {text}\n"), GenerateConfig, [f"sampler.guidance_scale={text}"])
    assert config.sampler.guidance_scale == 1e-4
    inside = GOOD.replace("steps: 8", f"steps: 8\n  guidance_scale: {text}")
    assert load_config(write(tmp_path, inside), GenerateConfig).sampler.guidance_scale == 1e-4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD.replace("{draw: 8}", "&c {draw: 8}"), r"job\.yaml:3: anchors, aliases and tags are not allowed"),
        (GOOD.replace("runs/generated", "*c"), r"job\.yaml:2: anchors, aliases and tags are not allowed"),
        (GOOD.replace("runs/generated", "!!python/name:os.system x"), r"job\.yaml:2: anchors, aliases and tags"),
        (GOOD.replace("runs/generated", "!!int many"), r"job\.yaml:2: anchors, aliases and tags"),
        (b"bundle: caf\xe9\n", r"job\.yaml is not UTF-8 text"),
        ("- a\n- b\n", r"job\.yaml: a config is a mapping"),
        ("", r"job\.yaml: a config is a mapping"),
        (GOOD + "---\nbundle: x\n", r"job\.yaml:9: not valid YAML"),
        (GOOD.replace("{draw: 8}", "{draw: 8"), r"job\.yaml:4: not valid YAML"),
        (GOOD + "\tx: 1\n", r"job\.yaml:9: not valid YAML"),
        (GOOD + "x: \x07\n", r"job\.yaml:9: not valid YAML: special characters"),
        (GOOD + "x: " + "[" * 1200, r"job\.yaml: not valid YAML: nested too deeply"),
        (GOOD + "? [a]\n: 1\n", r"job\.yaml:9: a key is a plain word"),
        ("x: 1\n" * 300_000, r"larger than 262144 bytes"),
    ],
    ids=[
        "anchor",
        "alias",
        "tag",
        "typed",
        "latin1",
        "list",
        "empty",
        "two",
        "open",
        "tab",
        "bell",
        "deep",
        "key",
        "huge",
    ],
)
def test_what_is_no_config_at_all(tmp_path: Path, text: str | bytes, told: str) -> None:
    assert re.search(told, refusal(tmp_path, text))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the config .*nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml", GenerateConfig)


@pytest.mark.parametrize("value", ["2024-01-01", "2024-13-45", "~x", "1:2:3x", "0o9"])
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, value: str) -> None:
    inside = load_config(write(tmp_path, GOOD.replace("runs/generated", value)), GenerateConfig)
    outside = load_config(write(tmp_path, GOOD), GenerateConfig, [f"output={value}"])
    assert inside.output == outside.output == value


def test_rules_between_keys_are_told_too(tmp_path: Path) -> None:
    assert "covariates: give either table or draw" in refusal(
        tmp_path, GOOD.replace("{draw: 8}", "{draw: 8, table: x.csv}")
    )
    latents = "cohort: a\nautoencoder: b\noutput: c\nsamples_per_shard: 0\n"
    assert "samples_per_shard must be at least 1" in refusal(tmp_path, latents, cls=EncodeConfig)


def test_overrides(tmp_path: Path) -> None:
    path = REPO / "configs" / "demo-train" / "2-cohort.yaml"
    overrides = [
        "validation_fraction=1e-1",
        "runtime.workers=0",
        "covariates.covariates.1.categories.0=W",
        "volume.shape_xyz=[16, 20, 16]",
        "source.columns={age: years}",
        "source.exclude.qc=[bad]",
    ]
    config = load_config(path, PrepareConfig, overrides)
    assert config.validation_fraction == 0.1
    assert config.runtime.workers == 0
    assert config.covariates.covariates[1].categories == ("W", "M")
    assert config.volume.shape_xyz == (16, 20, 16)
    assert config.source.columns == {"age": "years"}
    assert config.source.exclude == {"qc": ("bad",)}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sampler.stepz=1", "--set sampler.stepz=1: sampler.stepz: unknown key; did you mean 'steps'?"),
        ("sampler.steps=x", "--set sampler.steps=x: sampler.steps: Input should be a valid integer"),
        ("sampler.steps", "--set sampler.steps: write it as --set key.sub=value"),
        ("sampler..steps=1", "--set sampler..steps=1: write it as --set key.sub=value"),
        ("=1", "--set =1: write it as --set key.sub=value"),
        ("output.deeper=1", "--set output.deeper=1: there is no such place"),
        ("covariates.constraints.3=1", "--set covariates.constraints.3=1: covariates.constraints: Input should be a"),
        ("runtime={", "--set runtime={: the value is not plain YAML"),
        ("runtime=&a {workers: 1}", "the value is not plain YAML"),
        ("runtime={workers: 1, workers: 2}", "runtime.workers: duplicated key"),
        ("output=", "--set output=: output: Input should be a valid string"),
        ("covariates.draw=-1", ", with --set covariates.draw=-1: covariates: draw asks for no rows"),
    ],
)
def test_a_wrong_override_names_itself(tmp_path: Path, override: str, told: str) -> None:
    assert told in refusal(tmp_path, GOOD, override)


def test_many_problems_are_cut_and_counted(tmp_path: Path) -> None:
    told = refusal(tmp_path, GOOD + "".join(f"key{i}: 1\n" for i in range(30)))
    assert "(30 problems)" in told
    assert "… and 10 more" in told


@pytest.mark.parametrize("path", sorted((REPO / "configs").rglob("*.y*ml")), ids=lambda p: "/".join(p.parts[-2:]))
def test_every_shipped_config_loads(path: Path) -> None:
    kind = re.sub(r"^\d+-", "", path.stem)
    assert kind in CLASSES, f"{path.name}: say in CLASSES which config class reads it"
    config = load_config(path, CLASSES[kind])
    assert isinstance(config, CLASSES[kind])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["steps=0"], "steps must be at least 1"),
        (["method=ddim", "eta=1.5"], "eta must be between 0 and 1"),
        (["method=ddpm", "eta=0.5"], "eta is for ddim"),
        (["time_shift=0"], "time_shift must be between 0.05 and 20"),
        (["method=unipc", "time_shift=2.0"], "time_shift is for euler, heun, ab2"),
        (["last_log_snr=2.5"], "last_log_snr is for dpmpp_2m, unipc"),
        (["method=unipc", "last_log_snr=40.0"], "last_log_snr must be between -2 and 10"),
        (["method=ddim", "first_timestep=980"], "first_timestep is for dpmpp_2m, unipc"),
        (["guidance_scale=1.5", "guidance_interval=[3.0, 0.3]"], "0 <= low < high"),
        (["guidance_scale=1.5", "guidance_interval=[-1.0, 0.3]"], "0 <= low < high"),
        (["guidance_scale=1.5", "guidance_interval=[0.3]"], "guidance_interval"),
        (["guidance_interval=[0.3, 3.0]"], "needs a guidance_scale other than 1"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(tmp_path: Path, changes: list[str], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        load_config(write(tmp_path, GOOD), GenerateConfig, [f"sampler.{change}" for change in changes])


def test_epsilon_has_no_zero_terminal_snr(tmp_path: Path) -> None:
    changes = ["schedule.prediction=epsilon", "schedule.zero_terminal_snr=true"]
    with pytest.raises(UserError, match="zero_terminal_snr needs prediction: v"):
        load_config(REPO / "configs" / "demo-train" / "5-diffusion.yaml", DiffusionTrainConfig, changes)
