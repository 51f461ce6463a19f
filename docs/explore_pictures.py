"""Writes the pictures of docs/explore.md and docs/compare.md: docs/images/explore_declined.png,
explore_routing.png and compare_graphs.png.

python -m docs.explore_pictures
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

import moec

DOCS = Path(__file__).parent
SIZE = {"width": 1240, "height": 400}


def declined(browser: Browser, folder: Path) -> Page:
    """The model of the page, at its declined block."""
    (module, *_) = re.findall(r"```python\n(.*?)```", (DOCS / "explore.md").read_text(), re.S)
    source = folder / "blocks.py"
    source.write_text(module)
    compiled = moec.compile(f"{source}:model", verify=False, stop_after="fold-permutes")
    page = opened(browser, folder, moec.explore(compiled), "light")
    page.locator(".card .link").click()
    return page


def routing(browser: Browser, folder: Path) -> Page:
    """tiny_moe, and the routing of a text that it wrote."""
    artifact = folder / "tiny_moe.moec"
    checkpoint = DOCS.parent / "examples" / "tiny_moe" / "checkpoint"
    moec.compile(checkpoint, record_routing=True, verify=False).save(artifact)
    model = moec.load(artifact)
    with model.record_routing() as recorder:
        model.generate("def read_lines(path):", max_new_tokens=80)
    page = opened(browser, folder, moec.explore(artifact, trace=recorder.trace()), "dark")
    page.get_by_role("tab", name="Routing").click()
    page.set_viewport_size({"width": 1240, "height": 720})
    return page


def graphs(browser: Browser, folder: Path) -> Page:
    """tiny_moe in bf16 and in int8, at the experts of a layer."""
    checkpoint = DOCS.parent / "examples" / "tiny_moe" / "checkpoint"
    paths = folder / "bf16.moec", folder / "int8.moec"
    for path, quant in zip(paths, (None, "int8"), strict=True):
        moec.compile(checkpoint, quant=quant, verify=False).save(path)
    page = opened(browser, folder, moec.compare(*paths).page(), "light")
    page.get_by_role("tab", name="Graph").click()
    page.locator(".group").first.click()
    page.locator(".row.ins").first.scroll_into_view_if_needed()
    page.mouse.wheel(0, 150)
    page.wait_for_timeout(200)
    return page


def opened(browser: Browser, folder: Path, html: str, scheme: str) -> Page:
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    page = browser.new_page(viewport=SIZE, color_scheme=scheme)
    page.goto(path.as_uri())
    return page


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for view, name in ((declined, "explore"), (routing, "explore"), (graphs, "compare")):
            picture = DOCS / "images" / f"{name}_{view.__name__}.png"
            view(browser, Path(folder)).screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()
