"""Numbers and truth values as YAML 1.2 reads them, paths as a shell would not, options that contradict each other."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from brainsynth import cli
from brainsynth.config.load import load_config
from brainsynth.config.schema import GenerateConfig, PrepareConfig
from brainsynth.covariates.names import PREFIXES, RESERVED
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.covariates.sweep import check_not_held
from brainsynth.errors import UserError
from brainsynth.plan import generation_samples, whole_number
from brainsynth.storage.filesystem import resolve_uri

COHORT = """\
source: {{path: t.csv}}
output: cohort
covariates: {{covariates: [{{name: {name}, kind: continuous, low: 0, high: 9}}]}}
volume: {{shape_xyz: [8, 8, 8], spacing_mm: [1, 1, 1], origin_mm: [0, 0, 0]}}
"""


def loaded(folder: Path, cls: type[Any] = GenerateConfig, **changes: str) -> Any:
    keys = {
        "bundle": "b",
        "output": "o",
        "covariates": "{draw: 4}",
        "sampler": "{method: ab2, steps: 4}",
        "runtime": "{workers: 0}",
    }
    path = folder / "c.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in (keys | changes).items()))
    return load_config(path, cls)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("100", 100),
        ("0x10", 16),
        ("0o17", 15),
        ("+7", 7),
        ("-0", 0),
        ("18446744073709551616", 2**64),
        (str(10**40), 10**40),
    ],
)
def test_whole_numbers(tmp_path: Path, text: str, number: int) -> None:
    assert loaded(tmp_path, base_seed=text).base_seed == number


@pytest.mark.parametrize("text", ["0100", "1:30", "1_000", "00", "0b11", "08", "1e3", "12.0", "--5"])
def test_what_only_looks_like_a_whole_number(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="base_seed: Input should be a valid integer"):
        loaded(tmp_path, base_seed=text)


def test_a_leading_zero_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0100 is text: write the number 100 in decimal digits"):
        loaded(tmp_path, base_seed="0100")


@pytest.mark.parametrize("text", ["1e3", "1000.0", "1.0E+3"])
def test_a_whole_number_with_an_exponent_or_a_point_is_explained(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="base_seed: .*; write 1000, without a decimal point or an exponent"):
        loaded(tmp_path, base_seed=text)


@pytest.mark.parametrize("text", ["yes", "no", "on", "Off", "y"])
def test_truth_values(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=f"{text} is text .*: write true or false"):
        loaded(tmp_path, runtime=f"{{workers: 0, exact_rewrites: {text}}}")


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("{qc: [0]}", "in quotation marks it is text"),
        ("{qc: fail}", "a list of one is written .fail."),
        ("{qc: 1.0}", "1.0"),
    ],
)
def test_a_number_for_a_text_and_a_word_for_a_list_are_explained(tmp_path: Path, exclude: str, message: str) -> None:
    text = COHORT.format(name="age").replace("{path: t.csv}", f"{{path: t.csv, exclude: {exclude}}}")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"c.yaml:1: source.exclude.qc.*{message}"):
        load_config(tmp_path / "c.yaml", PrepareConfig)


def test_words_that_are_no_numbers_are_categories(tmp_path: Path) -> None:
    numbers, texts = "kind: continuous, low: 0, high: 9", "kind: categorical, categories: [no, 01, 1:30]"
    text = COHORT.format(name="site").replace(numbers, texts)
    (tmp_path / "c.yaml").write_text(text)
    schema = load_config(tmp_path / "c.yaml", PrepareConfig).covariates
    assert schema.covariates[0].categories == ("no", "01", "1:30")


@pytest.mark.parametrize("path", ["$HOME/x", "${HOME}/x", "/data/$USER/x", "s3://$BUCKET/x"])
def test_a_shell_variable_is_refused_wherever_a_path_is(tmp_path: Path, path: str) -> None:
    for change in ({"output": f"'{path}'"}, {"covariates": f"{{table: '{path}.csv'}}"}, {"bundle": f"'{path}'"}):
        with pytest.raises(UserError, match="holds the shell variable"):
            loaded(tmp_path, **change)
    with pytest.raises(UserError, match="--output: .* holds the shell variable"):
        resolve_uri(path, "--output")


def test_a_dollar_that_is_no_variable_and_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(tmp_path, output="'/data/cost$/x'").output == "/data/cost$/x"
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve_uri("~/x", "output") == "/home/me/x"
    with pytest.raises(UserError, match="no such user"):
        resolve_uri("~nobody-at-all/x", "output")


@pytest.mark.parametrize("name", sorted(RESERVED | {f"{prefix}age" for prefix in PREFIXES}))
def test_a_name_of_ours_is_refused_when_the_config_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "c.yaml").write_text(COHORT.format(name=name))
    with pytest.raises(UserError, match=f"{name} is the name of our own column .*source.columns"):
        load_config(tmp_path / "c.yaml", PrepareConfig)


def test_a_stored_model_with_a_name_of_ours_makes_nothing_that_would_not_open() -> None:
    schema = CovariateSchema(covariates=(Covariate(name="status", kind="continuous", low=0, high=9),))
    with pytest.raises(UserError, match="the model's covariate status"):
        generation_samples(
            pd.DataFrame({"status": [1.0]}), schema, 0, schema.out_of_range(pd.DataFrame({"status": [1.0]}))
        )


@pytest.mark.parametrize("value", [7, "7", 7.0, "7.0", " 7 ", "7e0", "007", "+7"])
def test_a_small_seed_is_itself_however_it_is_written(value: Any) -> None:
    assert whole_number(value, "noise_seed") == 7


@pytest.mark.parametrize("value", [2**64, 2**127 + 1, str(2**127 + 1), str(10**100)])
def test_a_large_seed_is_taken_whole(value: Any) -> None:
    assert whole_number(value, "noise_seed") == int(value)


@pytest.mark.parametrize(
    "value",
    [1e20, "1e20", float(2**53), "9007199254740993.0", -1, "-3", 3.5, True, None, "", "x", "1_0", float("nan"), "٣"],
)
def test_a_seed_that_may_have_been_rounded_or_is_none_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="noise_seed"):
        whole_number(value, "noise_seed")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["regenerate", "d", "--bundle", "b", "--random", "-1"], "argument --random: -1: must be at least 1"),
        (
            ["export", "d", "--to", "nifti", "--output", "o", "--workers", "-2"],
            "argument --workers: -2: must be at least 0",
        ),
        (["cohort", "--rows", "0", "--output", "t.csv"], "argument --rows: 0: must be at least 1"),
        (["cohort", "--rows", "1_000", "--output", "t.csv"], "'1_000' is not a whole number"),
        (["view", "d", "--port", "70000"], "must be at least 0 and at most 65535"),
        (["generate", "--count", "2", "--count", "3", "--output", "o"], "--count is given twice: 2 and 3"),
        (["vary", "--config", "c", "--output", "o", "--sweep", "age=1:2", "--seed", "-5"], "must be at least 0"),
    ],
)
def test_counts_and_contradictions(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_what_is_swept_is_not_held(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--hold age: --sweep age moves it"):
        check_not_held(["age=40:60:3", "sex=F,M"], ["age=50"])
    check_not_held(["age=40:60:3"], ["sex=F"])
    path = tmp_path / "c.yaml"
    path.write_text("output: o\n")
    with pytest.raises(UserError, match="base_seed is set twice, to 1 before"):
        load_config(path, GenerateConfig, ["base_seed=1", "base_seed=2"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_help_is_shown_on_any_terminal(encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    for words in (["--help"], ["vary", "--help"], ["cohort", "--help"], ["--version"]):
        command = [sys.executable, "-m", "brainsynth", *words]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, b""), words


def test_arrows_become_ascii() -> None:
    import brainsynth.progress  # noqa: F401  # it registers the handler

    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors="brainsynth-ascii")
    stream.write("a → b … 8×8 東")
    stream.flush()
    assert stream.buffer.getvalue() == b"a -> b ... 8x8 \\u6771"  # type: ignore[attr-defined]
