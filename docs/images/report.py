"""Make report.png, next to this file: two parts of the page that bpn-report makes of docs/results/incremental.

Needs Chromium, as the tests of the page do (`make browser`)::

    python docs/images/report.py
"""

import shutil
import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from bpn_lightning.report.cli import main

HERE = Path(__file__).parent
GRID = HERE.parent / "results" / "incremental"
PLACE, SETUP, AFTER = "cifar100_inc", "ewc, seed 0", "6"

#: Leaves the figure of the place's methods, and the section "Over the stream".
ONLY = """place => {
    const title = [...document.querySelectorAll("#methods h3")].find(one => one.textContent === place);
    let figure = title;
    while (figure.tagName !== "FIGURE") figure = figure.nextElementSibling;
    document.querySelector("main").replaceChildren(figure, document.querySelector("#stream"));
}"""


def take(page: Any) -> None:
    """Choose the run and the moment, and write the picture."""
    option = page.locator(f"#run optgroup[label={PLACE}] option", has_text=SETUP)
    labels = option.all_text_contents()
    page.select_option("#run", value=option.nth(labels.index(SETUP)).get_attribute("value"))
    page.locator("#moment").fill(AFTER)
    page.evaluate(ONLY, PLACE)
    picture = Image.open(BytesIO(page.locator("main").screenshot()))
    picture.quantize(256).save(HERE / "report.png", optimize=True)


if __name__ == "__main__":
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if chromium is None:
        sys.exit("Expected Chromium, but got none. `make browser` installs Debian's.")
    with TemporaryDirectory() as folder, sync_playwright() as driver:
        out = Path(folder, "report.html")
        main([str(GRID), "--out", str(out)])
        flags = ["--headless", "--no-sandbox", "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(out.as_uri())
        take(page)
        browser.close()
