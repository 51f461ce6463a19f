"""Second inputs of layers: how each kind is drawn, and the lines by which a layer uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch

from tests.fuzz.branches import branch


@dataclass(frozen=True)
class Draw:
    """What the tensors of a call depend on: B `texts` of S = `length` tokens, E `experts`."""

    texts: int
    length: int
    experts: int
    dtype: torch.dtype
    generator: torch.Generator

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """i64[*shape], from `low` to `high` - 1."""
        return torch.randint(low, high, shape, generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)


@dataclass(frozen=True)
class Use:
    """Lines of a layer: of its __init__, before `x` [B, S, D] becomes `flat` [T, D], after that,
    after the `logits` [T, E], after `weights` and `ids` [T, K], and after `out` [T, D]. `result` is
    what it returns in terms of {Y} [B, S, D]; `pools` says that this is [B, D]."""

    init: str = ""
    texts: str = ""
    rows: str = ""
    logits: str = ""
    choice: str = ""
    out: str = ""
    result: str = "{Y}"
    pools: bool = False

    def on(self, condition: str) -> Use:
        """These lines where a condition on sizes holds; `init` always."""
        steps = {
            field.name: branch(condition, getattr(self, field.name))
            for field in fields(self)
            if field.name not in ("init", "result", "pools")
        }
        result = f"({self.result} if {condition} else {{Y}})" if self.result != "{Y}" else "{Y}"
        return replace(self, **steps, result=result)

    def of(self, names: Mapping[str, str]) -> Use:
        """These lines with each {NAME} replaced by an expression."""
        lines = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, expression in names.items():
            lines |= {k: v.replace(name, expression) for k, v in lines.items() if k != "pools"}
        return Use(**lines)


@dataclass(frozen=True)
class SecondInput:
    """A parameter of forward. `values` draw it, and the first is what users compile with. `uses`
    contain the `names`, which are expressions of the parameter."""

    parameter: str
    values: Mapping[str, Callable[[Draw], torch.Tensor]]
    uses: Mapping[str, Use]
    names: Mapping[str, str]

    def use(self, name: str) -> Use:
        return self.uses[name].of(self.names)


def _index(draw: Draw) -> torch.Tensor:
    return torch.arange(draw.length).expand(draw.texts, -1)


def _one(draw: Draw) -> torch.Tensor:
    mask = torch.zeros(draw.texts * draw.length, dtype=torch.bool)
    mask[draw.integers(0, len(mask), 1)] = True
    return mask.view(draw.texts, draw.length)


_MASKS: dict[str, Callable[[Draw], torch.Tensor]] = {
    "all": lambda d: torch.ones(d.texts, d.length, dtype=torch.bool),
    "none": lambda d: torch.zeros(d.texts, d.length, dtype=torch.bool),
    "random": lambda d: d.normal(d.texts, d.length) > 0,
    "prefixes": lambda d: _index(d) < d.integers(0, d.length + 1, d.texts, 1),
    "suffixes": lambda d: _index(d) >= d.integers(0, d.length + 1, d.texts, 1),
    "one": _one,
}
"""bool[B, S]: which tokens are text."""

_MASK_USES = {
    "unused": Use(),
    "weights": Use(choice="weights = weights * {FACTOR}.reshape(-1, 1)"),
    "weights filled": Use(choice="weights = weights.masked_fill(~{REAL}.reshape(-1, 1), 0)"),
    "rows": Use(rows="flat = flat * {FACTOR}.reshape(-1, 1).to(flat.dtype)"),
    "texts": Use(texts="x = torch.where({REAL}[..., None], x, torch.zeros_like(x))"),
    "logits": Use(logits="logits = logits.masked_fill(~{REAL}.reshape(-1, 1), -1e4)"),
    "choice": Use(choice="ids = torch.where({REAL}.reshape(-1, 1), ids, torch.zeros_like(ids))"),
    "rows of text": Use(out="out = torch.where({REAL}.reshape(-1, 1), out, flat)"),
    "rows in place": Use(out="out[~{REAL}.reshape(-1)] = 0"),
    "output": Use(result="({Y} * {FACTOR}[..., None])"),
    "output filled": Use(result="{Y}.masked_fill(~{REAL}[..., None], 0)"),
    "centred": Use(
        rows="share = {FACTOR}.reshape(-1, 1).to(flat.dtype)\n"
        "flat = flat - (flat * share).sum(0) / share.sum().clamp(min=1)"
    ),
    "by the number": Use(out="out = out / {FACTOR}.sum().clamp(min=1)"),
    "gate of the mean": Use(
        init="self.pool = nn.Linear({D}, {E})",
        logits="mean = (x * {FACTOR}[..., None]).sum(1)\n"
        "mean = mean / {FACTOR}.sum(1, keepdim=True).clamp(min=1)\n"
        "logits = logits + self.pool(mean).repeat_interleave(x.shape[1], 0)",
    ),
    "gate of the last": Use(
        init="self.pool = nn.Linear({D}, {E})",
        logits="last = x[torch.arange(x.shape[0]), {LENGTHS} - 1]\n"
        "logits = logits + self.pool(last).repeat_interleave(x.shape[1], 0)",
    ),
    "last": Use(result="{Y}[torch.arange(x.shape[0]), {LENGTHS} - 1]", pools=True),
    "last, clamped": Use(
        result="{Y}[torch.arange(x.shape[0]), ({LENGTHS} - 1).clamp(min=0)]", pools=True
    ),
    "last, gathered": Use(
        result="{Y}.gather(\n    1, ({LENGTHS} - 1).clamp(min=0).view(-1, 1, 1)"
        ".expand(-1, 1, {D})\n)[:, 0]",
        pools=True,
    ),
    "mean": Use(
        result="(({Y} * {FACTOR}[..., None]).sum(1) / {FACTOR}.sum(1, keepdim=True).clamp(min=1))",
        pools=True,
    ),
}


def _mask(
    parameter: str, convert: Callable[[torch.Tensor, Draw], torch.Tensor], real: str, factor: str
) -> SecondInput:
    def value(of: Callable[[Draw], torch.Tensor]) -> Callable[[Draw], torch.Tensor]:
        return lambda draw: convert(of(draw), draw)

    names = {"{REAL}": real, "{FACTOR}": factor, "{LENGTHS}": f"{real}.sum(1)"}
    values = {name: value(of) for name, of in _MASKS.items()}
    return SecondInput(parameter, values, _MASK_USES, names)


_LENGTHS: dict[str, Callable[[Draw], torch.Tensor]] = {
    "full": lambda d: torch.full((d.texts,), d.length),
    "zero": lambda d: torch.zeros(d.texts, dtype=torch.long),
    "one token": lambda d: torch.ones(d.texts, dtype=torch.long),
    "random": lambda d: d.integers(0, d.length + 1, d.texts),
    "one text": lambda d: (torch.arange(d.texts) == d.texts - 1) * d.length,
}

_POSITIONS: dict[str, Callable[[Draw], torch.Tensor]] = {
    "from zero": lambda d: _index(d).contiguous(),
    "shifted": lambda d: _index(d) + 5,
    "shifted by text": lambda d: _index(d) + d.integers(0, 20, d.texts, 1),
    "restarted": lambda d: _index(d) % 3,
    "left-padded": lambda d: (_index(d) - d.integers(0, d.length, d.texts, 1)).clamp(min=0),
    "random": lambda d: d.integers(0, 128, d.texts, d.length),
    "far": lambda d: _index(d) + 100,
}
"""A table has 128: long texts at far positions raise IndexError."""

_POSITION_USES = {
    "table": Use(
        init="self.table = nn.Embedding(128, {D})",
        rows="flat = flat + self.table(positions).reshape(-1, {D})",
    ),
    "table of texts": Use(
        init="self.table = nn.Embedding(128, {D})", texts="x = x + self.table(positions)"
    ),
    "rotary": Use(
        init='self.register_buffer("frequency", 10.0 ** (-torch.arange({D} // 2) / 4))',
        texts="angle = positions[..., None].float() * self.frequency.float()\n"
        "cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)\n"
        "left, right = x.chunk(2, dim=-1)\n"
        "x = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)",
    ),
    "bias": Use(
        init="self.bias = nn.Embedding(128, {E})",
        logits="logits = logits + self.bias(positions).reshape(-1, {E})",
    ),
    "later weights": Use(choice="weights = weights * (positions > 3).reshape(-1, 1)"),
    "not the first": Use(result="{Y}.masked_fill((positions == 0)[..., None], 0)"),
    "scale": Use(out="out = out * (1 + positions.reshape(-1, 1).to(out.dtype) / 64)"),
    "hashed": Use(choice="ids = (ids + positions.reshape(-1, 1)) % {E}"),
}

_TASK_USES = {
    "bias": Use(
        init="self.bias = nn.Parameter(torch.randn(4, {E}))",
        logits="logits = logits + self.bias[{TASKS}]",
    ),
    "bias of texts": Use(
        init="self.bias = nn.Embedding(4, {E})",
        logits="logits = logits.reshape(x.shape[0], x.shape[1], -1) + self.bias({OF_TEXTS})\n"
        "logits = logits.reshape(-1, {E})",
    ),
    "embedding": Use(
        init="self.tasks = nn.Embedding(4, {D})", texts="x = x + self.tasks({OF_TEXTS})"
    ),
    "scale": Use(
        init="self.scale = nn.Parameter(torch.rand(4) + 0.5)",
        out="out = out * self.scale[{TASKS}][:, None]",
    ),
    "gates": Use(
        init="self.gates = nn.Parameter(torch.randn(4, {D}, {E}) * 0.3)",
        logits='logits = torch.einsum("td,tde->te", flat, self.gates[{TASKS}])',
    ),
    "experts": Use(
        init='self.register_buffer("open", torch.rand(4, {E}) < 0.7)\nself.open[:, 0] = True',
        logits="logits = logits.masked_fill(~self.open[{TASKS}], -1e4)",
    ),
    "first": Use(out="out = torch.where(({TASKS} == 0)[:, None], out, flat)"),
    "hashed": Use(choice="ids = (ids + {TASKS}[:, None]) % {E}"),
}


def _tasks(parameter: str, of_tokens: bool, rows: str, texts: str) -> SecondInput:
    def shape(draw: Draw) -> tuple[int, ...]:
        return (draw.texts, draw.length) if of_tokens else (draw.texts,)

    values: dict[str, Callable[[Draw], torch.Tensor]] = {
        "zero": lambda d: torch.zeros(shape(d), dtype=torch.long),
        "three": lambda d: torch.full(shape(d), 3),
        "random": lambda d: d.integers(0, 4, *shape(d)),
        "in turn": lambda d: (torch.arange(shape(d)[-1]) % 4).expand(shape(d)).contiguous(),
        "last": lambda d: (torch.arange(shape(d)[-1]) == shape(d)[-1] - 1).long().expand(shape(d)),
    }
    return SecondInput(parameter, values, _TASK_USES, {"{TASKS}": rows, "{OF_TEXTS}": texts})


_PRIOR_USES = {
    "logits": Use(logits="logits = logits + {PRIOR}"),
    "half": Use(logits="logits = logits + 0.5 * {PRIOR}"),
    "gate": Use(logits="logits = logits * torch.sigmoid({PRIOR})"),
    "closed": Use(logits="logits = logits.masked_fill({PRIOR} < 0, -1e4)"),
    "weights": Use(
        choice="weights = weights * {PRIOR}.sigmoid().expand(tokens, -1).gather(1, ids)"
    ),
}


def _prior(of_texts: bool, rows: str) -> SecondInput:
    def shape(draw: Draw) -> tuple[int, ...]:
        return (draw.texts, draw.experts) if of_texts else (draw.experts,)

    def one(draw: Draw) -> torch.Tensor:
        return (10.0 * (torch.arange(draw.experts) == draw.experts - 1)).expand(shape(draw))

    values: dict[str, Callable[[Draw], torch.Tensor]] = {
        "zero": lambda d: torch.zeros(shape(d)),
        "random": lambda d: d.normal(*shape(d)),
        "large": lambda d: 5 * d.normal(*shape(d)),
        "one expert": one,
        "negative": lambda d: -d.normal(*shape(d)).abs(),
    }
    typed = {
        name: lambda d, value=value: value(d).to(d.dtype).contiguous()
        for name, value in values.items()
    }
    return SecondInput("prior", typed, _PRIOR_USES, {"{PRIOR}": rows})


_TEMPERATURE_USES = {
    "divides": Use(logits="logits = logits / temperature"),
    "clamped": Use(logits="logits = logits / temperature.clamp(min=0.5)"),
    "times": Use(logits="logits = logits * temperature"),
    "weights": Use(choice="weights = weights * temperature"),
    "output": Use(result="({Y} * temperature)"),
    "compared": Use(
        logits="logits = torch.where(temperature > 1, logits / temperature, logits)",
    ),
}


def _temperature(shape: tuple[int, ...]) -> SecondInput:
    numbers = {"one": 1.0, "half": 0.5, "two": 2.0, "tenth": 0.1, "ten": 10.0}
    values = {
        name: lambda d, number=number: torch.full(shape, number, dtype=d.dtype)
        for name, number in numbers.items()
    }
    return SecondInput("temperature", values, _TEMPERATURE_USES, {})


SECOND_INPUTS = {
    "keep": _mask("keep", lambda mask, d: mask, "keep", "keep"),
    "padding": _mask("padding", lambda mask, d: ~mask, "(~padding)", "(~padding)"),
    "attention mask": _mask(
        "attention_mask", lambda mask, d: mask.long(), "(attention_mask > 0)", "attention_mask"
    ),
    "float mask": _mask(
        "token_mask", lambda mask, d: mask.to(d.dtype), "(token_mask > 0.5)", "token_mask"
    ),
    "additive mask": _mask(
        "bias",
        lambda mask, d: torch.where(mask, 0.0, -1e4).to(d.dtype),
        "(bias >= 0)",
        "bias.exp()",
    ),
    "-inf mask": _mask(
        "bias",
        lambda mask, d: torch.where(mask, 0.0, float("-inf")).to(d.dtype),
        "(bias == 0)",
        "bias.exp()",
    ),
    "lengths": SecondInput(
        "lengths",
        _LENGTHS,
        _MASK_USES,
        {
            "{REAL}": "(torch.arange(x.shape[1]) < lengths[:, None])",
            "{FACTOR}": "(torch.arange(x.shape[1]) < lengths[:, None])",
            "{LENGTHS}": "lengths",
        },
    ),
    "positions": SecondInput("positions", _POSITIONS, _POSITION_USES, {}),
    "task": _tasks("task", False, "task.repeat_interleave(x.shape[1])", "task[:, None]"),
    "segments": _tasks("segments", True, "segments.reshape(-1)", "segments"),
    "prior": _prior(False, "prior"),
    "prior of texts": _prior(True, "prior.repeat_interleave(x.shape[1], 0)"),
    "temperature": _temperature(()),
    "temperature of one": _temperature((1,)),
}
"""By kind."""
