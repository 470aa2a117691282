"""The page as text: values, escaping, nothing from outside, and sizes that a browser can hold."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bpn_lightning.analysis.comparison import compare
from bpn_lightning.report import page
from bpn_lightning.report.page import render
from bpn_lightning.report.reading import find_runs
from bpn_lightning.run.drawing import COLORS

Make = Callable[..., Path]

SOURCES = Path(page.__file__).parent

NASTY = [
    '<img src=x onerror="window.hacked=1">',
    "</script><script>window.hacked=1</script>",
    "</script ><!-- <script",
    "\"><svg onload='window.hacked=1'>&amp;",
    "{{1}}`${1}`",
]


class Parsed(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.values: list[float] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "data":
            self.values.append(float(dict(attrs)["value"] or ""))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts.append(data)
        elif not self.tags or self.tags[-1] != "style":
            self.text += data


def html(folder: Path) -> str:
    found = find_runs(folder)
    return render(found, compare(found.runs, found.compare), "1.0").decode()


def embedded(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Parsed(text).scripts[0])
    return found


def test_every_value_is_that_of_results_json(make_run: Make) -> None:
    folder = make_run("bd+ewc", 0, [[0.125, 1 / 3], [8 / 9, 0.3], [2 / 7, 5 / 11]])
    results = json.loads((folder / "results.json").read_text())
    text = html(folder)
    expected = [
        results["accuracy"]["average"],
        results["accuracy_task_agnostic"]["average"],
        results["accuracy_after_learning"]["average"],
        results["accuracy"]["first_task"],
        results["accuracy_task_agnostic"]["first_task"],
        results["accuracy"]["forgetting"],
        *(552, 1104, 12.5),
    ]
    assert Parsed(text).values == expected  # to the last digit
    (run,) = embedded(text)["runs"]
    assert run["matrix"][2] == pytest.approx(results["accuracy"]["per_task"], abs=5e-6)


def test_names_are_never_read_as_html(
    make_run: Make, make_gate: Callable[..., Any], tmp_path: Path
) -> None:
    """The page of nasty names has the very elements and attributes of a page of plain ones."""
    shape = []
    for root, names in (("plain", ["a", "b", "c", "d", "e"]), ("nasty", NASTY)):
        for index, name in enumerate(names):
            tasks = [{"id": k, "classes": [name], "epochs": 2} for k in range(2)]
            config = {"key": name}
            folder = make_run(f"{index}", root=root, config=config)
            results = json.loads((folder / "results.json").read_text())
            results |= {"method": name, "experiment": name, "tasks": tasks}
            results["gates"] = {name: make_gate()}
            results["provenance"]["host"]["cpu"] = name
            (folder / "results.json").write_text(json.dumps(results))
        text = html(tmp_path / root)
        parsed = Parsed(text)
        keys = [key for key, _ in parsed.attributes]
        shape.append((parsed.tags, keys, len(parsed.scripts)))
        assert all(name in parsed.text for name in names)
    assert shape[0] == shape[1]
    (inside,) = re.findall(r'id="data">(.*?)</script', text, re.DOTALL)
    assert "<" not in inside  # so that no browser ends the script early
    (options,) = re.findall(r'<select id="run">(.*?)</select>', text, re.DOTALL)
    assert {option.split(", seed ")[0].strip() for option in Parsed(options).text.splitlines()} == {
        "",
        *NASTY,
    }


def test_odd_text_is_no_error(make_run: Make) -> None:
    lone = "half a character \ud800"
    assert "half a character ?" in html(
        make_run(
            tasks=[{"id": 0, "classes": [lone], "epochs": 1}, {"id": 1, "classes": [], "epochs": 1}]
        )
    )


def test_nothing_comes_from_outside(make_run: Make) -> None:
    text = html(make_run())
    parsed = Parsed(text)
    for key, value in parsed.attributes:
        if key in ("src", "href", "action", "data", "srcset"):
            assert (value or "").startswith(("#", "data:,")), (key, value)
    style = (SOURCES / "page.css").read_text("utf-8")
    assert "url(" not in style
    assert "@import" not in style
    addresses = set(re.findall(r"https?://[^\s\"'`]+", text))
    assert addresses == set()
    script = (SOURCES / "page.js").read_text("utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def test_the_policy_names_the_one_script(make_run: Make) -> None:
    text = html(make_run())
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (policy,) = re.findall(r"script-src 'sha256-([^']+)'", text)
    assert [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in script] == [
        policy
    ]
    assert "default-src 'none'" in text


def test_the_same_runs_give_the_same_bytes(make_run: Make, tmp_path: Path) -> None:
    for seed in range(2):
        make_run(seed=seed)
    assert html(tmp_path) == html(tmp_path)


def test_tables_say_what_their_cells_are(make_run: Make, tmp_path: Path) -> None:
    for method in ("ewc", "psp"):
        for seed in range(2):
            make_run(method, seed, config={"lr": method})
    (make_run("stl") / "results.json").unlink()
    text = html(tmp_path)
    tables = re.findall(r"<table.*?</table>", text, re.DOTALL)
    # methods, tests, the matrix (by the script), settings, provenance, left out
    assert len(tables) == 6
    for table in tables:
        if 'id="values"' not in table:
            assert "<caption>" in table
            assert table.count("<th ") == table.count('scope="')
            spans = [int(span) for span in re.findall(r'rowspan="(\d+)"', table)]
            heads = table.count('scope="row"') + sum(spans)
            assert heads == table.count("<tr>") - 1  # every row has one
    assert "digits_inc/stl/seed_0" in tables[-1]


def test_a_page_of_unfinished_runs_names_them(make_run: Make, tmp_path: Path) -> None:
    (make_run() / "results.json").unlink()
    parsed = Parsed(html(tmp_path))
    assert "No run here has results." in parsed.text
    assert "digits_inc/ewc/seed_0" in parsed.text


@pytest.mark.slow
def test_more_runs_than_are_drawn_and_a_hundred_tasks(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in range(9):
        for seed in range(4):
            make_run(f"m{method}", seed, root="many")
    # beyond the bound, every method keeps its first seed's pictures as long as there is room
    monkeypatch.setattr(page, "MOST_DRAWN", 12)
    text = html(tmp_path / "many")
    assert len(text) < 12 * 40_000
    labels = [run["label"] for run in embedded(text)["runs"]]
    assert text.count("<template>") == len(labels) == 12
    assert sum(label.endswith("seed 0") for label in labels) == 9
    assert "12 of 36 runs can be chosen here" in " ".join(text.split())
    assert Parsed(text).values.count(552) == 9  # the tables have all
    long = [[0.12345] * 100 for _ in range(101)]
    make_run("ewc", 0, long, root="long")
    assert len(html(tmp_path / "long")) < 400_000


@pytest.mark.parametrize("unit", [1, 1000])
def test_marks_carry_the_values_that_they_stand_for(
    make_run: Make, tmp_path: Path, unit: int
) -> None:
    """Every mark of a method's picture and of a curve can be read; the texts are those of the results."""
    for method, sizes in (("ewc", 0), ("psp", 552)):
        make_run(method, 0, bytes_per_task={"measured": sizes * unit, "paper": None})
    values = [text for key, text in Parsed(html(tmp_path)).attributes if key == "data-value"]
    for method, sizes in (("ewc", 0), ("psp", 552)):
        for title, value in (
            ("ACC, task-incremental, task ID given", 0.6),
            ("ACC, class-incremental, task ID not given", 0.3),
        ):
            assert f"{method}, {title}: {value:.3f}" in values
            with_bytes = f"{method}, {title}: {value:.3f}, {sizes * unit:,} bytes per task"
            assert with_bytes in values
    assert values.count("2 epochs: task 1 0.900, task 2 0.300") == 2  # once for each run
    assert len(values) == 2 * 4 + 2 * 3


