"""The page in a browser: what it loads, how fast it is, search, keys, themes, hostile names."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright

import moec
from moec.inspect.comparison.comparison import ArtifactComparison
from moec.inspect.exploration.explore import page_data
from moec.inspect.exploration.explored_model import ExploredModel
from moec.inspect.exploration.page import page as html_of
from moec.ir.text import parse
from moec.passes.core.damage import ChoiceLine
from moec.report.data import Block, DeclinedLine
from moec.report.pass_graphs.table import GraphStep
from moec.report.report import Report, describe_graph
from tests.inspect.comparison.test_compare import FIXED
from tests.inspect.exploration.conftest import Files
from tests.inspect.exploration.test_explore import DECLINED_LINE, planned
from tests.models.families import FAMILIES
from tests.sources.onnx.test_files import D, Sorted, export

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed: make chromium installs it"
)
Open = Callable[..., Page]
HOSTILE = "</script><img src=x onerror=document.title=1>&\u2028'"
LAYERS, OPS, PASSES = 48, 210, 40


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        # Containers run as root, for which Chromium has no sandbox; the page is moec's.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens HTML from a file in a new tab, which must have no error and load nothing else."""
    errors: list[str] = []
    contexts = []
    path = tmp_path / "page.html"

    def open_page(html: str, **options: Any) -> Page:
        path.write_text(html, encoding="utf-8")
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append("a dialog"))
        page.on("request", lambda request: requests.append(request.url))
        requests: list[str] = []
        page.goto(path.as_uri())
        assert {url for url in requests if not url.startswith("data:")} == {path.as_uri()}
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture(scope="module")
def model_page(declined: moec.CompiledModel) -> str:
    return moec.explore(declined)


@pytest.fixture(scope="module")
def artifact_page(files: Files) -> str:
    plan = planned(experts=8, layers=4)
    return moec.explore(files.artifact, trace=files.trace, profile=files.profile, plan=plan)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_one_click_from_a_declined_block_to_the_users_line(
    model_page: str, open_page: Open
) -> None:
    page = open_page(model_page)
    card = page.locator(".card")
    expect(card).to_contain_text("aten.mean.dim reduces over rows")
    card.get_by_role("button", name="layers.1").click()
    file, code = DECLINED_LINE.rstrip("`").split(": `")
    expect(page.locator("#line")).to_have_text(file)
    expect(page.locator("#details")).to_contain_text(code)
    expect(page.locator(".row.on")).to_contain_text("aten.mean.dim")
    expect(page.locator(".row.on")).to_be_in_viewport()
    # Its operand leads to the op that computes it.
    page.locator("#details .link").first.click()
    expect(page.locator("#details h2")).to_have_text("aten.linear.default")


def test_what_a_pass_changed(model_page: str, open_page: Open) -> None:
    """The layers that it changed; opened, the ops before and after beside each other."""
    page = open_page(model_page)
    tab(page, "Graph")
    page.locator(".passes").get_by_role("button", name="recognise-experts").click()
    groups = page.locator(".group")
    texts = [re.sub(r"\s+", " ", text or "") for text in groups.all_text_contents()]
    assert texts == ["layers.0\u221258+7", "(no module)\u22122+2", "layers.2\u221258+7"]
    expect(page.locator("main")).to_contain_text("1 layer unchanged")
    assert page.locator(".row").count() == 0  # layers that are closed are not in the page
    groups.first.click()
    removed = page.locator(".row.del").all_text_contents()
    added = page.locator(".row.ins").all_text_contents()
    assert (len(removed), len(added)) == (58, 7)
    assert any("aten.nonzero" in text for text in removed)
    assert any("moe.experts" in text for text in added)
    groups.first.click()
    assert page.locator(".row").count() == 0


def test_a_block_opens_the_change_that_recognised_it(model_page: str, open_page: Open) -> None:
    page = open_page(model_page)
    page.get_by_role("button", name="layers.2", exact=True).click()
    expect(page.locator(".group", has_text="layers.2")).to_have_attribute("aria-expanded", "true")
    assert page.locator(".row.ins").count() == 7


