"""The page of an evaluation with trajectories, opened in a real browser: whole, quiet, and nothing fetched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.config.schema import GenerateConfig
from brainsynth.errors import UserError
from brainsynth.stages import evaluate, generate
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import open_store
from tests.line import Line, as_config

SEEDS, POINTS = 2, 3
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# Each picture is drawn on a canvas: how large it is, and by how much its brightness varies.
PROBE = """
<script>
const broken = [];
document.addEventListener('securitypolicyviolation', e => broken.push('not allowed: ' + e.blockedURI));
window.addEventListener('load', () => {
  const images = [...document.images].map(image => {
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    if (!canvas.width) return {alt: image.alt, width: 0, spread: 0, shown: image.getBoundingClientRect().width};
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let low = 255, high = 0;
    for (let i = 0; i < data.length; i += 4) { low = Math.min(low, data[i]); high = Math.max(high, data[i]); }
    const shown = image.getBoundingClientRect().width;
    return {alt: image.alt, width: canvas.width, spread: high - low, shown};
  });
  const fetched = performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'));
  const found = {images, broken, fetched, width: document.documentElement.scrollWidth, window: innerWidth};
  const out = document.createElement('pre');
  out.id = 'probe'; out.textContent = JSON.stringify(found);
  document.body.appendChild(out);
});
</script>
"""


@pytest.fixture(scope="module")
def evaluation(line: Line, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The output of an evaluation of a tiny model's volumes, and its config."""
    root = tmp_path_factory.mktemp("page")
    generate.run(as_config(line.generate(root / "generated"), GenerateConfig, root))
    config = {
        "dataset": str(root / "generated"),
        "reference": str(line.root / "cohort"),
        "output": str(root / "evaluation"),
        "pairs": 5,
        "features": {"steps": 2},
        "trajectories": {
            "bundle": str(line.root / "bundle"),
            "sampler": {"method": "ab2", "steps": 2},
            "seeds": SEEDS,
            "points": POINTS,
        },
        "runtime": {"workers": 0},
    }
    evaluate.run(as_config(config, EvaluateConfig, root))
    return root / "evaluation", config


def test_one_covariate_moves_and_the_noise_stays(evaluation: tuple[Path, dict[str, Any]]) -> None:
    output, _ = evaluation
    store = open_store(str(output / "trajectories"))
    rows = read_samples(store, read_plan(store))
    assert len(rows) == 2 * POINTS * SEEDS
    assert rows["seed"].nunique() == SEEDS
    for name, other in (("age", "ventricular_volume"), ("ventricular_volume", "age")):
        part = rows[rows["sample_id"].str.startswith(name.replace("_", ""))]
        assert part[name].nunique() == POINTS
        assert part[[other, "brain_volume", "sex"]].drop_duplicates().shape[0] == 1
    numbers = json.loads((output / "report.json").read_text())
    assert [line["covariate"] for line in numbers["trajectories"]] == ["age", "ventricular_volume"]
    for line in numbers["trajectories"]:
        assert np.shape(line["measured"]) == (SEEDS, POINTS)
        assert np.isfinite(line["measured"]).all()
        assert line["asked"] == sorted(line["asked"])


def test_the_report_says_which_network_and_what_is_not_judged(evaluation: tuple[Path, dict[str, Any]]) -> None:
    output, _ = evaluation
    numbers = json.loads((output / "report.json").read_text())
    assert "brainsynth's embedder" in numbers["facts"]["feature network"]
    assert any("no bias at any n" in remark for remark in numbers["remarks"])
    page = (output / "report.html").read_text()
    order = [
        page.index(heading) for heading in ("Verdicts", "Distributions", "Asked against", "Slices", "One covariate")
    ]
    assert order == sorted(order)


def test_mistakes_in_networks_and_trajectories_are_told(
    evaluation: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, config = evaluation
    config = config | {"output": str(tmp_path / "out")}
    (tmp_path / "no-weights.pth").write_bytes(b"nothing")
    moved = config["trajectories"]
    for changes, message in (
        ({"features": {"medicalnet": str(tmp_path / "absent.pth")}}, "features.medicalnet: there are no weights"),
        ({"features": {"medicalnet": str(tmp_path / "no-weights.pth")}}, "nothing in it was executed"),
        ({"features": {"embedder": str(tmp_path / "absent.safetensors")}}, "features.embedder: there are no weights"),
        ({"trajectories": moved | {"covariates": ["height"]}}, "height is not a continuous covariate of the model"),
        ({"trajectories": moved | {"bundle": str(tmp_path)}}, "is not a bundle"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.describe(as_config(config | changes, EvaluateConfig, tmp_path))
    assert not (tmp_path / "out").exists()


def opened(page: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the probe saw on a page, and what the browser's console said."""
    if BROWSER is None:
        pytest.skip("no chromium or chrome on PATH: apt-get install chromium")
    file = folder / "page.html"
    allowed = page.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    assert allowed != page, "the page has no content security policy"
    file.write_text(allowed.replace("<style>", PROBE + "<style>", 1))
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--enable-logging=stderr", "--v=0", "--window-size=1280,1000"),
            *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom", file.as_uri()),
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_shows_every_figure_and_fetches_nothing(
    evaluation: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    page = (evaluation[0] / "report.html").read_text()
    found, console = opened(page, tmp_path)
    assert console == []
    assert found["broken"] == []
    assert found["fetched"] == []
    assert len(found["images"]) == page.count("<img") >= 12
    for image in found["images"]:
        assert image["width"] >= 200, image
        assert image["spread"] >= 100, image
        assert image["shown"] > 100, image
    assert found["width"] <= found["window"]


def test_the_probe_sees_what_it_looks_for(tmp_path: Path) -> None:
    blank = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    page = (
        '<!doctype html><html><head><title>x</title><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"><style></style></head>"
        f'<body><img alt="blank" src="{blank}"><img alt="far" src="http://127.0.0.1:9/x.png"></body></html>'
    )
    found, console = opened(page, tmp_path)
    assert any("127.0.0.1:9" in line for line in found["broken"])
    assert console
    assert [image["spread"] for image in found["images"]] == [0, 0]
