"""Pictures: their content, their validity, and that names cannot break them."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import which

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import UsageError
from moec.ir.graph import Graph
from moec.ir.text import parse, print_graph
from moec.report.picture import Picture, Scene, ScenePart, draw, save, scene
from moec.report.picture.svg import chosen_cells, lanes, svg
from tests.commands import models

ENDINGS = (".svg", ".html", ".dot")


def tiny(layers: int = 3) -> Scene:
    report = models.report(layers)
    return scene("tiny", models.graph(layers), report.blocks, report.declined[:0])


def outline(part: ScenePart, depth: int = 0) -> list[str]:
    """A scene as an indented list."""
    lines = []
    for inner in part.parts:
        times = f" x{inner.times}" if inner.times > 1 else ""
        lines.append(f"{'  ' * depth}{inner.label}{times}: {inner.kind} {inner.parameters}")
        lines += outline(inner, depth + 1)
    if part.edges:
        lines.append(f"{'  ' * depth}skips {part.edges}")
    return lines


def test_alike_layers_are_drawn_once() -> None:
    assert outline(tiny().root) == [
        "embed: embedding 400",
        "layers 0 … 2 x3: frame 360",
        "  norm: norm 8",
        "  attn: attention 64",
        "  +: sum 0",
        "  moe: moe 288",
        "  +: sum 0",
        "  skips ((-1, 2), (2, 4))",
        "head: linear 400",
    ]


def test_parameters_are_all_counted() -> None:
    full = tiny().root
    assert full.parameters == 400 + 3 * (8 + 64 + 32 + 256) + 400
    assert full.active == full.parameters - 3 * (288 - 160)
    assert sum(full.split.values()) == full.parameters
    assert full.split == {
        "embedding": 400, "norm": 24, "attention": 192, "router": 96, "moe": 768, "linear": 400
    }  # fmt: skip


def test_a_layer_that_differs_stands_apart() -> None:
    report = models.report(3)
    other = replace(report.blocks[1], router="sigmoid, top-2")
    drawn = scene("tiny", models.graph(3), (report.blocks[0], other, report.blocks[2]))
    labels = [part.label for part in drawn.root.parts]
    assert labels == ["embed", "layers 0", "layers 1", "layers 2", "head"]


def test_blocks_in_a_row_with_residuals_between_them_are_one_layer() -> None:
    """for block in blocks: x = x + block(x)"""
    lines = "".join(
        f"  b{i}: f32[T, 4] = aten.linear.default(x{i}, blocks.{i}.weight) @ blocks.{i}\n"
        f"  x{i + 1}: f32[T, 4] = aten.add.Tensor(x{i}, b{i})\n"
        for i in range(4)
    )
    params = ", ".join(f"blocks.{i}.weight: f32[4, 4]" for i in range(4))
    graph = parse(f"graph main(x0: f32[T, 4]; {params}) {{\n{lines}  return x4\n}}")
    assert outline(scene("residual", graph).root) == [
        "blocks 0 … 3 x4: frame 16",
        "  blocks 0: linear 16",
        "  +: sum 0",
        "  skips ((-1, 1),)",
    ]


@pytest.mark.parametrize("origin", [".moe", ""])
def test_a_residual_folded_into_the_combine_is_drawn(origin: str) -> None:
    """Whether the combine's origin is the block or, for the addition, the layer."""
    text = print_graph(models.graph()).replace("weighted=true", "weighted=true, added=true")
    for i in range(3):
        text = text.replace(
            f"moe.combine(m{i}, o{i}, w{i})", f"moe.combine(m{i}, o{i}, w{i}, r{i})"
        )
        text = text.replace(f"aten.add.Tensor(r{i}, c{i})", f"aten.clone.default(c{i})")
        text = text.replace(f"added=true> @ layers.{i}.moe", f"added=true> @ layers.{i}{origin}")
    drawn = scene("folded", parse(text), models.report().blocks)
    assert outline(drawn.root)[1:8] == outline(tiny().root)[1:8]


