"""One random choice of everything that MoE layers differ in, and its Python source."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from textwrap import indent

from tests.fuzz import branches
from tests.fuzz.capacities import DROPS, LIMITS, ORDERS
from tests.fuzz.dispatches import BY_EXPERT, DISPATCHES, STACKED, WITH_CAPACITY
from tests.fuzz.experts import EXPERTS
from tests.fuzz.gates import GATES
from tests.fuzz.outputs import OUTPUTS, SHARED
from tests.fuzz.routers import CORRECTED, GROUPED, OF_ALL, ROUTERS, WIDTH
from tests.fuzz.second_inputs import SECOND_INPUTS, Use

DTYPES = ("float32", "float32", "float32", "float32", "bfloat16", "float16", "float64")
FLATS = {
    "view": ("flat = x.view(-1, {D})", "out.view_as(x)"),
    "reshape": ("flat = x.reshape(-1, x.shape[-1])", "out.reshape(x.shape)"),
    "unpacked": ("b, s, d = x.shape\nflat = x.view(b * s, d)", "out.view(b, s, d)"),
    "flatten": ("flat = x.flatten(0, 1)", "out.unflatten(0, x.shape[:2])"),
    "size": ("flat = x.reshape(x.size(0) * x.size(1), x.size(2))", "out.view(x.size(0), -1, {D})"),
    "transposed": (
        "s, b, d = x.transpose(0, 1).shape\nflat = x.transpose(0, 1).reshape(-1, d)",
        "out.view(s, b, d).transpose(0, 1)",
    ),
}
AROUND = {
    "": ("", "{Y}"),
    "norm": ("before = x\nx = F.layer_norm(x, ({D},))", "before + {Y}"),
    "twice": ("before = x", "{Y} * torch.sigmoid(before)"),
    "rows": ("x = x.relu()", "{Y} / (1 + {Y}.square().mean(-1, keepdim=True)).sqrt()"),
}
"""By name: lines before the layer, and the result in terms of the layer's."""
EXPERT_COUNTS = (3, 4, 4, 4, 4, 6, 8)
"""Mostly few: torch takes as long as there are experts to trace a loop over them."""
NUMBERS = ("literals", "globals", "attributes", "config")

_HEAD = """import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

"""
_OUTPUT = """
@dataclass
class Output:
    hidden: torch.Tensor
    loss: torch.Tensor
    dropped: int
    extra: torch.Tensor | None = None

"""
_CONFIG = """
@dataclass
class Config:
    num_experts: int = {E}
    top_k: int = {K}
    width: int = {D}
    hidden: int = {H}

"""


@dataclass(frozen=True)
class Layer:
    """A name for each part, "" where there is none: `limit` drops rows, `second` is an input
    that is used as `use` says, and moec compiles with its value `example`; `part` depends on a
    `condition` of sizes; `around` is what the model does before and after. E experts, K a token,
    width D, hidden width H."""

    gate: str
    router: str
    around: str
    limit: str
    order: str
    drop: str
    dispatch: str
    expert: str
    shared: str
    outputs: str
    flat: str
    numbers: str
    dtype: str
    experts: int
    top_k: int
    width: int
    hidden: int
    second: str = ""
    use: str = ""
    example: str = ""
    condition: str = ""
    part: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


def draw(seed: int, index: int) -> Layer:
    """The layer number `index` of a seed: the same on every machine."""
    choose = random.Random(f"{seed}:{index}")

    def one(names: Sequence[str]) -> str:
        return choose.choice(list(names))

    router = one(ROUTERS)
    limited = choose.random() < 0.4 and router not in OF_ALL
    dispatch = one(WITH_CAPACITY) if limited and choose.random() < 0.6 else one(DISPATCHES)
    if router == "expert choice" and choose.random() < 0.5:
        dispatch = one(BY_EXPERT)
    stacks = [name for name, form in EXPERTS.items() if form.stacked]
    count = choose.choice([n for n in EXPERT_COUNTS if n % 2 == 0 or router not in GROUPED])
    width = WIDTH.get(router, choose.choice((1, 2, 2, 2, 3, count)))
    layer = Layer(
        gate=one(GATES),
        router=router,
        second=one(SECOND_INPUTS) if choose.random() < 0.5 else "",
        around=one(AROUND) if choose.random() < 0.3 else "",
        limit=one(LIMITS) if limited else "",
        order=one(ORDERS),
        drop=one(DROPS),
        dispatch=dispatch,
        expert=one(stacks if dispatch in STACKED else list(EXPERTS)),
        shared=one(SHARED),
        outputs=one(OUTPUTS),
        flat=one(FLATS),
        numbers=one(NUMBERS),
        dtype=one(DTYPES),
        experts=count,
        top_k=min(width, 2) if router in GROUPED else width,
        width=choose.choice((16, 20)),
        hidden=choose.choice((12, 24, 40)),
    )
    if layer.second:
        kind = SECOND_INPUTS[layer.second]
        usual = next(iter(kind.values))
        example = usual if choose.random() < 0.7 else one(kind.values)
        layer = replace(layer, use=one(kind.uses), example=example)
    if choose.random() < 0.35:
        part = one(_parts(layer))
        layer = replace(layer, part=part, condition=one(_conditions(layer, part)))
    return layer