def test_an_artifact_that_kept_its_passes(
    compiled_tiny_moe: moec.CompiledModel, tmp_path: Path, open_page: Open
) -> None:
    """Its passes open, and kernels lead to ops of the last graph."""
    compiled_tiny_moe.save(tmp_path / "tiny.moec", keep_passes=True)
    page = open_page(moec.explore(tmp_path / "tiny.moec"))
    tab(page, "Graph")
    page.locator(".passes").get_by_role("button", name="recognise-routers").click()
    page.locator(".group").nth(1).click()
    assert any("moe.route" in text for text in page.locator(".row.ins").all_text_contents())
    tab(page, "Kernels")
    page.locator("td .link", has_text="moe.experts").or_(
        page.locator("td .link", has_text="grouped.linear")
    ).first.click()
    expect(page.locator("#details")).to_contain_text(re.compile(r"call \d+ of main"))
    expect(page.locator("#line")).to_have_text(re.compile(r"moe\.py:\d+"))


def compared() -> ArtifactComparison:
    """FIXED, with graphs of which B's has one other op, and a third of B alone."""
    one, two = (
        parse(f"""
        graph main(x: f32[T, 8]) {{
          size T in [0, 8]
          y: f32[T, 8] = aten.relu.default(x) @ layers.0
          z: f32[T, 8] = aten.{name}.default(y) @ layers.1
          return z
        }}
        """)
        for name in ("exp", "neg")
    )
    steps = (GraphStep("A", one), GraphStep("B", two))
    return replace(FIXED, graphs={"main": steps, "decode": steps[1:]})


def test_a_comparison(open_page: Open) -> None:
    page = open_page(compared().page())
    assert page.get_by_role("tab").all_text_contents() == ["Comparison", "Graph"]
    main = page.locator("main")
    expect(main).to_contain_text("Both ran on 1 x input_ids[1, 256].")
    expect(page.locator(".card")).to_have_text("something else is not compared")
    rows = [" ".join(row.locator("td").all_text_contents()) for row in page.locator("tr").all()]
    for row in (
        "logits 0.0151 7 256 0.123 0.660 0.00141",
        "hidden 0.00 0 256 0.00 1.00 -",
        "layers.1.mlp 98 % ",
        "decode step 0.580 0.547 0.930 0.830 1.11",
        "bytes experts 6.3 MB 3.2 MB",
        "kernels grouped 4 -",
        "layers.1.down_proj.packed 2, 3, 4, 7",
        "norm.weight -",
    ):
        assert row in rows
    tab(page, "Graph")  # which opens at the difference
    expect(page.locator("main")).to_contain_text("1 layer unchanged")
    page.locator(".group", has_text="layers.1").click()
    assert "aten.exp" in page.locator(".row.del").inner_text()
    page.locator(".row.ins").click()
    expect(page.locator("#details")).to_contain_text("sinceB")
    page.get_by_label("Search").fill("relu")
    expect(page.locator("main h2").first).to_have_text("1 op in main, of B")
    page.keyboard.press("Escape")
    page.get_by_label("Function").select_option("decode")  # A has none
    assert page.locator(".group").count() == 2


def test_search(model_page: str, open_page: Open) -> None:
    page = open_page(model_page)
    page.keyboard.press("/")
    expect(page.get_by_label("Search")).to_be_focused()
    page.keyboard.type("layers.1.experts.2.1 relu")
    expect(page.locator("main h2").first).to_have_text("1 op in main, after fold-permutes")
    page.locator("main .row").click()
    expect(page.locator("#details h2")).to_have_text("aten.relu.default")
    expect(page.get_by_label("Search")).to_have_value("")
    page.get_by_label("Search").fill("no such thing")
    expect(page.locator("main h2").first).to_have_text("0 ops in main, after fold-permutes")
    page.keyboard.press("Escape")
    expect(page.locator(".group").first).to_be_visible()


def test_keys(model_page: str, open_page: Open) -> None:
    """Tab to the views, arrows between them and through the ops, Enter opens."""
    page = open_page(model_page)
    page.keyboard.press("Tab")
    expect(page.get_by_label("Search")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("tab", name="Overview")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Graph")).to_be_focused()
    first = page.locator(".group").first
    first.focus()
    page.keyboard.press("ArrowRight")
    expect(first).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".row").first).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#details")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#details")).to_be_hidden()
    page.keyboard.press("ArrowLeft")
    expect(first).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(first).to_have_attribute("aria-expanded", "false")


