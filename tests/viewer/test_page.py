"""The page in a real browser, headless: quiet, nothing fetched, and it does what it is for."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from brainsynth import cli
from brainsynth.storage.commit import write_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.finalise import finalise
from brainsynth.viewer.server import ViewServer
from brainsynth.volume import VolumeSpec
from tests.viewer.chromium import BROWSER, Chromium
from tests.viewer.conftest import PEOPLE, commit, plan_of, samples_of, served, write

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed here")
READY = "document.body?.dataset.ready === 'yes'"
SHOWN = "document.body.dataset.shown"
COUNT = "Number(document.getElementById('table').getAttribute('aria-rowcount')) - 1"
SUBJECT = "document.querySelector('[role=columnheader][data-key=\"\"]')"
SERIES = [f"syn{row:06d}" for row in range(PEOPLE, PEOPLE + 6)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One browser for all tests here."""
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server(finished: Path) -> Iterator[ViewServer]:
    with served(finished) as server:
        yield server


@pytest.fixture
def page(browser: Chromium, server: ViewServer) -> Iterator[Chromium]:
    """The page at its first subject, unfiltered; at the end nothing may have been complained of, nor asked of anybody else.

    It is opened once: to compile NiiVue's shaders without a graphics card takes seconds.
    """
    browser.complaints.clear()
    if not browser.run("location.href").startswith(server.address):
        browser.requests.clear()
        browser.open(server.address, READY)
    browser.run("document.getElementById('clear').click()")
    while browser.run(f"{SUBJECT}.getAttribute('aria-sort')") != "ascending":
        browser.run(f"{SUBJECT}.firstChild.click()")
    browser.run("[...document.querySelectorAll('button')].find(e => e.textContent === 'Reset view').click()")
    browser.run("document.activeElement.blur()")
    browser.press("Home")
    browser.wait(f"{SHOWN} === 'syn000000'")
    yield browser
    assert browser.complaints == []
    elsewhere = [r for r in browser.requests if not r.startswith((server.address, "data:", "blob:", "about:"))]
    assert elsewhere == []


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return int(str(ended.value.code))


def pixels(page: Chromium, selector: str = "#volume") -> npt.NDArray[np.float64]:
    """(height, width) brightness of what is on the screen, 0 to 255."""
    return np.asarray(Image.open(io.BytesIO(page.picture(selector))).convert("L"), dtype=np.float64)


def choose(page: Chromium, sample_id: str) -> None:
    """Click on a subject's row, and wait for its picture."""
    page.run(f"[...document.querySelectorAll('.line')].find(e => e.textContent.startsWith('{sample_id}')).click()")
    page.wait(f"{SHOWN} === '{sample_id}'")


def put(page: Chromium, selector: str, value: object, event: str = "input") -> None:
    """Give a control a value, as a person does."""
    page.run(
        f"(e => {{ e.value = '{value}'; e.dispatchEvent(new Event('{event}', {{bubbles: true}})) }})"
        f"(document.querySelector({selector!r}))"
    )


