"""The page in a browser: what it loads, how fast it is, search, keys, themes, hostile names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, expect

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
from moec.runtime.call.routing_trace import load_trace
from tests.browsing import Open, contrast, place, tabs
from tests.inspect.comparison.test_compare import FIXED
from tests.inspect.exploration.conftest import Files
from tests.inspect.exploration.test_explore import DECLINED_LINE, planned
from tests.models.families import FAMILIES
from tests.sources.onnx.test_files import D, Sorted, export

HOSTILE = "</script><img src=x onerror=document.title=1>&\u2028'"
LAYERS, OPS, PASSES = 48, 210, 40


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens HTML from a file, which loads nothing else."""
    path = tmp_path / "page.html"
    with tabs(browser) as open_tab:

        def open_page(html: str, **options: Any) -> Page:
            path.write_text(html, encoding="utf-8")
            page = open_tab(path.as_uri(), **options)
            loaded = page.evaluate("performance.getEntriesByType('resource').map(r => r.name)")
            assert [url for url in loaded if not url.startswith("data:")] == []
            return page

        yield open_page


@pytest.fixture(scope="module")
def model_page(declined: moec.CompiledModel) -> Any:
    return moec.explore(declined)


@pytest.fixture(scope="module")
def artifact_page(files: Files) -> str:
    plan = planned(experts=8, layers=4)
    return moec.explore(files.artifact, trace=files.trace, profile=files.profile, plan=plan)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def asked(page: Page, question: str) -> Any:
    return page.evaluate(f"{Path(__file__).with_name('picture.js').read_text()}.{question}()")


def after_pass(page: Page, name: str) -> None:
    tab(page, "Graph")
    page.locator(".passes").get_by_role("button", name=name).first.click()


def press(page: Page, *names: str) -> None:
    for name in names:
        page.get_by_role("button", name=name, exact=True).click()


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
    expect(page.locator(".box.on > .title")).to_have_text("mean")
    expect(page.locator(".box.on")).to_be_in_viewport()
    # Its operand leads to the op that computes it.
    page.locator("#details .link").first.click()
    expect(page.locator("#details h2")).to_have_text("aten.linear.default")


def test_the_first_screen(artifact_page: str, model_page: Any, open_page: Open) -> None:
    """What the model is, what moec did, and where time goes; without times, what a token reads."""
    page = open_page(artifact_page, viewport={"width": 1280, "height": 800})
    sentences = (
        "mixture of experts, continues text; 4, all with experts; 8 a layer, 2 per token; 3.48 M,"
        " 1.12 M active per token (32 %); 7.2 MB packed; experts 6.3 MB, bf16",
        "changed the graph: 412 ops; 4 MoE blocks: softmax, top-2, renormalised; swiglu;"
        " the same results on random routings; quick: the graph and the weights",
        "decode: ; prefill: ; (between kernels); mlp; self_attn",
    )
    for section, words in zip(page.locator(".first section").all(), sentences, strict=True):
        expect(section).to_be_in_viewport(ratio=0.9)
        assert all(word in section.inner_text() for word in words.split("; ")), words
    bars = page.locator(".bars").first
    widths = [float(w) for w in re.findall(r"width: ([\d.]+)%", bars.inner_html())]
    assert widths[:-1] == sorted(widths[:-1], reverse=True)
    page = open_page(model_page._repr_html_())  # in a notebook
    last = page.frame_locator("iframe").locator(".first section").last
    expect(last).to_contain_text("weights read for one token, at most 35.1 kB")


def test_each_op_is_a_box(artifact_page: str, open_page: Open) -> None:
    """And each arrow leads from box to box; no two boxes of one parent lie on each other."""
    page = open_page(artifact_page)
    tab(page, "Graph")
    press(page, "Open all")
    expect(page.locator(".box.op")).to_have_count(115)
    assert page.locator(".box.port > .title").all_text_contents() == ["input_ids", "logits"]
    assert asked(page, "dangling") == []
    assert asked(page, "overlapping") == []
    press(page, "Close all")
    titles = page.locator(".box > .title").all_text_contents()
    assert titles == [
        "input_ids", "embed_tokens \u00b7 embedding", "arange.start_step", "rotary_emb", "layers.0",
        "layers.1 \u2013 3", "norm \u00b7 nn.rms_norm", "lm_head \u00b7 linear", "alias", "logits",
    ]  # fmt: skip