def test_what_is_fused_stands_in_its_modules() -> None:
    """A residual and the norm after it are one kernel, which is called as the layer is."""
    text = """
    graph main(x: f32[T, 8]; l.0.a.weight: f32[8, 8], l.0.post.weight: f32[8],
               l.0.b.weight: f32[8, 8], l.0.c.weight: f32[8, 8]) {
      a: f32[T, 8] = aten.linear.default(x, l.0.a.weight) @ l.0.a
      h: f32[T, 8], n: f32[T, 8] = nn.add_norm(a, x, l.0.post.weight) <kind="rms"> @ l.0
      b: f32[T, 8] = aten.linear.default(n, l.0.b.weight) @ l.0.b
      y: f32[T, 8] = aten.add.Tensor(h, b) @ l.0
      return y
    }
    """
    fused = parse(text)
    add, norm = "aten.add.Tensor(a, x) @ l.0", "nn.rms_norm(h, l.0.post.weight) @ l.0.post"
    lines = f"h: f32[T, 8] = {add}\n n: f32[T, 8] = {norm}"
    start, end = text.index("h: f32"), text.index("b: f32[T, 8] =")
    plain = parse(text[:start] + lines + "\n" + text[end:])
    assert outline(scene("x", fused).root) == outline(scene("x", plain).root)
    names = [line.strip() for line in outline(scene("x", fused).root)]
    assert [name.split(" ")[0] for name in names if not name.startswith("skips")][-5:] == [
        *("a:", "+:", "post:", "b:", "+:")
    ]


def test_a_tied_head_says_so() -> None:
    text = print_graph(models.graph()).replace("x2, head.weight)", "x2, embed.weight)")
    drawn = scene("tied", parse(text.replace(", head.weight: f32[50, 8]", "")))
    head = drawn.root.parts[-1]
    assert (head.label, head.parameters, head.tied) == ("head", 0, ("embed.weight",))
    assert "tied to embed.weight" in draw(drawn, ".dot")
    assert ">tied<" in draw(drawn, ".svg")
    assert "tied to" in draw(drawn, ".html")


def test_an_op_without_inputs() -> None:
    """Of a forged graph; inspect reads it without the rules of the IR."""
    graph = parse(
        "graph main(x: f32[T]) {\n  y: f32[T] = aten.clone.default()\n"
        "  z: f32[T] = aten.relu.default(y) @ a\n  return z\n}"
    )
    assert [part.label for part in scene("none", graph).root.parts] == ["a"]


def test_a_model_that_is_one_block() -> None:
    text = print_graph(models.graph(1))
    for path in ("layers.0.moe.router", "layers.0.moe", "layers.0", "embed", "head"):
        text = text.replace(f" @ {path}\n", "\n").replace(f" @ {path} {{", " {")
    block = replace(models.block(0), name="(whole model)")
    (card,) = scene("one", parse(text), [block]).root.parts
    assert card.blocks == (block,)
    assert card.parameters == sum(card.split.values())


def test_two_blocks_in_one_module_share_a_card() -> None:
    blocks = [models.block(0), models.block(0)]
    drawn = scene("two", models.graph(1), blocks)
    (frame,) = [p for p in drawn.root.parts if p.parts]
    (card,) = [p for p in frame.parts if p.blocks]
    assert len(card.blocks) == 2
    assert "first of 2 MoE blocks here" in draw(drawn, ".svg")
    assert "2 MoE blocks" in draw(drawn, ".svg")


def test_a_declined_place_says_why() -> None:
    report = models.report()
    drawn = scene("tiny", models.graph(), report.blocks, report.declined)
    assert "linear layer is no expert" in draw(drawn, ".svg")
    assert "layers.1.attn: recognise" in draw(drawn, ".svg")
    assert "linear layer is no expert" in draw(drawn, ".html")