def test_kernels_weights_routing_and_plan(artifact_page: str, open_page: Open) -> None:
    page = open_page(artifact_page)
    tab(page, "Kernels")
    expect(page.locator("main")).to_contain_text("between kernels")
    page.get_by_label("Phase").select_option(index=1)
    page.locator("td .link", has_text="grouped.linear").first.click()
    expect(page.locator("#details")).to_contain_text(re.compile(r"call \d+ of decode; .*: .* in "))
    tab(page, "Weights")
    expect(page.locator(".key").first).to_contain_text("experts: 6.3 MB, 87 %, bf16")
    page.locator(".key", has_text="head").click()
    rows = page.locator("tbody tr")
    assert {text for text in rows.locator("td:nth-child(2)").all_text_contents()} == {"head"}
    tab(page, "Routing")
    load = page.locator("tbody").first.locator("td:nth-child(2)")
    assert sum(map(int, load.all_text_contents())) > 4
    page.get_by_label("First token").fill("9")
    page.get_by_label("Last token").fill("1")  # which moves the first
    expect(page.get_by_label("First token")).to_have_value("1")
    page.get_by_label("First token").fill("0")
    assert sum(map(int, load.all_text_contents())) == 4  # two tokens, two experts each
    page.get_by_label("Layer", exact=True).fill("3")
    expect(page.locator("main h2").nth(1)).to_have_text("model.layers.3.mlp")
    tab(page, "Plan")
    expect(page.locator("tbody tr").first).to_have_text("0TP 1EP 2flat81.002.500 ms")
    expect(page.locator("tbody tr").last).to_have_text("1TP 2dense1.000 ms")


def some_model(name: str, folder: Path) -> moec.CompiledModel:
    """A family with one layer, or an ONNX file, after all passes."""
    options = {"verify": False, "stop_after": "fold-permutes"}
    if name == "onnx":
        path = export(Sorted(), folder / "model.onnx", torch.randn(2, 5, D))
        return moec.compile(str(path), **options)
    family = FAMILIES[name].one_layer()
    return moec.compile(family.build(), (), family.inputs(2, 5), **options)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "mixtral", "onnx"])
def test_each_view_of_other_models(name: str, tmp_path: Path, open_page: Open) -> None:
    """Every pass, and an op before and after it, opens without an error."""
    page = open_page(moec.explore(some_model(name, tmp_path)))
    assert page.evaluate("() => performance.getEntriesByType('navigation')[0].domInteractive") < 2e3
    expect(page.locator("main")).to_contain_text("1 MoE block")
    page.locator("tbody .link").first.click()  # the block, where it was recognised
    page.locator(".row.ins", has_text="moe.experts").click()
    expect(page.locator("#details h2")).to_have_text("moe.experts")
    for change in page.locator(".passes button").all():
        change.click()
        if page.locator(".group").count():
            page.locator(".group").first.click()
            page.locator(".row").last.click()
    for button in page.get_by_role("tab").all():
        button.click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes(scheme: str, model_page: str, open_page: Open) -> None:
    """The paper and the text differ enough in both: WCAG's 7 to 1."""
    page = open_page(model_page, color_scheme=scheme)
    style = page.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color] }"
    )
    paper, ink = (luminance(colour) for colour in style)
    assert (paper > ink) == (scheme == "light")
    assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 7


def luminance(colour: str) -> float:
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_on_a_phone_the_op_is_above_its_details(model_page: str, open_page: Open) -> None:
    page = open_page(model_page, viewport={"width": 390, "height": 844})
    page.locator(".card .link").click()
    row, details = page.locator(".row.on").bounding_box(), page.locator("#details").bounding_box()
    assert row is not None
    assert details is not None
    assert 0 <= row["y"] < row["y"] + row["height"] <= details["y"]


