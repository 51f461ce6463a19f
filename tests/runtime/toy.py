"""A handmade package: y = x @ w + b + table[ids], top = the two greatest of y, count = count + 1.

x f32[T, 4]   ids i64[T]   w bf16[4, 3]   b f32[3]   table f32[5, 3]   state count f32[1]
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moec.runtime.artifact.artifact import Sample
from moec.runtime.dtypes import Array
from moec.runtime.package import Function, Package, Port, StatePort
from moec.target.cpu import CpuNeeds

GRAPH = "graph main(x: f32[T, 4]) {\n  return x\n}\n"


@cache
def library() -> bytes:
    import tvm
    from tvm import relax
    from tvm.script import relax as R

    rows = tvm.tirx.Var("T", "int64")
    x = relax.Var("x", R.Tensor((rows, 4), "float32"))
    ids = relax.Var("ids", R.Tensor((rows,), "int64"))
    count = relax.Var("count", R.Tensor((1,), "float32"))
    w = relax.Var("w", R.Tensor((4, 3), "bfloat16"))
    b = relax.Var("b", R.Tensor((3,), "float32"))
    table = relax.Var("table", R.Tensor((5, 3), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, ids, count, w, b, table]):
        with builder.dataflow():
            product = relax.op.matmul(x, relax.op.astype(w, "float32"))
            shifted = relax.op.add(product, b)
            y = builder.emit(relax.op.add(shifted, relax.op.take(table, ids, axis=0)))
            top = builder.emit(relax.op.topk(y, 2, ret_type="values"))
            low = builder.emit(relax.op.astype(y, "bfloat16"))
            more = builder.emit(relax.op.add(count, relax.const(np.float32([1]))))
            output = builder.emit_output(relax.Tuple([y, top, low, more]))
        builder.emit_func_output(output)
    return export(builder.get())


def export(module: Any) -> bytes:
    import tvm

    built = tvm.compile(module, tvm.target.Target({"kind": "llvm"}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lib.so"
        built.export_library(str(path))
        return path.read_bytes()


def package() -> Package:
    rng = np.random.default_rng(0)
    main = Function(
        inputs=(Port("x", "f32", ("T", 4)), Port("ids", "i64", ("T",))),
        outputs=(
            Port("y", "f32", ("T", 3)),
            Port("top", "f32", ("T", 2)),
            Port("low", "bf16", ("T", 3)),
        ),
        states=(StatePort("count", "f32", (1,), initial="zero"),),
        sizes={"T": (0, 64)},
        params=(Port("w", "bf16", (4, 3)), Port("b", "f32", (3,)), Port("table", "f32", (5, 3))),
        index_ranges={"ids": (0, 4)},
    )
    return Package(
        target=CpuNeeds("generic"),
        functions={"main": main},
        arrays={
            "w": rng.standard_normal((4, 3)).astype(ml_dtypes.bfloat16),
            "b": rng.standard_normal(3).astype(np.float32),
            "table": rng.standard_normal((5, 3)).astype(np.float32),
            "zero": np.zeros(1, np.float32),
        },
        library=library(),
        kernels=(("layer", "matmul"),),
        notes=("made by hand",),
    )


def inputs(rows: int = 3, seed: int = 1) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, 4)).astype(np.float32),
        "ids": rng.integers(0, 5, rows),
    }


def expected(package: Package, inputs: dict[str, Array]) -> Array:
    arrays = package.arrays
    product = inputs["x"] @ arrays["w"].astype(np.float32)
    result: Array = product + arrays["b"] + arrays["table"][inputs["ids"]]
    return result


def sample(package: Package, rows: int = 3) -> Sample:
    arguments = inputs(rows)
    y = expected(package, arguments)
    top = -np.sort(-y, axis=1)[:, :2]
    return Sample(arguments, {"y": y, "top": top, "low": y.astype(ml_dtypes.bfloat16)})


@cache
def language_model_library(name: str = "main") -> bytes:
    """logits = table[ids], which makes the token after t the greatest of row t."""
    import tvm
    from tvm import relax
    from tvm.script import relax as R

    batch, length = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("S", "int64")
    ids = relax.Var("input_ids", R.Tensor((batch, length), "int64"))
    mask = relax.Var("attention_mask", R.Tensor((batch, length), "int64"))
    table = relax.Var("table", R.Tensor((8, 8), "float32"))
    builder = relax.BlockBuilder()
    with builder.function(name, [ids, mask, table]):
        with builder.dataflow():
            output = builder.emit_output(relax.op.take(table, ids, axis=0))
        builder.emit_func_output(output)
    return export(builder.get())


def language_model(longest: int | None = 16) -> Package:
    """Token t is followed by t + 1, and 7 by 0."""
    main = Function(
        inputs=(
            Port("input_ids", "i64", ("B", "S")),
            Port("attention_mask", "i64", ("B", "S")),
        ),
        outputs=(Port("logits", "f32", ("B", "S", 8)),),
        sizes={"B": (1, 4), "S": (1, longest)},
        params=(Port("table", "f32", (8, 8)),),
        index_ranges={"input_ids": (0, 7)},
    )
    return Package(
        target=CpuNeeds("generic"),
        functions={"main": main},
        arrays={"table": np.roll(np.eye(8, dtype=np.float32), 1, axis=1)},
        library=language_model_library(),
    )


def tokenizer_files(stop: int | None = 7) -> dict[str, bytes]:
    """Words a to h, split at spaces; the token `stop` ends the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    result = Tokenizer(models.WordLevel({c: i for i, c in enumerate("abcdefgh")}, unk_token="a"))
    result.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return {
        "tokenizer/tokenizer.json": result.to_str().encode(),
        "tokenizer/generation_config.json": json.dumps({"eos_token_id": stop}).encode(),
    }
