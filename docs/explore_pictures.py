"""Writes the pictures of docs/explore.md and docs/compare.md: docs/images/explore_declined.png,
explore_graph.png, explore_passes.png, explore_routing.png and compare_graphs.png.

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
SIZE = {"width": 1240, "height": 720}
CHECKPOINT = DOCS.parent / "examples" / "tiny_moe" / "checkpoint"


def declined(browser: Browser, folder: Path) -> Page:
    """The model of the page, at its declined block."""
    (module, *_) = re.findall(r"```python\n(.*?)```", (DOCS / "explore.md").read_text(), re.S)
    source = folder / "blocks.py"
    source.write_text(module)
    compiled = moec.compile(f"{source}:model", verify=False, stop_after="fold-permutes")
    page = opened(browser, folder, moec.explore(compiled), "light")
    page.locator(".card .link").click()
    return page


def traced(browser: Browser, folder: Path, scheme: str, view: str) -> Page:
    """tiny_moe, and the routing of a text that it wrote."""
    artifact = folder / "tiny_moe.moec"
    moec.compile(CHECKPOINT, record_routing=True, verify=False).save(artifact, keep_passes=True)
    model = moec.load(artifact)
    with model.record_routing() as recorder:
        model.generate("def read_lines(path):", max_new_tokens=80)
    page = opened(browser, folder, moec.explore(artifact, trace=recorder.trace()), scheme)
    page.get_by_role("tab", name=view).click()
    return page


def graph(browser: Browser, folder: Path) -> Page:
    page = traced(browser, folder, "light", "Graph")
    page.set_viewport_size({"width": 1240, "height": 1000})
    page.locator(".frame-scroll").evaluate("frame => { frame.scrollTop = 560 }")
    return page


def passes(browser: Browser, folder: Path) -> Page:
    page = traced(browser, folder, "light", "Graph")
    page.locator(".passes").get_by_role("button", name="fuse-norm").click()
    return page


def routing(browser: Browser, folder: Path) -> Page:
    return traced(browser, folder, "dark", "Routing")


def graphs(browser: Browser, folder: Path) -> Page:
    """tiny_moe in bf16 and in int8, at the experts of a layer."""
    paths = folder / "bf16.moec", folder / "int8.moec"
    for path, quant in zip(paths, (None, "int8"), strict=True):
        moec.compile(CHECKPOINT, quant=quant, verify=False).save(path)
    page = opened(browser, folder, moec.compare(*paths).page(), "light")
    page.get_by_role("tab", name="Graph").click()
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
        for view in (declined, graph, passes, routing, graphs):
            name = "compare" if view is graphs else "explore"
            picture = DOCS / "images" / f"{name}_{view.__name__}.png"
            view(browser, Path(folder)).screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()
