"""Whether a documented command could start: the program, its arguments, and the files and configs that it names exist."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from brainsynth import cli
from brainsynth.config.load import load_config
from brainsynth.config.schema import GenerateConfig
from brainsynth.records import from_dict
from brainsynth.stages.jobs import JOBS
from tests.docs.pages import REPO, Block, Command

CONFIGS: dict[str, type[Any]] = {
    **{f"brainsynth {name}": job.config for name, job in JOBS.items()},
    "brainsynth vary": GenerateConfig,
}
"""Command → what its `--config` is read into."""
BASES: dict[str, dict[str, Any]] = {
    "brainsynth evaluate": {"dataset": "d", "reference": "r", "output": "o"},
    "brainsynth export-bundle": {"diffusion": "d", "output": "o", "name": "n", "licence": "l", "training_data": "t"},
    "brainsynth prepare-cohort": yaml.safe_load((REPO / "configs/demo-train/2-cohort.yaml").read_text()),
    "brainsynth generate": {"output": "o", "covariates": {"draw": 1}, "sampler": {"method": "ab2", "steps": 8}},
}
"""The keys that a fragment of a config leaves out."""


class NotStartable(AssertionError):
    """A documented command that cannot start, and why."""


def check(command: Command) -> None:
    """Raises NotStartable (or what the command's own parser says) for a command that cannot start."""
    words = command.words
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]  # variables for this command alone
    checks: dict[str, Callable[[list[str]], None]] = {
        "python": _python, "brainsynth": _brainsynth, "make": _make, "ray": _ray, "kubectl": _kubectl, "docker": _docker,
        "sbatch": _sbatch, **dict.fromkeys(("pip", "uv", "export", "cd", "source", "sha256sum", "openssl"), _nothing),
    }  # fmt: skip
    if words[0] not in checks:
        raise NotStartable(f"{command}: nobody has said how to check {words[0]!r}")
    try:
        checks[words[0]](words)
    except (SystemExit, AssertionError, ValueError, OSError) as error:
        raise NotStartable(f"{command}: {error}") from error


def check_yaml(block: Block) -> None:
    """A block of YAML begins with a comment that names who reads it, and is a config of that, or a part of one."""
    first, _, rest = block.text.partition("\n")
    reader = first.removeprefix("# ")
    if reader not in CONFIGS:
        raise NotStartable(f"{block.page}:{block.line}: begin with `# brainsynth VERB`, not {first!r}")
    value = {**BASES.get(reader, {}), **yaml.safe_load(rest)}
    from_dict(CONFIGS[reader], value, f"{block.page}:{block.line}")


def options(words: list[str], name: str) -> list[str]:
    """The values of an option."""
    return [value for flag, value in itertools.pairwise(words) if flag == name]


def _config(reader: str, words: list[str]) -> None:
    for config in options(words, "--config"):
        if (REPO / config).parent != REPO:  # one in the folder itself is the reader's own
            load_config(REPO / config, CONFIGS[reader], options(words, "--set"))


def _python(words: list[str]) -> None:
    if words[1].startswith("jobs/"):
        script = Path(words[1])
        assert (REPO / script).is_file(), script
        _brainsynth(["brainsynth", script.stem.replace("_", "-"), *words[2:]])
    elif words[1:3] == ["-m", "pytest"]:
        assert (REPO / words[3]).is_file(), words[3]
    else:
        assert words[1] == "-m", f"{words[1]} is started in no other way than by `python -m`"
        module = words[2].replace(".", "/") + ".py"
        assert module.startswith(("benchmarks/", "recipes/")), f"what is {module}?"
        wanted = {word for word in words[3:] if word.startswith("--")}
        assert wanted <= flags(REPO / module), f"{module} does not know {wanted - flags(REPO / module)}"


def flags(script: Path) -> set[str]:
    """The options that a script's parser may be given: a loop may add them by bare names."""
    if "ArgumentParser" not in script.read_text():
        return set()
    texts = {n.value for n in ast.walk(ast.parse(script.read_text())) if isinstance(n, ast.Constant) and n.value}
    return {f"--{text.removeprefix('--')}" for text in texts if isinstance(text, str)}


def _brainsynth(words: list[str]) -> None:
    said = io.StringIO()
    parser = cli.parser()
    if len(words) == 2:  # the name of a verb
        words = [words[0], "verify", "URI"] if words[1] == "VERB" else [*words, "--help"]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            parser.parse_args(words[1:])
    except SystemExit as left:
        assert not left.code, said.getvalue()
    _config(" ".join(words[:2]), words)


def _make(words: list[str]) -> None:
    assert re.search(rf"^{re.escape(words[1])}:", (REPO / "Makefile").read_text(), re.MULTILINE), (
        f"no target {words[1]}"
    )


def _ray(words: list[str]) -> None:
    assert words[1] in ("start", "job", "up", "down", "dashboard", "get-auth-token"), words[1]
    if words[1] == "job":
        assert words[2] in ("submit", "stop", "logs"), words[2]
    if words[1] in ("up", "down", "dashboard"):
        assert (REPO / words[2]).is_file(), words[2]
    if "--" in words:
        _python(words[words.index("--") + 1 :])


def _sbatch(words: list[str]) -> None:
    script = next(place for place, word in enumerate(words[1:], start=1) if not word.startswith("--"))
    assert (REPO / words[script]).is_file(), words[script]
    _python(["python", *words[script + 1 :]])


def _kubectl(words: list[str]) -> None:
    assert words[1] in ("apply", "logs", "port-forward"), words[1]
    if words[1] == "apply":
        assert (REPO / options(words, "-f")[0]).is_file()


def _docker(words: list[str]) -> None:
    assert words[1] in ("build", "push"), words[1]
    assert all((REPO / file).is_file() for file in options(words, "-f"))


def _nothing(words: list[str]) -> None:
    """A command of the shell, or of a tool that is not ours."""