def test_it_opens_with_a_picture_and_without_a_complaint(page: Chromium) -> None:
    assert page.run(SHOWN) == "syn000000"
    assert page.run("document.getElementById('marking').textContent") == "Synthetic; not for diagnosis"
    assert page.run("document.getElementById('counts').textContent") == "18 ok · 1 rejected · 1 failed"
    assert page.run(COUNT) == 20
    picture = pixels(page)
    assert picture.std() > 20
    height, width = picture.shape
    for part in (picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :], picture[height // 2 :]):
        assert (part > 100).mean() > 0.02  # a slice in each


def test_filters_narrow_the_table(page: Chromium) -> None:
    put(page, '[name="age.low"]', 60, "change")
    assert page.run(COUNT) == 6
    page.run("document.querySelector('[name=sex][value=M]').click()")
    assert page.run(COUNT) == 4
    assert page.run("document.getElementById('shown').textContent") == "4 of 20"
    page.run("document.querySelector('[name=extrapolated][value=yes]').click()")
    assert page.run(COUNT) == 2
    page.run("document.getElementById('clear').click()")
    assert page.run(COUNT) == 20
    put(page, '[name="gate_score.low"]', 0.5, "change")
    assert page.run(COUNT) == 10
    page.run("document.getElementById('clear').click()")
    for name in ("ok", "failed"):
        page.run(f"document.querySelector('[name=status][value={name}]').click()")
    assert page.run(COUNT) == 1
    page.run("document.getElementById('clear').click()")
    put(page, "#search", "00001")
    assert page.run(COUNT) == 11  # 1 and 10 to 19


def test_the_table_sorts(page: Chromium) -> None:
    first = "document.querySelector('.line').textContent"
    page.run("document.querySelector('[data-key=ventricular_volume] button').click()")
    assert page.run(first).startswith("syn000000")
    page.run("document.querySelector('[data-key=ventricular_volume] button').click()")
    assert page.run(first).startswith("syn000013")
    assert page.run("document.querySelector('[data-key=ventricular_volume]').getAttribute('aria-sort')") == "descending"


def test_another_subject_is_another_picture(page: Chromium) -> None:
    before = pixels(page)
    choose(page, "syn000012")
    assert np.abs(pixels(page) - before).mean() > 1
    assert page.run("location.hash") == "#syn000012"


def test_asked_and_measured_stand_side_by_side(page: Chromium) -> None:
    choose(page, "syn000007")
    cells = "[...document.querySelectorAll('tr[data-covariate={}] td')].map(e => e.textContent.replace('\\u00a0', ' '))"
    assert page.run(cells.format("age")) == ["48", "50.5", "+2.5"]
    assert page.run(cells.format("sex")) == ["M", "M 90 %", "agrees"]
    assert page.run(cells.format("ventricular_volume")) == ["47", "51.7", "+4.7"]
    assert "years" in page.run("document.querySelector('tr[data-covariate=age] th').textContent")
    assert "by an evaluation" in page.run("document.getElementById('panel').textContent")
    for part in ("#details", "#stage", "#filters", "body"):  # nothing sticks out of its place
        box = f"document.querySelector('{part}')"
        assert page.run(f"{box}.scrollWidth <= {box}.clientWidth"), part
    choose(page, SERIES[5])
    assert "extrapolated" in page.run("document.getElementById('panel').textContent")


def test_a_row_without_a_picture_says_why(page: Chromium) -> None:
    choose(page, "syn000003")
    assert page.run("document.getElementById('absent').hidden") is False
    assert "<img src=x onerror=alert(1)>" in page.run("document.getElementById('absent').textContent")
    assert page.run("document.images.length") == 0  # what a dataset says is text, never HTML
    assert page.run("document.querySelector('.tag').textContent") == "rejected"
    choose(page, "syn000005")
    assert "out of memory" in page.run("document.getElementById('absent').textContent")
    choose(page, "syn000006")
    assert page.run("document.getElementById('absent').hidden") is True


def test_keys_go_from_subject_to_subject(page: Chromium) -> None:
    page.press("ArrowDown")
    page.wait(f"{SHOWN} === 'syn000001'")
    page.press("End")
    page.wait(f"{SHOWN} === '{SERIES[5]}'")
    page.press("ArrowUp")
    page.wait(f"{SHOWN} === '{SERIES[4]}'")
    page.run("document.querySelector('#planes input').focus()")
    page.press("ArrowUp")
    assert page.run("location.hash") == f"#{SERIES[4]}"  # a slider keeps its keys
    page.run("document.activeElement.blur()")
    page.press("/")
    assert page.run("document.activeElement.id") == "search"


def test_a_slider_scrolls_a_slice(page: Chromium) -> None:
    before = pixels(page)
    put(page, '#planes input[aria-label="Down – up"]', 3)
    after = pixels(page)
    changed = np.abs(after - before) > 30
    height, width = changed.shape
    # The axial slice is another; in the other two only the crosshair has moved.
    assert changed[height // 2 :, : width // 2].mean() > 3 * changed[: height // 2].mean()


def test_a_series_is_stepped_through_at_one_place(page: Chromium) -> None:
    choose(page, SERIES[0])
    assert page.run("document.getElementById('series').hidden") is False
    outputs = "[...document.querySelectorAll('#series output')].map(e => e.textContent)"
    assert page.run(outputs) == ["30 years", "10 ml"]
    put(page, '#planes input[aria-label="Left – right"]', 6)
    place = page.run("document.querySelector('#planes output').textContent")
    before = pixels(page)
    put(page, '#series input[aria-label="ventricular volume"]', 1)
    page.wait(f"{SHOWN} === '{SERIES[1]}'")
    assert page.run(outputs) == ["30 years", "80 ml"]
    assert np.abs(pixels(page) - before).mean() > 1
    assert page.run("document.querySelector('#planes output').textContent") == place
    page.press("ArrowRight")
    page.wait(f"{SHOWN} === '{SERIES[3]}'")
    assert page.run(outputs) == ["50 years", "80 ml"]
    page.press("p")
    for row in (5, 1, 3):  # plays on, and around
        page.wait(f"{SHOWN} === '{SERIES[row]}'")
    page.press("p")
    choose(page, "syn000000")
    assert page.run("document.getElementById('series').hidden") is True


def test_a_dot_opens_its_subject(page: Chromium) -> None:
    assert page.run("document.querySelectorAll('#scatter figure').length") == 3
    caption = page.run("document.querySelector('figure[data-covariate=age] figcaption').textContent")
    assert caption == "r 1 · measured − asked +2.5 ± 0 years · n 18"
    found = page.run("""(() => {
      const canvas = document.querySelector('figure[data-covariate=age] canvas');
      const {left, top, width, height} = canvas.getBoundingClientRect();
      const seen = new Set();
      for (let x = 50; x < width; x += 8) for (let y = 5; y < height - 30; y += 8) {
        canvas.dispatchEvent(new MouseEvent('click', {clientX: left + x, clientY: top + y, bubbles: true}));
        seen.add(location.hash.slice(1));
      }
      return [...seen];
    })()""")
    assert {"syn000000", "syn000007", SERIES[4]} <= set(found)
    assert not {"syn000003", "syn000005"} & set(found)  # nothing was measured on what is not there
    page.wait(f"{SHOWN} === location.hash.slice(1)")


def test_a_switch_lays_the_label_map_over_the_picture(browser: Chromium, page: Chromium, labelled: Path) -> None:
    assert page.run("document.getElementById('labels')") is None  # a dataset without label maps has no switch
    shown, switch = "document.body.dataset.labels", "document.getElementById('labels').click()"
    with served(labelled) as server:
        browser.open(server.address, READY)
        legend = "[...document.querySelectorAll('.structures dt')].map(e => e.textContent)"
        assert browser.run(legend) == ["band 1", "band 2", "band 3"]
        assert browser.run("document.querySelector('.structures dd').textContent").endswith(" ml")
        plain = colours(browser)
        assert colourful(plain) < 0.02
        browser.run(switch)
        browser.wait(f"{shown} === '0'")
        overlaid = colours(browser)
        assert colourful(overlaid) > 0.1
        put(browser, '#planes input[aria-label="Labels"]', 1)
        assert np.abs(colours(browser) - overlaid).mean() > 1
        browser.press("ArrowDown")
        browser.wait(f"{SHOWN} === 'syn000001' && {shown} === '1'")
        browser.run(switch)
        browser.wait(f"{shown} === ''")
        assert colourful(colours(browser)) < 0.02
        browser.open("about:blank", "true")
    browser.requests.clear()


def colours(page: Chromium) -> npt.NDArray[np.float64]:
    """(height, width, 3) of what is on the screen, without the crosshair's column and row: the axial slice's quarter."""
    picture = np.asarray(Image.open(io.BytesIO(page.picture("#volume"))).convert("RGB"), dtype=np.float64)
    height, width, _ = picture.shape
    return picture[height // 2 :, : width // 2]


def colourful(picture: npt.NDArray[np.float64]) -> float:
    """Share of the pixels that are not grey."""
    return float((picture.max(2) - picture.min(2) > 40).mean())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_light_and_on_dark(page: Chromium, scheme: str) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    try:
        colours = page.run("""(() => {
          const style = getComputedStyle(document.documentElement);
          const names = ['page', 'panel', 'text', 'muted', 'accent', 'mark', 'warn', 'warn-back', 'soft', 'ok', 'bad'];
          return Object.fromEntries(names.map(n => [n, style.getPropertyValue('--' + n).trim()]));
        })()""")
    finally:
        page.call("Emulation.setEmulatedMedia", features=[])
    pairs = [(a, "panel") for a in ("text", "muted", "accent", "mark", "ok", "bad")]
    pairs += [("text", "page"), ("muted", "page"), ("text", "soft"), ("muted", "soft"), ("warn", "warn-back")]
    assert {pair for pair in pairs if contrast(colours[pair[0]], colours[pair[1]]) < 4.5} == set()


def contrast(a: str, b: str) -> float:
    """The ratio of WCAG 2 between two colours, #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_running_dataset_fills_up_by_itself(browser: Chromium, tmp_path: Path) -> None:
    plan, samples = write(str(tmp_path / "running"), finished=False, shards=0)
    store = open_store(str(tmp_path / "running"))
    browser.complaints.clear()
    with served(tmp_path / "running") as server:
        browser.open(server.address, READY)
        assert "still being made: 0 of 20 rows" in browser.run("document.getElementById('counts').textContent")
        commit(store, plan, samples, 0)
        browser.wait(f"{SHOWN} === 'syn000000'")
        assert "still being made: 5 of 20 rows" in browser.run("document.getElementById('counts').textContent")
        put(browser, '[name="age.low"]', 28, "change")
        assert browser.run(COUNT) == 3
        for index in range(1, plan.num_shards):
            commit(store, plan, samples, index)
        finalise(store, plan)
        browser.wait("document.getElementById('counts').textContent === '18 ok · 1 rejected · 1 failed'")
        assert browser.run(COUNT) == 18  # the filter stays, and is still open above
        browser.open("about:blank", "true")
    assert browser.complaints == []


def test_of_many_rows_only_those_in_sight_are_in_the_page(browser: Chromium, tmp_path: Path) -> None:
    rows, root = 3000, str(tmp_path / "many")
    one = samples_of().iloc[[0]]
    samples = one.loc[one.index.repeat(rows)].reset_index(drop=True)
    samples["sample_id"] = [f"syn{row:06d}" for row in range(rows)]
    samples["seed"] = range(rows)
    samples["age"] = np.linspace(20, 80, rows)
    tiny = VolumeSpec(shape_xyz=(4, 5, 6), spacing_mm=(30.0, 30.0, 30.0), origin_mm=(0.0, 0.0, 0.0))
    plan, store = plan_of(samples, tiny, per_shard=1000), open_store(root)
    write_plan(store, plan, samples)
    for index in range(plan.num_shards):
        commit(store, plan, samples, index)
    finalise(store, plan)
    browser.complaints.clear()
    browser.requests.clear()
    with served(root) as server:
        browser.open(server.address, READY)
        assert browser.run(COUNT) == rows
        assert browser.run("document.querySelectorAll('.line').length") < 100
        browser.press("End")
        browser.wait(f"{SHOWN} === 'syn002999'")
        browser.wait("!!document.querySelector('.line[aria-selected=true]')")
        assert browser.run("document.querySelectorAll('.line').length") < 100
        browser.open("about:blank", "true")
    assert sum(".nii" in request for request in browser.requests) < 10
    assert browser.complaints == []


def test_a_site_of_files_needs_no_server(
    browser: Chromium, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    words = ["view", str(finished), "--static", str(site)]
    assert command(*words) == 0
    assert f"open {site}/index.html in a browser" in capsys.readouterr().out
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(f"{site.as_uri()}/index.html", READY)
    browser.wait(f"{SHOWN} === 'syn000000'")
    assert browser.run(COUNT) == PEOPLE + 6
    first = pixels(browser)
    assert first.std() > 20
    choose(browser, "syn000013")
    assert np.abs(pixels(browser) - first).max() > 20
    assert browser.complaints == []
    assert [r for r in browser.requests if not r.startswith((site.as_uri(), "data:", "blob:", "about:"))] == []
    assert command(*words) == 2
    assert "is not empty" in capsys.readouterr().err