def luminance(color: str) -> float:
    """As WCAG 2.2 defines it."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def turned_around(color: str) -> str:
    """What ``invert(1) hue-rotate(180deg)`` makes of a color, by the matrices of CSS filter effects."""
    red, green, blue = (1 - int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    gray = 2 * (0.213 * red + 0.715 * green + 0.072 * blue)  # of the rotation by half a turn
    parts = (min(1.0, max(0.0, gray - part)) for part in (red, green, blue))
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def css_colors(theme: int) -> dict[str, str]:
    style = (SOURCES / "page.css").read_text("utf-8")
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", style)
    return {name: values[theme] for name, *values in pairs}


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colors_have_the_contrast_that_wcag_asks_for(theme: int) -> None:
    """4.5 for text, 3 for what a picture is read by."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colors = css_colors(theme)
    for ground in ("page", "panel"):
        for text in ("ink", "soft", "link"):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
        for mark in ("mark", "frame"):
            assert contrast(colors[mark], colors[ground]) >= 3, (mark, ground)


def test_lines_have_that_contrast_on_both_pages() -> None:
    assert turned_around("#000000") == "#ffffff"
    light, dark = css_colors(0)["page"], css_colors(1)["page"]
    for color in COLORS:
        assert contrast(color, light) >= 3, color
        assert contrast(turned_around(color), dark) >= 3, color
