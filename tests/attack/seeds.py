"""The files to damage: two small models, files of their inputs, and graphs of many forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from moec.runtime.artifact import artifact
from tests.commands import models
from tests.runtime import toy

_GOLDEN = Path(__file__).parents[1] / "golden/passes"
_TEXTS = (
    "lower/test_moe_passes/test_text[fold-addend]",
    "approximate/test_insert_zero_experts/test_fused_text",
    "recognise/test_recognise/test_forms[capacity-slot]",
    "decode/test_incremental/test_the_step",
    "decode/test_incremental/test_what_is_carried",
    "decode/test_kv_inputs/test_the_graph",
    "approximate/test_refactor_dense/test_text",
    "parallel/test_plan_parallelism/test_text[slices]",
)


REBUILT = """graph main(ids: i64[T], s: f32[T, 8]; table: f32[16, 8], router: f32[4, 8],
           w2: f32[4, 8, 6], up: f32[4, 6, 8], gate: f32[4, 6, 8]) {
  size T in [0, 64]
  x: f32[T, 8] = aten.embedding.default(table, ids)
  weights: f32[T, 2], experts: i64[T, 2] = moe.gate(x, router)
    <k=2, renormalize=true, compute=f32, logits=f32>
  order: i32[2*T], slots: i32[T, 2], ends: i32[4] = moe.sort(experts) <num_experts=4>
  h: f32[2*T, 6] = grouped.linear(x, ends, gate, up, order) <matrices=2, dtype=f32, gather=2> {
    graph body(acc_0: f32[R, 6], acc_1: f32[R, 6]) {
      a: f32[R, 6] = aten.silu.default(acc_0)
      h: f32[R, 6] = aten.mul.Tensor(a, acc_1)
      return h
    }
  }
  y: f32[2*T, 8] = grouped.linear(h, ends, w2) <matrices=1, dtype=f32>
  z: f32[T, 8] = moe.combine(y, slots, weights, s)
    <k=2, tokens={T}, dtype=f32, weighted=true, added=true>
  chosen: f32[T, 2] = aten.gather.default(z, experts) <dim=1>
  near: f32[T, 2, 8] = aten.embedding.default(table, experts)
  return z, chosen, near
}
"""


def graphs() -> tuple[str, ...]:
    """Texts of graphs that are right, and may be in an artifact."""
    return tuple((_GOLDEN / f"{name}.txt").read_text() for name in _TEXTS)


def write_seeds(folder: Path) -> None:
    """`toy.moec` with weights, a state and a sample; `speaker.moec`, which continues text; and the
    inputs of the first as x.npz, y.npz, x.npy and x.safetensors."""
    package = toy.package()
    texts = {"main": graphs()[0]}
    extra = {"report": models.report().to_dict()}
    artifact.write(
        package, folder / "toy.moec", graphs=texts, samples=[toy.sample(package)],
        tolerance=1e-4, extra=extra,
    )  # fmt: skip
    artifact.write(
        toy.language_model(), folder / "speaker.moec", graphs=texts, extra=extra,
        files=toy.tokenizer_files(),
    )  # fmt: skip
    inputs = toy.inputs()
    np.savez(folder / "x.npz", **inputs)
    np.savez_compressed(folder / "y.npz", **inputs)
    np.save(folder / "x.npy", inputs["x"])
    (folder / "x.safetensors").write_bytes(save(inputs))


def write_rebuilt(folder: Path) -> None:
    """`rebuilt.moec`, whose graph looks up and sorts by whole numbers, with a sample; and its
    inputs as rebuilt.npz. Needs the compiler."""
    import torch

    from moec.codegen.package import build
    from moec.ir.graph import Module, Program
    from moec.ir.text import parse
    from moec.runtime.call.executor import Executor
    from moec.target import cpu

    graph, generator = parse(REBUILT), torch.Generator().manual_seed(0)
    sizes = {param.name: list(map(int, map(str, param.type.shape))) for param in graph.params}
    weights = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    package = build(Module.of(Program(graph, weights)), cpu.parse("cpu"))
    inputs = {"ids": np.arange(5), "s": np.ones((5, 8), np.float32)}
    np.savez(folder / "rebuilt.npz", **inputs)  # type: ignore[arg-type]
    sample = artifact.Sample(inputs, Executor(package)(inputs))
    artifact.write(
        package, folder / "rebuilt.moec", graphs={"main": REBUILT}, samples=[sample],
        tolerance=1e-4,
    )  # fmt: skip