def test_a_block_opens_into_its_experts(artifact_page: str, open_page: Open) -> None:
    """By click and by keys; an expert tells its load and its bytes."""
    page = open_page(artifact_page)
    tab(page, "Graph")
    block = page.locator(".box[data-key='model.layers.0.mlp']")
    expect(block.locator("> .line").first).to_have_text("8 experts, 2 per token")
    experts = block.locator(".expert")
    expect(experts).to_have_count(16)  # of the two grouped products
    block.locator("> .title").dispatch_event("click")
    expect(experts).to_have_count(0)
    expect(block).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(experts).to_have_count(16)
    page.keyboard.press("ArrowRight")  # into it
    expect(block).not_to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(block).to_be_focused()
    page.keyboard.press("Enter")
    expect(experts).to_have_count(0)
    page.keyboard.press("Enter")
    experts.nth(3).focus()
    page.keyboard.press("Enter")
    details = page.locator("#details")
    expect(details.locator("h2")).to_have_text("expert 3")
    expect(details).to_contain_text("weights here131.1 kB, bf16")
    expect(details).to_contain_text(re.compile(r"load\d\.\d\d times the mean"))


def test_arrows(artifact_page: str, open_page: Open) -> None:
    """One tells by a click what it carries, from where and to where; those of an op are marked."""
    page = open_page(artifact_page, viewport={"width": 1280, "height": 800})
    tab(page, "Graph")
    page.mouse.click(*asked(page, "arrow"))
    details = page.locator("#details")
    expect(details).to_contain_text("Made bymul_13: bf16[B, S, 128] = nn.rms_normRead bylinear:")
    assert asked(page, "marked") == ["model.layers.0.self_attn"]
    details.locator(".link").first.click()
    expect(details.locator("h2")).to_have_text("nn.rms_norm")
    assert asked(page, "marked") == ["model.layers.0", "op", "model.layers.0.self_attn"]


def test_a_mouse_moves_the_picture(artifact_page: str, open_page: Open) -> None:
    """A drag scrolls it, and the wheel with Ctrl scales it about the pointer; + and 0 are keys."""
    page = open_page(artifact_page, viewport={"width": 1280, "height": 800})
    tab(page, "Graph")
    picture = page.locator(".picture")
    before = place(picture)
    page.mouse.move(700, 600)
    page.mouse.down()
    page.mouse.move(700, 400, steps=5)
    page.mouse.up()
    assert place(picture)["y"] == pytest.approx(before["y"] - 200, abs=1)
    expect(page.locator("#details")).to_be_hidden()
    box = place(page.locator(".box.open > .title").last)
    page.mouse.move(box["x"], box["y"])
    page.keyboard.down("Control")
    page.mouse.wheel(0, -120)
    page.keyboard.up("Control")
    expect(picture).not_to_have_attribute("width", str(before["width"]))
    assert place(page.locator(".box.open > .title").last)["y"] == pytest.approx(box["y"], abs=2)
    page.keyboard.press("0")
    assert place(picture)["width"] == pytest.approx(before["width"], abs=1)


def test_what_a_pass_changed(model_page: str, open_page: Open) -> None:
    """Before and after side by side; as text, the layers that it changed."""
    page = open_page(model_page)
    after_pass(page, "recognise-experts")
    panes = page.locator(".pane")
    assert panes.locator("figcaption").all_text_contents() == [
        "before recognise-experts \u2212118", "after recognise-experts +16"
    ]  # fmt: skip
    left, right = (place(pane) for pane in panes.all())
    assert (left["y"], left["x"] < right["x"]) == (right["y"], True)
    expect(panes.last.locator(".box.group.new").first.locator("> .count")).to_have_text("+7")
    tab(page, "Overview")
    press(page, "layers.2")  # a block, with what recognised it
    block = panes.last.locator("[data-key='layers.2']")
    expect(block).to_be_in_viewport()
    expect(block.locator(".box.op.new")).to_have_count(7)
    press(page, "Open all")
    expect(panes.first.locator(".box.op.gone")).to_have_count(118)
    expect(panes.last.locator(".box.op.new")).to_have_count(16)
    expect(panes.first.locator(".box.op:not(.gone)")).to_have_count(195 - 118)
    expect(panes.last.locator(".new > .title", has_text="moe.experts")).to_have_count(2)
    press(page, "Text")
    groups = page.locator(".group")
    texts = [re.sub(r"\s+", " ", text or "") for text in groups.all_text_contents()]
    assert texts == ["layers.0\u221258+7", "(no module)\u22122+2", "layers.2\u221258+7"]
    expect(page.locator("main")).to_contain_text("1 layer unchanged")
    groups.first.click()
    assert (page.locator(".row.del").count(), page.locator(".row.ins").count()) == (58, 7)


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