def test_a_model_without_modules() -> None:
    graph = parse("graph main(x: f32[T]) {\n  y: f32[T] = aten.relu.default(x)\n  return y\n}")
    for ending in ENDINGS:
        assert "nothing" in draw(scene("nothing", graph), ending)


def test_dot_as_text(golden: Callable[[str], None]) -> None:
    golden(draw(tiny(2), ".dot"))


@pytest.mark.parametrize("ending", [".svg", ".html"])
def test_the_svg_is_whole_and_inside_its_frame(ending: str) -> None:
    text = draw(tiny(), ending)
    root = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y = float(box.get("x", 0)), float(box.get("y", 0))
        assert 0 <= x <= x + float(box.attrib["width"]) <= width
        assert 0 <= y <= y + float(box.attrib["height"]) <= height
    for words in root.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 <= float(words.attrib["x"]) <= width
        assert 0 <= float(words.attrib["y"]) <= height


def test_every_part_of_the_page_has_its_details() -> None:
    page = draw(tiny(), ".html")
    parts = json.loads(re.search(r"const parts=(\[.*\]), home=", page).group(1))  # type: ignore[union-attr]
    assert sorted(map(int, re.findall(r'data-part="(\d+)"', page))) == list(range(len(parts)))
    (moe,) = [part for part in parts if part["name"] == "moe"]
    assert ["router", "softmax, top-2"] in moe["facts"]
    assert ["layers.0.moe.up", "f32[4, 8, 8]"] in dict(moe["tables"])["Weights"]


def test_names_cannot_break_out() -> None:
    nasty = '</script><img src=x onerror="alert(1)">&'
    report = models.report()
    blocks = tuple(replace(b, router=nasty) for b in report.blocks)
    drawn = scene(nasty, models.graph(), blocks)
    for ending in (".svg", ".html"):
        assert "<img" not in draw(drawn, ending)
    assert draw(drawn, ".html").count("</script>") == 1
    ElementTree.fromstring(draw(drawn, ".svg"))


@pytest.mark.skipif(which("dot") is None, reason="needs Graphviz")
def test_graphviz_reads_it() -> None:
    subprocess.run(["dot", "-Tsvg"], input=draw(tiny(), ".dot"), text=True, check=True)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.svg, \.html, \.dot, not '\.png'"):
        save(tiny(), tmp_path / "out.png")


def test_a_picture_of_many_experts() -> None:
    graph: Graph = models.graph(1)
    block = replace(models.block(0), experts=512, top_k=10, shared="swiglu")
    picture, _ = svg(scene("many", graph, [block]))
    assert picture.count("k-moe ghost") == 512
    assert "weighted sum of 10 of 512 experts" in picture


@given(st.integers(1, 600).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))))
def test_as_many_experts_are_picked_as_are_chosen(sizes: tuple[int, int]) -> None:
    experts, top_k = sizes
    chosen = chosen_cells(experts, top_k)
    assert len(chosen) == top_k
    assert all(0 <= e < experts for e in chosen)


@given(st.lists(st.tuples(st.integers(-1, 9), st.integers(1, 9)).map(sorted), max_size=8))
def test_skips_that_overlap_have_lanes_of_their_own(pairs: list[list[int]]) -> None:
    edges = sorted({(a, b + 1) for a, b in pairs})
    placed = list(zip(edges, lanes(edges), strict=True))
    for (a, lane_a), (b, lane_b) in itertools.combinations(placed, 2):
        assert lane_a != lane_b or a[1] <= b[0] or b[1] <= a[0]


def test_a_notebook_shows_it(tmp_path: Path) -> None:
    picture = Picture(tiny())
    assert repr(picture) == f"<picture of {tiny().title}>"
    assert picture._repr_html_().startswith("<svg")
    picture.save(tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text() == picture._repr_html_()
    with pytest.raises(UsageError, match="cannot be written: there is no such file or folder"):
        picture.save(tmp_path / "none" / "x.svg")
