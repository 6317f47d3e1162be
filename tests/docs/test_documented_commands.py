"""Every command of the documentation runs here, in the order of its page, on small inputs; or says below why it cannot."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.checking import check, check_yaml, flags
from tests.docs.pages import DIRECTIVE, PAGES, PYTHON, REPO, SHELL, SHOWN, YAML, Block, Command, blocks, commands
from tests.docs.sandbox import Sandbox

EXCEPTIONS = {
    r"^make demo(-train)?$": "minutes; the long suite runs them on smaller configs, below",
    r"^make (test|test-all|lint|chaos|bench|bench-long)$": "the suites and benchmarks themselves",
    r"^make docs$": "tests/docs/test_site.py builds the site",
    r"^python -m (benchmarks|recipes)\.": "minutes to hours, mostly on real scans; its JSON is the result",
    r"^(python )?-m pytest|^ROCRATE_VALIDATOR=": "a test, with a tool that the lock does not hold",
    r"^brainsynth .*configs/t1w-2mm-pyramid/": "needs the real scans; the page runs the same jobs on procedural brains",
    r"^brainsynth .*--set dataset=brains ": "needs the real scans and 5,000 volumes; docs/first-real-run.md has these jobs",
    r"^brainsynth vary --scan ": "needs a person's scan; tests/integration/test_scan_in.py runs it on a phantom",
    r"^brainsynth .*runs/mine/": "needs 40 scans of the reader's; tests/integration/test_fine_tune.py runs it on phantoms",
    r"^pip install ": "installs brainsynth; tests/installation does, from the wheel",
    r"^uv tool install ": "installs a tool that the lock does not hold",
    r"^source .venv/bin/activate$": "the tests run in such an environment",
    r"^brainsynth view (?!.*--static)": "serves until it is stopped; tests/viewer starts it",
    r"^brainsynth view URI": "in a sentence; docs/viewer.md has it with names",
    r"^ray (start|job)": "needs a cluster; tests/integration/test_submit.py submits jobs to one",
    r"^ray (up|down|dashboard|get-auth-token)": "needs an account at AWS; tests/cluster judges the file as Ray would",
    r"^sbatch ": "needs Slurm; tests/cluster/test_slurm.py runs the script without it",
    r"^(docker|kubectl) ": "needs a registry or Kubernetes; tests/cluster reads the same files",
    r"^export RAY_AUTH_": "for a cluster's clients",
    r"^brainsynth import-bundle\s+--": "needs the zoo's 2.2 GB; tests/integration/test_published.py imports such files",
    r"--set functions=": "needs a module of the reader's own; tests/integration/test_evaluate_rulers.py has one",
    r"^export BRAINSYNTH_FUNCTIONS=": "the same",
    r"^brainsynth verify URI --repair --failed$|^brainsynth verify FOLDER": "tests/storage/test_repair.py damages one first",
    r"^brainsynth push (?!.*--dry-run)": "needs the hub; tests/integration/test_release.py pushes to one of its own",
    r"^sha256sum -c SHA256SUMS$": "the tutorial on publishing runs it where the file is",
    r"^brainsynth [a-zA-Z-]+$|^make [a-z-]+$": "a name in a sentence, when it is quoted",
}
"""Why a command does not run in these tests. That it could start is checked all the same."""

ELSEWHERE = {
    "docs/reading.md": "tests/reading/test_examples.py",
    "docs/reference/python.md": "tests/test_public.py",
    "docs/tutorials/other-generators.md": "tests/generators/test_page.py",
    "docs/recipe.md": "tests/integration/test_recipe.py",
    "docs/teaching.md": "tests/docs/test_teaching.py",
}
"""Pages whose blocks another test runs, verbatim."""

FIRST = "docs/tutorials/own-cohort.md"
QUICK = [
    FIRST, "docs/tutorials/publish.md", "docs/tutorials/monai.md", "docs/covariates.md", "docs/cases.md", "README.md",
    "docs/quick-start.md", "docs/published-weights.md", "docs/publication.md", "docs/reliability.md",
    "docs/troubleshooting.md", "docs/labels.md", "docs/pyramid.md",
    "docs/viewer.md",
]  # fmt: skip
"""In this order, on what the first of them makes."""

SLOW = "docs/cases.md"
"""Of these; tests/integration/test_cases.py always runs its commands as far as --dry-run."""

LONG = [
    "docs/first-real-run.md", "docs/audit.md", "docs/evaluation.md", "docs/distilled-decoder.md",
    "docs/distilled-steps.md", "brainsynth/bundled/t1w-2mm/README.md",
]  # fmt: skip
"""In this order, on phantoms at the place of the real scans."""


def reason(command: Command) -> str | None:
    """Why a command does not run; None where it does."""
    for pattern, why in EXCEPTIONS.items():
        if re.search(pattern, command.text) and (why[0:6] != "a name" or command.quoted):
            return why
    return None


def runnable(page: str) -> list[Command]:
    return [] if page in ELSEWHERE else [command for command in commands(page) if reason(command) is None]


def python_blocks(page: str) -> list[Block]:
    return [] if page in ELSEWHERE else [block for block in blocks(page) if block.language == PYTHON]


def test_every_block_says_what_it_is() -> None:
    """A block without a language, or an indented one, would be run by nobody."""
    known = (*SHELL, PYTHON, YAML, *SHOWN)
    strange = [b for page in PAGES for b in blocks(page) if b.language not in known and not DIRECTIVE.match(b.language)]
    assert [f"{b.page}:{b.line}: {b.language!r}" for b in strange] == []


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_could_start(page: str) -> None:
    for command in commands(page):
        check(command)


def test_every_page_that_has_something_to_run_is_run() -> None:
    having = {page for page in PAGES if runnable(page) or python_blocks(page)}
    assert having == {*QUICK, *LONG}


def test_every_exception_is_needed() -> None:
    written = [command.text for page in PAGES for command in commands(page)]
    assert [pattern for pattern in EXCEPTIONS if not any(re.search(pattern, text) for text in written)] == []


def test_every_config_that_a_page_shows_is_one() -> None:
    shown = [block for page in PAGES for block in blocks(page) if block.language == YAML]
    assert len(shown) >= 5
    for block in shown:
        check_yaml(block)


@pytest.mark.parametrize(
    "text",
    [
        "brainsynth generate --config configs/demo/generate.yaml --set covariates.drew=10",
        "python jobs/generate.py --config configs/demo/absent.yaml",
        "python jobs/generates.py --config configs/demo/generate.yaml",
        "python -m benchmarks.ladder --fool",
        "brainsynth verify URI --repare",
        "make everything",
        "curl https://example.org",
    ],
)
def test_the_check_finds_mistakes(text: str) -> None:
    with pytest.raises(Exception, match=re.escape(text.split()[1][:8]) + "|fool|curl"):
        check(Command("page.md", 1, text, quoted=False))


def run_page(sandbox: Sandbox, page: str) -> None:
    """Its shell commands and its Python, in the order of the page."""
    things = sorted([*runnable(page), *python_blocks(page)], key=lambda thing: thing.line)
    assert things
    sandbox.folder = sandbox.root
    for thing in things:
        if isinstance(thing, Command):
            sandbox.run(thing)
        else:
            sandbox.run_python(thing.text, f"{thing.page}:{thing.line}")


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """After the tutorial on the whole line, with what it made also at the other names that pages use."""
    sandbox = Sandbox(tmp_path_factory.mktemp("laptop"))
    run_page(sandbox, FIRST)
    made, data = sandbox.root / "demo-train-output", sandbox.root / "data"
    (sandbox.root / "demo-output").symlink_to(made)
    for name, target in (("bundle", "bundle"), ("published", "bundle"), ("audit", "audit"), ("generated", "generated")):
        (data / name).symlink_to(made / target)
    rows = next(block.text for block in blocks("docs/published-weights.md") if block.text.startswith("sample_id,"))
    (data / "rows.csv").write_text(rows)
    release = next(block.text for block in blocks("docs/publication.md") if block.language == YAML)
    (sandbox.root / "release.yaml").write_text(release.replace("/data/", f"{data}/"))
    sandbox.places |= {"URI": "demo-train-output/generated", "BUNDLE": "demo-train-output/bundle", "ID": "syn000003"}
    sandbox.places = {"output=/data/generated": f"output={data}/of-published"} | sandbox.places
    return sandbox


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if p == SLOW else p for p in QUICK])
def test_the_commands_of_a_page_run(page: str, laptop: Sandbox) -> None:
    if page != FIRST:  # it ran first: see `laptop`
        run_page(laptop, page)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """Phantoms where the configs of real runs have real scans; the two model runs are one."""
    from brainsynth.cohort.phantom_cohort import write_phantom_cohort
    from tests.docs.sandbox import PEOPLE
    from tests.line import GRID

    sandbox = Sandbox(tmp_path_factory.mktemp("lab"))
    write_phantom_cohort(sandbox.root / "phantoms", PEOPLE, 3, GRID)
    (sandbox.root / "runs" / "ixi-4mm").mkdir(parents=True)
    (sandbox.root / "runs" / "t1w-2mm").symlink_to("ixi-4mm")
    return sandbox


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG)
def test_the_commands_of_a_long_page_run(page: str, lab: Sandbox) -> None:
    run_page(lab, page)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["demo", "demo-train"])
def test_the_demos_run(target: str, tmp_path: Path) -> None:
    """What `make` would run, on the small configs."""
    Sandbox(tmp_path).run(Command("Makefile", 1, f"make {target}", quoted=False))
    assert (tmp_path / f"{target}-output/generated/report.html").is_file()


def documented_benchmarks() -> list[str]:
    """Their modules."""
    documented = [command for page in PAGES for command in commands(page)]
    return sorted({c.words[2] for c in documented if re.search(r"^python -m (benchmarks|recipes)\.", c.text)})


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", documented_benchmarks())
def test_a_documented_benchmark_starts(benchmark: str, tmp_path: Path) -> None:
    """Its imports work and its parser answers; a benchmark without a parser would run in earnest."""
    script = REPO / (benchmark.replace(".", "/") + ".py")
    if "ArgumentParser" not in script.read_text():
        assert flags(script) == set()
        return
    done = subprocess.run(
        [sys.executable, "-m", benchmark, "--help"], cwd=REPO, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