def test_the_picture_as_a_file(model_page: str, open_page: Open) -> None:
    """Both graphs, with their colours but without the page's style; a PNG has 2 pixels a point."""
    page = open_page(model_page)
    after_pass(page, "recognise-experts")
    saved = []
    for kind in ("SVG", "PNG"):
        with page.expect_download() as download:
            press(page, f"Save the picture as {kind}")
        saved.append(download.value.path().read_bytes())
    root = ElementTree.fromstring(saved[0])
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"before recognise-experts", "after recognise-experts", "moe.experts"} < set(texts)
    assert b"var(" not in saved[0]
    assert b'fill="rgb(228, 244, 232)"' in saved[0]
    assert saved[1][:4] == b"\x89PNG"
    size = [int.from_bytes(saved[1][at : at + 4], "big") for at in (16, 20)]
    assert size == [int(2 * float(root.attrib[side])) for side in ("width", "height")]


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
    assert page.locator(".box.op.gone > .title").all_text_contents() == ["layers.1 \u00b7 exp"]
    assert page.locator(".box.op.new > .title").all_text_contents() == ["layers.1 \u00b7 neg"]
    press(page, "Text")
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
    page.keyboard.press("Escape")
    expect(page.locator(".picture")).to_be_visible()
    page.get_by_label("Search").fill("moe.route")  # which a later pass replaces
    expect(page.locator("main h2").first).to_have_text("2 ops in main, after join-calls")
    expect(page.locator("main p").first).to_have_text("None after fold-permutes.")
    page.locator("main .row").first.click()
    expect(page.locator("#details h2")).to_have_text("moe.route")


def test_keys(model_page: str, open_page: Open) -> None:
    """Tab to the views, arrows between them and through layers and ops, Enter opens."""
    page = open_page(model_page)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("tab", name="Overview")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Graph")).to_be_focused()
    press(page, "Text")
    first = page.locator(".group").first
    first.focus()
    page.keyboard.press("ArrowRight")
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
    expect(page.locator("#line")).to_have_text(re.compile(r"^\w+\.py:\d+$"))
    tab(page, "Weights")
    expect(page.locator(".key").first).to_contain_text("experts: 6.3 MB, 87 %, bf16")
    page.locator(".key", has_text="head").click()
    rows = page.locator("tbody tr")
    assert {text for text in rows.locator("td:nth-child(2)").all_text_contents()} == {"head"}
    rows.first.locator(".link").click()  # the op that reads it, whose operands have types
    reads = "Readsmodel.embed_tokens.weight: bf16[1024, 128], bf16, 262.1 kBinput_ids: i64[B, S]"
    expect(page.locator("#details")).to_contain_text(reads)
    expect(page.locator("#details")).to_contain_text("Read bymul_13: bf16[B, S, 128] = nn.rms_norm")
    tab(page, "Routing")
    load = page.locator("tbody").first.locator("td:nth-child(2)")
    assert sum(map(int, load.all_text_contents())) > 4
    page.get_by_label("First token").fill("9")
    page.get_by_label("Last token").fill("1")  # which moves the first
    expect(page.get_by_label("First token")).to_have_value("1")
    page.get_by_label("First token").fill("0")
    assert sum(map(int, load.all_text_contents())) == 4  # two tokens, two experts each
    page.get_by_label("Layer", exact=True).fill("3")
    expect(page.locator("main h2")).to_have_text("model.layers.3.mlp")
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
    page.locator(".box.new > .title", has_text="moe.experts").dispatch_event("click")
    expect(page.locator("#details h2")).to_have_text("moe.experts")
    for change in page.locator(".passes button").all():
        change.click()
        press(page, "Open all")
        assert asked(page, "dangling") == asked(page, "overlapping") == []
        page.locator(".box.op").last.dispatch_event("click")
    for button in page.get_by_role("tab").all():
        button.click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes(scheme: str, model_page: str, open_page: Open) -> None:
    """Words differ enough from what is behind them in both: WCAG's 7 to 1, 4.5 for small ones."""
    page = open_page(model_page, color_scheme=scheme)
    assert contrast(page, "body", "body") > (7, False)
    assert contrast(page, ".soft", "body") > (4.5, False)
    assert contrast(page, "body", "body")[1] == (scheme == "dark")