def test_a_phone(model_page: str, artifact_page: str, open_page: Open) -> None:
    """No view is wider than the screen: tables scroll by themselves."""
    for html in (model_page, artifact_page, compared().page()):
        page = open_page(html, viewport={"width": 390, "height": 844})
        for button in page.get_by_role("tab").all():
            button.click()
            if page.locator(".group").count():
                page.locator(".group").first.click()
            width = page.evaluate("() => document.documentElement.scrollWidth")
            assert width <= 390, button.inner_text()


def hostile_model() -> ExploredModel:
    name = HOSTILE.replace("\u2028", "\\u2028")
    graph = parse(f"""
    graph main(x: f32[T, 8]; "{name}.weight": f32[8, 8]) {{
      size T in [0, 8]
      y: f32[T, 8] = aten.linear.default(x, "{name}.weight") <note="{name}"> @ "{name}"
      return y
    }}
    """)
    report = Report(
        HOSTILE,
        blocks=(Block(HOSTILE, 4, 2, HOSTILE, HOSTILE, HOSTILE, 8, 4),),
        declined=(DeclinedLine(HOSTILE, HOSTILE, HOSTILE),),
        notes=(HOSTILE,),
        choices=(ChoiceLine(HOSTILE, HOSTILE, 2_500, 0.125, 0.25),),
        **describe_graph(graph, {}),
    )
    return ExploredModel(HOSTILE, report, {"main": [GraphStep(HOSTILE, graph)]}, ())


def test_names_are_never_html(open_page: Open) -> None:
    data = page_data(hostile_model())
    page = open_page(html_of(data))
    assert "<img src=x onerror=document.title=1>" in page.title()
    expect(page.locator("#title")).to_contain_text("<img src=x")
    chosen = page.locator("table", has_text="bytes saved").locator("tbody td")
    assert chosen.all_text_contents()[2:] == ["2.5 kB", "0.125", "25 %"]
    for button in page.get_by_role("tab").all():
        button.click()
        for group in page.locator(".group").all():
            group.click()
            page.locator(".row").first.click()
        assert page.locator("img").count() == 0
    page.get_by_label("Search").fill("<img")
    expect(page.locator("main .row")).to_have_count(1)
    assert page.locator("img").count() == 0


def many_ops(changed: int) -> Any:
    """48 layers of 210 ops; each pass replaces one op in seven by another."""
    lines = []
    before = "x"
    for n in range(LAYERS * OPS):
        layer, at = divmod(n, OPS)
        attrs = f"<note={changed}>" if changed and (at + changed) % 7 == 0 else ""
        module = f"model.layers.{layer}.{'self_attn.q_proj' if at < 60 else 'mlp.experts'}"
        lines.append(f"v{n}: f32[T, 64] = aten.relu.default({before}) {attrs} @ {module}")
        before = f"v{n}"
    body = "\n".join(lines)
    return parse(f"graph main(x: f32[T, 64]) {{\nsize T in [0, 512]\n{body}\nreturn {before}\n}}")


def test_ten_thousand_ops(open_page: Open) -> None:
    """48 layers and 40 passes: a small page, which is ready at once and opens a layer at once."""
    steps = [GraphStep(f"pass-{n}", many_ops(n), "MOE", n, 0.1) for n in range(PASSES)]
    report = Report("large", **describe_graph(steps[0].graph, {}))
    start = time.perf_counter()
    html = html_of(page_data(ExploredModel("large", report, {"main": steps}, ())))
    wrote = time.perf_counter() - start
    size = len(html.encode())
    page = open_page(html)
    ready = page.evaluate("() => performance.getEntriesByType('navigation')[0].domInteractive")
    start = time.perf_counter()
    tab(page, "Graph")
    groups = page.locator(".group")
    assert groups.count() == LAYERS
    groups.nth(20).click()
    expect(page.locator(".row").first).to_be_visible()
    assert 0 < page.locator(".row").count() < OPS + 1
    page.locator(".passes button").nth(PASSES - 1).click()
    assert groups.count() == LAYERS
    page.get_by_label("Search").fill("layers.47.mlp")
    expect(page.locator("main h2").first).to_have_text(re.compile("^150 ops"))
    seconds = time.perf_counter() - start
    print(f"wrote {wrote:.1f} s, {size / 1e6:.2f} MB, ready {ready:.0f} ms, steps {seconds:.1f} s")
    assert size < 15e6
    assert ready < 2000
