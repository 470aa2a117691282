"""The page in Chromium: it draws, it answers to pointer and keys, and it asks nobody for anything."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE

from bpn_lightning.report.cli import main

pytestmark = pytest.mark.slow

Make = Callable[..., Path]

MATRIX: list[list[float | None]] = [
    [0.125, 0.0625, None],
    [8 / 9, 0.25, 0.1],
    [0.75, 0.9375, 0.2],
    [0.5, 5 / 7, 1.0],
]


@dataclass
class Opened:
    """A page in the browser, and what went wrong or out while it was open."""

    page: Any
    address: str
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Makes the page of a folder, once."""

    @cache
    def make(folder: Path) -> Path:
        out = tmp_path_factory.mktemp("page") / "page.html"
        assert main([str(folder), "--out", str(out)]) == 0
        return out

    return make


@pytest.fixture
def opened(browser: Any, page_of: Callable[[Path], Path]) -> Iterator[Callable[..., Opened]]:
    """Makes the page of a folder and opens it from disk; in the end, nothing may have gone wrong."""
    seen: list[Opened] = []
    contexts = []

    def open_page(folder: Path, width: int = 1280, **options: Any) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        one = Opened(context.new_page(), page_of(folder).as_uri())
        one.page.set_default_timeout(1000 * PATIENCE)
        one.page.on("console", lambda message: one.messages.append(message.text))
        one.page.on("pageerror", lambda error: one.messages.append(str(error)))
        one.page.on("request", lambda request: one.requests.append(request.url))
        one.page.goto(one.address)
        seen.append(one)
        return one

    yield open_page
    for one in seen:
        assert one.messages == []
        assert [url for url in one.requests if not url.startswith("data:")] == [one.address]
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def three(make_run_in: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two seeds, three tasks."""
    place = tmp_path_factory.mktemp("three")
    for method in ("ewc", "bd+ewc"):
        for seed in range(2):
            points = [
                {"epoch": epoch, "task": epoch // 2, "accuracy": [0.5, 0.25, epoch / 8]}
                for epoch in range(6)
            ]
            make_run_in(place, method, seed, MATRIX, extra={"curve": points})
    return place / "runs"


def test_values_are_those_of_results_json(opened: Callable[..., Opened], three: Path) -> None:
    page = opened(three).page
    rows = page.locator("#values tbody tr")
    shown = [
        [cell.get_attribute("value") for cell in row.locator("data").all()] for row in rows.all()
    ]
    results = json.loads((three / "digits_inc" / "bd+ewc" / "seed_0" / "results.json").read_text())
    assert [float(value) for value in shown[-1]] == pytest.approx(
        results["accuracy"]["per_task"], abs=5e-6
    )
    assert len(shown[0]) == 2  # not measured before training
    row = page.locator("table.sortable").first.locator("tbody tr").first
    assert row.locator("data").first.get_attribute("value") == repr(results["accuracy"]["average"])


def test_the_slider_goes_over_the_stream_by_keyboard(
    opened: Callable[..., Opened], three: Path
) -> None:
    page = opened(three).page
    state, slider = page.locator("#state"), page.locator("#moment")
    assert "after task 3 (c2), 3 of 3 tasks" in state.inner_text()
    assert "Mean over the tasks learned: 0.738; task 1: 0.500." in state.inner_text()
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert "after task 2 (c1), 2 of 3 tasks" in state.inner_text()
    assert "Mean over the tasks learned: 0.844; task 1: 0.750." in state.inner_text()
    assert slider.get_attribute("aria-valuetext") == state.inner_text()
    meters = page.locator("#bars meter").all()
    assert [meter.evaluate("e => e.value") for meter in meters] == [0.75, 0.9375, 0.2]
    assert page.locator("#bars .ahead").count() == 1
    assert page.locator("#values tr.now th").inner_text() == "2"
    assert page.locator("#curves [id^=now-].shown").get_attribute("id") == "now-2"
    page.keyboard.press("Home")
    assert "before training" in state.inner_text()
    page.locator("#run").select_option(label="ewc, seed 1")
    assert "ewc, seed 1, after task 3" in state.inner_text()


def test_cells_are_read_by_pointer_and_by_keys(opened: Callable[..., Opened], three: Path) -> None:
    page = opened(three).page
    reading = page.locator("#reading")
    cells = page.locator("#values td")
    cells.nth(3 * 3 + 1).hover()  # row 3, task 2
    assert reading.inner_text() == "after task 3, accuracy on task 2 (c1): 0.7143"
    cells.nth(2).hover()
    assert reading.inner_text() == "before training, accuracy on task 3 (c2): not measured"
    cells.nth(1 * 3).click()  # a click picks the moment
    assert "after task 1 (c0)" in page.locator("#state").inner_text()
    page.mouse.move(0, 0)
    page.locator("#heat").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)
    assert reading.inner_text() == "after task 1, accuracy on task 1 (c0): 0.8889"
    page.keyboard.press("Tab")
    assert reading.inner_text() == "Point at a cell, or use the arrow keys in the matrix."


def test_curves_are_read_by_pointer_and_by_keys(opened: Callable[..., Opened], three: Path) -> None:
    page = opened(three).page
    reading = page.locator("#curve-reading")
    page.locator("#curves").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert reading.inner_text() == "2 epochs: task 1 0.500, task 2 0.250"
    page.locator("#curves [data-value]").nth(4).hover()
    assert reading.inner_text().startswith("4 epochs: ")
    page.get_by_role("button", name="task 2 (c1)").click()
    assert page.locator("#curves .faint").count() == 2
    page.get_by_role("button", name="task 2 (c1)").click()
    assert page.locator("#curves .faint").count() == 0


def test_pictures_of_methods_are_read_by_pointer_and_by_keys(
    opened: Callable[..., Opened], three: Path
) -> None:
    page = opened(three).page
    picture = page.locator("#methods .picture")
    line = page.locator("#methods .reading")
    picture.locator("[data-value]").nth(1).hover()
    assert line.inner_text() == "ewc, ACC, task-incremental, task ID given: 0.738 ± 0.000"
    page.mouse.move(0, 0)
    picture.focus()
    page.keyboard.press("ArrowDown")
    assert line.inner_text() == "bd+ewc, ACC, task-incremental, task ID given: 0.738 ± 0.000"
    assert picture.locator(".current").count() == 1


def test_pictures_of_gates_are_read_by_keys(
    opened: Callable[..., Opened], make_run: Make, make_gate: Callable[..., Any], tmp_path: Path
) -> None:
    for seed in range(2):
        make_run("psp", seed, gates={"slda": make_gate(), "energy": make_gate(None)})
    page = opened(tmp_path / "runs").page
    pictures, lines = page.locator("#gates .picture"), page.locator("#gates .reading")
    for number, text in enumerate(
        [
            "task accuracy after 1 task: psp, slda 1.000 ± 0.000; psp, energy 1.000 ± 0.000",
            "psp, slda: mean probability 0.625, fraction right 0.500, 8 of 32 samples",
        ]
    ):
        pictures.nth(number).focus()
        page.keyboard.press("ArrowRight")
        assert lines.nth(number).inner_text() == text
    page.locator("#gates").get_by_role("button", name="gate's own class").click()
    names = page.locator("#gates table.sortable tbody th").all_inner_texts()
    assert names == ["psp, slda", "psp, energy"]


def test_everything_is_reached_by_the_tab_key(opened: Callable[..., Opened], three: Path) -> None:
    page = opened(three).page
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "() => { const e = document.activeElement; const s = getComputedStyle(e);"
                "return e === document.body || s.outlineStyle !== 'none' ? e.id || e.tagName : 'unseen'; }"
            )
        )
    assert {"theme", "run", "moment", "heat", "numbers", "curves", "BUTTON", "A"} <= reached
    assert "unseen" not in reached


def test_light_and_dark(opened: Callable[..., Opened], three: Path) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(22, 24, 28)"
    page = opened(three, color_scheme="dark").page
    assert page.evaluate(ground) == dark
    page.locator("#theme").click()
    assert page.evaluate(ground) == light
    page.locator("#theme").click()
    assert page.evaluate(ground) == dark
    page.emulate_media(media="print")
    assert page.evaluate(ground) == light
    assert not page.locator("#moment").is_visible()


def test_printing_opens_what_is_folded(opened: Callable[..., Opened], three: Path) -> None:
    page = opened(three).page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0


def test_columns_sort(opened: Callable[..., Opened], make_run: Make, tmp_path: Path) -> None:
    for method, last in (("a", 0.25), ("b", 0.75), ("c", 0.5)):
        make_run(method, 0, [[0.1], [last]], accuracy_task_agnostic=None)
    page = opened(tmp_path / "runs").page
    names = page.locator("table.sortable").first.locator("tbody th")
    button = page.get_by_role("button", name="ACC, task-incremental, task ID given")
    button.first.click()
    assert names.all_inner_texts() == ["b", "c", "a"]
    button.first.press("Enter")
    assert names.all_inner_texts() == ["a", "c", "b"]


@pytest.fixture(scope="module")
def long_ones(make_run_in: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred tasks, and a name without a place to break."""
    long = [[(row + task) % 7 / 7 for task in range(100)] for row in range(101)]
    place = tmp_path_factory.mktemp("long")
    for method in ("ewc", "x" * 150):
        make_run_in(place, method, 0, long)
    return place / "runs"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_never_scrolls_sideways(
    opened: Callable[..., Opened], long_ones: Path, width: int
) -> None:
    one = opened(long_ones, width=width)
    sizes = "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wide, window = one.page.evaluate(sizes)
    assert wide <= window == width
    assert one.page.locator("#values td").count() > 10_000
    outside = one.page.evaluate(
        "() => [...document.querySelectorAll('.picture svg')].filter("
        "(e) => e.getBoundingClientRect().right > innerWidth).length"
    )
    assert outside == 0


def test_names_run_no_script(opened: Callable[..., Opened], make_run: Make, tmp_path: Path) -> None:
    nasty = [
        "<img src=x onerror='window.hacked=1'>",
        "</script><script>window.hacked=1</script>",
    ]
    for index, name in enumerate(nasty):
        folder = make_run(str(index))
        results = json.loads((folder / "results.json").read_text())
        results["method"] = results["tasks"][0]["classes"][0] = name
        (folder / "results.json").write_text(json.dumps(results))
    page = opened(tmp_path / "runs").page
    assert page.evaluate("window.hacked") is None
    assert nasty[0] in page.locator("#bars").inner_text() + page.locator("#state").inner_text()
    assert page.locator("img").count() == 0


def test_a_script_from_elsewhere_would_not_run(opened: Callable[..., Opened], three: Path) -> None:
    """Should an escape be forgotten one day, the policy of the page still holds."""
    one = opened(three)
    one.page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
        "document.body.append(s); }"
    )
    assert one.page.evaluate("window.hacked") is None
    (refusal,) = one.messages
    assert "Content Security Policy" in refusal
    one.messages.clear()


def test_collections_and_unfinished_runs_open_as_well(
    opened: Callable[..., Opened], make_run: Make, tmp_path: Path
) -> None:
    results = Path(__file__).parents[2] / "docs" / "results" / "toy"
    page = opened(results).page
    assert page.locator("#bytes svg [data-value]").count() == 2 * 3  # two scores of three methods
    (make_run() / "results.json").unlink()
    page = opened(tmp_path / "runs").page
    assert "No run here has results." in page.locator("main").inner_text()
