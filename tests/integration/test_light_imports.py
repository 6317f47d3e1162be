"""What is imported when: a plan needs no torch, a mistake in a config needs no large library at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from brainsynth.config.load import load_config
from brainsynth.config.schema import GenerateConfig
from brainsynth.planning import plan_generation

CONFIG = Path(__file__).parents[2] / "configs" / "demo" / "generate.yaml"
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from brainsynth.__main__ import main

main(sys.argv[1:])
"""
COUNT = """
import sys
import brainsynth.__main__, brainsynth.cli, brainsynth.stages.generate, brainsynth.generate
print(sum(name.partition(".")[0] == "brainsynth" for name in sys.modules))
"""


def brainsynth_without(absent: tuple[str, ...], *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line where some libraries are not installed."""
    command = [sys.executable, "-c", WITHOUT.format(absent=absent), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_dry_run_needs_no_torch(tmp_path: Path) -> None:
    output = tmp_path / "generated"
    words = ("generate", "--config", CONFIG, "--set", f"output={output}", "--dry-run")
    done = brainsynth_without(("torch", "monai", "ray"), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    config = load_config(CONFIG, GenerateConfig, [f"output={output}"])
    work = plan_generation(config)
    assert f"plan {work.plan.fingerprint[:12]} (generated) → {output}" in done.stdout
    assert "no estimate of the time: it is measured on one micro-batch, and torch is not installed" in done.stdout
    assert not output.exists()


@pytest.mark.parametrize("library", ["torch", "monai", "ray", "scipy", "pandas", "zarr", "pyarrow", "matplotlib"])
def test_a_misspelt_key_is_reported_before_a_large_library_is_imported(library: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.read_text().replace("sampler:", "samplr:"))
    done = brainsynth_without((library,), "generate", "--config", path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "samplr: unknown key; did you mean 'sampler'?" in done.stderr


def test_generation_imports_no_more_than_it_uses() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) <= 80
