"""What the first run on a GPU compares: small layers and models, with the kernels that each is
there for. The reference is eager PyTorch on the CPU; for stored codes, moec's kernels for CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import moec
from benchmarks.cuda.contenders import block
from benchmarks.cuda.shapes import LayerShape
from moec.runtime.call.executor import Executor
from moec.runtime.device.gpu import part_for
from moec.runtime.package import CUBIN, DECODE, Package
from moec.runtime.text.texts import Texts
from tests.models.families import FAMILIES

WIDE, NARROW = LayerShape(32, 8, 512, 256), LayerShape(4, 2, 512, 64)
"""Experts of enough tiles for all SMs, and of few."""
TOKENS = (1, 64, 256)
"""Of WIDE, 0.25, 16 and 64 rows per expert: each has its own launch."""
FORMATS = ("int8", "int4:32", "int4:32:asymmetric", "fp8:128", "mxfp4")
NEAR = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""The difference allowed, of the greatest element: float32 sums in another order; 16 bits are
rounded where eager does not round, and otherwise."""
OTHER_CHOICES = 0.05
"""The share of rows of a layer of 16 bits that may differ by more, as nearly equal scores choose
other experts. Of a model it is five times as much."""
EXPERTS = ("route", "dispatch", "combine")


@dataclass(frozen=True)
class Check:
    """`make` returns a module and the inputs of each call. `kernels` must be among those that it is
    compiled to. `options` are those of moec.compile; with `codes` the reference is moec's on the
    CPU. `near` and `rows` are what may differ. Its machine code is PTX alone if it is `later`."""

    make: Callable[[], tuple[Any, Sequence[Mapping[str, Any]]]]
    kernels: tuple[str, ...]
    near: float
    rows: float = 0.0
    options: Callable[[], dict[str, Any]] = dict
    codes: bool = False
    target: str = ""  # follows the name of the target
    later: bool = False


@dataclass
class Outcome:
    """`error` is the greatest difference of an element, as a share of the greatest element of its
    call; `differing` the greatest share of rows of a call that differ by more than is allowed.
    `code` is the part of the artifact that was loaded."""

    kernels: tuple[str, ...] = ()
    code: str = ""
    error: float = 0.0
    differing: float = 0.0
    calls: int = 0

    def compare(self, result: Any, expected: Any, near: float) -> None:
        result, expected = (torch.as_tensor(x).cpu().float() for x in (result, expected))
        scale = float(expected.abs().max())
        errors = (result - expected).abs().flatten(0, -2).amax(-1) / scale
        self.calls += 1
        self.error = max(self.error, float(errors.nan_to_num(torch.inf).max()))
        self.differing = max(self.differing, float((~(errors <= near)).float().mean()))


def layer(
    shape: LayerShape, dtype: torch.dtype, tokens: Sequence[int] = TOKENS
) -> tuple[Any, Sequence[Mapping[str, Any]]]:
    torch.manual_seed(1)
    calls = [{"hidden_states": torch.randn(1, count, shape.width).to(dtype)} for count in tokens]
    return block(shape).to(dtype), calls


def family(name: str, dtype: torch.dtype) -> tuple[Any, Sequence[Mapping[str, Any]]]:
    of = FAMILIES[name]
    return of.build(dtype), [of.inputs(2, 9), of.inputs(1, 70, seed=2)]


def _of_layer(
    dtype: torch.dtype, shape: LayerShape = WIDE, tokens: Sequence[int] = TOKENS, **options: Any
) -> Check:
    make, rows = partial(layer, shape, dtype, tokens), OTHER_CHOICES
    return replace(Check(make, (*EXPERTS, "gathered", "grouped"), NEAR[dtype], rows), **options)


def _of_codes(format: str) -> Check:
    kind, options = format.partition(":")[0], partial(dict, quant=format)
    return _of_layer(torch.bfloat16, kernels=(*EXPERTS, kind), options=options, codes=True)