def test_a_phone(model_page: str, artifact_page: str, open_page: Open) -> None:
    """No view is wider than the screen, and an op is above its details."""
    for html in (model_page, artifact_page, compared().page()):
        page = open_page(html, viewport={"width": 390, "height": 844})
        for button in page.get_by_role("tab").all():
            button.click()
            if page.locator(".picture").count():
                press(page, "Open all")
            width = page.evaluate("() => document.documentElement.scrollWidth")
            assert width <= 390, button.inner_text()
    page = open_page(model_page, viewport={"width": 390, "height": 844})
    page.locator(".card .link").click()
    box, details = (place(page.locator(each)) for each in (".box.on", "#details"))
    assert 0 <= box["y"] < box["y"] + box["height"] <= details["y"]


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
        if page.locator(".picture").count():
            page.locator(".box.op").click()
            press(page, "Text")
            page.locator(".group").click()
        assert page.locator("img").count() == 0
    page.get_by_label("Search").fill("<img")
    expect(page.locator("main .row")).to_have_count(1)
    assert page.locator("img").count() == 0


def many_ops(changed: int) -> Any:
    """48 layers of 210 ops; each pass replaces one op in seven by another."""
    lines, before = [], "x"
    for n in range(LAYERS * OPS):
        attrs = f"<note={changed}>" if changed and (n % OPS + changed) % 7 == 0 else ""
        part = "self_attn.q_proj" if n % OPS < 60 else "mlp.experts"
        module = f"model.layers.{n // OPS}.{part}"
        lines.append(f"v{n}: f32[T, 64] = aten.relu.default({before}) {attrs} @ {module}")
        before = f"v{n}"
    body = "\n".join(lines)
    return parse(f"graph main(x: f32[T, 64]) {{\nsize T in [0, 512]\n{body}\nreturn {before}\n}}")


def test_ten_thousand_ops(open_page: Open) -> None:
    """48 layers and 40 passes: a small page, which is ready at once and opens a layer at once."""
    steps = [GraphStep(f"pass-{n}", many_ops(n), "MOE", n, 0.1) for n in range(PASSES)]
    report = Report("large", **describe_graph(steps[0].graph, {}))
    html = html_of(page_data(ExploredModel("large", report, {"main": steps}, ())))
    size = len(html.encode())
    page = open_page(html)
    ready = page.evaluate("() => performance.getEntriesByType('navigation')[0].domInteractive")
    tab(page, "Graph")
    expect(page.locator(".picture")).to_be_visible()
    seconds = asked(page, "opened")
    expect(page.locator(".box.op")).to_have_count(LAYERS * OPS)
    press(page, "Text")
    page.locator(".group").nth(20).click()
    assert 0 < page.locator(".row").count() < OPS + 1
    page.get_by_label("Search").fill("layers.47.mlp")
    expect(page.locator("main h2").first).to_have_text(re.compile("^150 ops"))
    print(f"{size / 1e6:.2f} MB, ready {ready:.0f} ms, drawn {seconds:.1f} s")
    assert size < 15e6
    assert ready < 2000
    assert seconds < 10


def test_heat_maps(artifact_page: str, files: Files, open_page: Open) -> None:
    """The whole width, axes with names and numbers, a scale, and in each cell its number."""
    page = open_page(artifact_page, viewport={"width": 1280, "height": 800})
    tab(page, "Routing")
    load, strip, both = page.locator(".map").all()
    expect(load.locator(".axis")).to_have_text(["expert", "layer"])
    expect(load.locator(".column-tick")).to_have_text(list("01234567"))
    expect(load.locator(".row-tick")).to_have_text(list("0123"))
    expect(load.locator(".scale")).to_contain_text("times the mean of the layer")
    ids = load_trace(files.trace).ids
    counts = np.stack([(ids == expert).sum((0, 2)) for expert in range(8)], 1)
    means = counts / counts.mean(1, keepdims=True)
    cells = [float(text) for text in load.locator(".cell").all_text_contents()]
    assert cells == pytest.approx(means[means > 0], abs=0.051)
    box = place(load.locator("svg"))
    assert box["width"] > 1200
    load.locator("svg").hover(position={"x": box["width"] - 20, "y": 5})
    expect(load.locator(".says")).to_contain_text(f"expert 7: {counts[0, 7]} token")
    load.locator("svg").click(position={"x": box["width"] / 2, "y": 60})
    expect(page.locator("main h2")).to_have_text("model.layers.2.mlp")
    expect(strip.locator(".axis")).to_have_text(["token", "expert"])
    expect(both.locator(".axis")).to_have_text(["expert", "expert"])
    tab(page, "Kernels")
    times = page.locator(".map")
    expect(times.locator(".axis")).to_have_text(["part", "layer"])
    assert "mlp" in times.locator(".column-tick").all_text_contents()
