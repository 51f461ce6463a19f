"""Pictures: their content, their validity, and that names cannot break them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import which

import pytest

from moec.errors import UsageError
from moec.ir.text import parse, print_graph
from moec.report.picture.dot import dot, save
from moec.report.picture.repeats import Scene, ScenePart
from moec.report.picture.scene import scene
from tests.commands import models


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
    assert "tied to embed.weight" in dot(drawn)


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


def test_a_model_without_modules() -> None:
    graph = parse("graph main(x: f32[T]) {\n  y: f32[T] = aten.relu.default(x)\n  return y\n}")
    assert "nothing" in dot(scene("nothing", graph))


def test_dot_as_text(golden: Callable[[str], None]) -> None:
    golden(dot(tiny(2)))


@pytest.mark.skipif(which("dot") is None, reason="needs Graphviz")
def test_graphviz_reads_it() -> None:
    subprocess.run(["dot", "-Tsvg"], input=dot(tiny()), text=True, check=True)


def test_parameters_are_all_counted() -> None:
    assert tiny().parameters == 400 + 3 * (8 + 64 + 32 + 256) + 400


def test_two_blocks_in_one_module_share_a_card() -> None:
    blocks = [models.block(0), models.block(0)]
    drawn = scene("two", models.graph(1), blocks)
    (frame,) = [p for p in drawn.root.parts if p.parts]
    (card,) = [p for p in frame.parts if p.blocks]
    assert dot(drawn).count("MoE: 2 of 4 experts") == len(card.blocks) == 2


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    save(tiny(), tmp_path / "x.dot")
    assert (tmp_path / "x.dot").read_text() == dot(tiny())
    with pytest.raises(UsageError, match="cannot be written: there is no such file or folder"):
        save(tiny(), tmp_path / "none" / "x.dot")