def _of_model(name: str, dtype: torch.dtype, *kernels: str) -> Check:
    rows = 0.0 if dtype is torch.float32 else 5 * OTHER_CHOICES
    return Check(partial(family, name, dtype), (*EXPERTS, *kernels), NEAR[dtype], rows)


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CHECKS: dict[str, Check] = {
    "layer-bf16": _of_layer(BF16),
    "layer-float16": _of_layer(F16),
    "layer-float32": _of_layer(F32, rows=0.0),
    "layer-tf32": _of_layer(F32, near=1e-2, target="+tf32"),
    "layer-narrow": _of_layer(BF16, NARROW, (3, 40, 100)),
    "layer-ptx": _of_layer(BF16, later=True),
    **{f"layer-{format}": _of_codes(format) for format in FORMATS},
    "model-mixtral": _of_model("mixtral", BF16, "tile_attention", "rms_norm", "add_rms_norm"),
    "model-gpt-oss": _of_model("gpt_oss", BF16, "tile_attention"),
    "model-deepseek-v3": _of_model("deepseek_v3", F32, "attention", "linear"),
    "model-phimoe": _of_model("phimoe", F32, "layer_norm"),
    "model-qwen2-moe": _of_model("qwen2_moe", F16, "tile_attention"),
}


def outcome(check: Check, device: str, target: str) -> Outcome:
    """Compiles and compares. Raises SystemExit, with the reason, where results differ by more than
    is allowed or a kernel is not used."""
    module, calls = check.make()
    options: dict[str, Any] = {"kwargs": calls[0], "verify": False, **check.options()}
    compiled = moec.compile(module, target=target + check.target, **options)
    assert compiled.package is not None
    if check.later:
        compiled = replace(compiled, **_by_ptx(compiled.package))
    result = Outcome(kernels_of(compiled.package), _part(compiled.package))
    if missing := set(check.kernels) - set(result.kernels):
        raise SystemExit(f"it does not use {', '.join(sorted(missing))}")
    reference = moec.compile(module, target="cpu", **options) if check.codes else module
    for call in calls:
        # Other arguments are those of capture: `use_cache` is no input of the compiled model.
        there = {n: x.to(device) for n, x in call.items() if isinstance(x, torch.Tensor)}
        result.compare(_first(compiled(**there)), _first(_eager(reference, call)), check.near)
    if DECODE in compiled.package.functions:
        for logits, expected in _continued(compiled.ready()[1], module, calls[0]):
            result.compare(logits, expected, check.near)
    if result.differing > check.rows:
        raise SystemExit(f"the kernels are wrong: {result}")
    return result


def kernels_of(package: Package) -> tuple[str, ...]:
    """Their names, as in the report."""
    return tuple(sorted({name for _, name in package.kernels}))


def _part(package: Package) -> str:
    return "" if package.gpu is None else part_for(package.gpu, 0)


def _by_ptx(package: Package) -> dict[str, Any]:
    assert package.gpu is not None
    parts = {n: part for n, part in package.gpu.parts.items() if not n.endswith(CUBIN)}
    package = replace(package, gpu=replace(package.gpu, parts=parts))
    return {"package": package, "executor": Executor(package)}


def _eager(reference: Any, call: Mapping[str, Any]) -> Any:
    with torch.no_grad():
        return reference(**call)


def _first(result: Any) -> Any:
    """The tensor, or the first of several, which are those of a model or of a layer."""
    result = getattr(result, "logits", result)
    return result[0] if isinstance(result, tuple) else result


def _continued(
    executor: Executor, model: Any, call: Mapping[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """Logits after a prompt, then after single tokens, with keys and values in caches."""
    ids = call["input_ids"]
    expected = _eager(model, call).logits
    texts, end = Texts(executor, len(ids), room=ids.shape[1]), ids.shape[1]
    for start, stop in ((0, end - 3), *((at, at + 1) for at in range(end - 3, end))):
        logits = texts.feed(ids[:, start:stop].tolist())
        yield logits, expected[:, stop - 1]