def _parts(layer: Layer) -> list[str]:
    """Those that a condition may have; what depends on the second input is the most frequent."""
    parts = [*branches.PARTS, branches.DISPATCH]
    parts += [branches.SHARED] if SHARED[layer.shared][1] else []
    conditional = layer.second and not _use(layer).pools and layer.use != "unused"
    return parts + [branches.SECOND] * (len(parts) if conditional else 0)


def _conditions(layer: Layer, part: str) -> tuple[str, ...]:
    early = part == branches.SECOND and _use(layer).texts
    return branches.CONDITIONS + (() if early else branches.CONDITIONS_OF_TOKENS)


def _use(layer: Layer) -> Use:
    """The lines of the second input, on the condition if it is the part that depends on it."""
    if not layer.second:
        return Use()
    use = SECOND_INPUTS[layer.second].use(layer.use)
    return use.on(layer.condition) if layer.part == branches.SECOND else use


def source(layer: Layer) -> str:
    """A file with a class Layer, which takes no arguments."""
    numbers = {"E": layer.experts, "K": layer.top_k, "D": layer.width, "H": layer.hidden}
    named = {key: _spelled(layer.numbers, key, number) for key, number in numbers.items()}
    expert = EXPERTS[layer.expert]
    shared, added = SHARED[layer.shared]
    flat, back = FLATS[layer.flat]
    gate, logits = GATES[layer.gate]
    begin = ["super().__init__()", *_numbers(layer.numbers, numbers), gate, expert.init, shared]
    if layer.router in CORRECTED:
        begin.append('self.register_buffer("correction", torch.randn({E}) * 0.2)')
    if layer.limit == "self":
        begin.append("self.capacity = 7")
    if layer.limit == "factor":
        begin.append("self.factor = 1.25")
    use = _use(layer)
    begin.append(use.init)
    begun, back = AROUND[layer.around][0], AROUND[layer.around][1].replace("{Y}", back)
    back = use.result.replace("{Y}", f"({back})") if use.result != "{Y}" else back
    dispatched = (DISPATCHES | WITH_CAPACITY | BY_EXPERT)[layer.dispatch]
    if layer.part == branches.DISPATCH:
        dispatched = branches.branch(layer.condition, DISPATCHES["share"], dispatched)
    if layer.part == branches.SHARED:
        added = branches.branch(layer.condition, added)
    steps = [begun, use.texts, flat, "tokens = flat.shape[0]", use.rows, _after("rows", layer)]
    steps += [logits, use.logits, _after("logits", layer)]
    steps += [ROUTERS[layer.router], use.choice, _after("choice", layer)]
    if layer.limit:
        steps += [LIMITS[layer.limit], ORDERS[layer.order], DROPS[layer.drop]]
    steps += ["weights = weights.to(flat.dtype)", dispatched, added, use.out]
    steps += [_after("out", layer), OUTPUTS[layer.outputs].replace("{Y}", back)]

    def lines(parts: Sequence[str]) -> str:
        return indent("\n".join(filter(None, parts)), " " * 8).format(**named)

    return (
        _HEAD
        + (_CONFIG.format(**numbers) if layer.numbers == "config" else "")
        + (_globals(numbers) if layer.numbers == "globals" else "")
        + (_OUTPUT if layer.outputs == "dataclass" else "")
        + (f"\n{expert.classes}\n" if expert.classes else "")
        + "\nclass Layer(nn.Module):\n    def __init__(self):\n"
        + lines(begin)
        + "\n\n"
        + indent(expert.methods, "    ").format(**named)
        + f"\n    def forward({', '.join(_parameters(layer))}):\n"
        + lines(steps)
        + "\n"
    )


def _after(name: str, layer: Layer) -> str:
    part = branches.PARTS.get(layer.part)
    if part is None or part.after != name:
        return ""
    return branches.branch(layer.condition, part.lines, part.others)


def _parameters(layer: Layer) -> list[str]:
    second = [SECOND_INPUTS[layer.second].parameter] if layer.second else []
    return ["self", "x", *second]


_ATTRIBUTES = {"E": "num_experts", "K": "top_k", "D": "width", "H": "hidden"}


def _spelled(style: str, key: str, number: int) -> str:
    if style == "literals":
        return str(number)
    if style == "globals":
        return key
    owner = "self" if style == "attributes" else "self.config"
    return f"{owner}.{_ATTRIBUTES[key]}"


def _numbers(style: str, numbers: dict[str, int]) -> list[str]:
    if style == "attributes":
        return [f"self.{_ATTRIBUTES[key]} = {number}" for key, number in numbers.items()]
    return ["self.config = Config()"] if style == "config" else []


def _globals(numbers: dict[str, int]) -> str:
    return "".join(f"{key} = {number}\n" for key, number in numbers.items()) + "\n"
