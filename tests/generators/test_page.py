"""docs/tutorials/other-generators.md: its class, its config and its commands, as they stand there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.docs.pages import PYTHON, YAML, blocks, commands

PAGE = "docs/tutorials/other-generators.md"
REPO = Path(__file__).parents[2]


def test_the_page_runs(tmp_path: Path) -> None:
    (module,) = (block.text for block in blocks(PAGE) if block.language == PYTHON)
    (config,) = (block.text for block in blocks(PAGE) if block.language == YAML)
    (tmp_path / "my_generator.py").write_text(module)
    (tmp_path / "generate.yaml").write_text(config)
    (tmp_path / "ages.csv").write_text("age\n" + "".join(f"{age}\n" for age in range(30, 70, 10)))
    run = [command.words for command in commands(PAGE) if not command.quoted]
    assert [words[:2] for words in run[1:]] == [["brainsynth", verb] for verb in ("generate", "verify", "regenerate")]
    environment = {"PYTHONPATH": f"{REPO}:.", "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for words in run[1:]:
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert "2 of 2 rows have the voxels that their records name" in done.stdout
