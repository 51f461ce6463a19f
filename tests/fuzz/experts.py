"""Experts in common styles: `self.run(e, rows)`; for stacks also `self.batched(rows)`
[E, C, D] and `self.chosen(rows, ids)` [T, K, D]."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertForm:
    """`classes` go before the layer, `init` into its __init__, `methods` into its body."""

    init: str
    methods: str
    classes: str = ""
    stacked: bool = False


_MODULES = "def run(self, e, rows):\n    return self.experts[e](rows)"


def _sequential(*layers: str) -> ExpertForm:
    inside = ", ".join(layers)
    return ExpertForm(
        f"self.experts = nn.ModuleList(nn.Sequential({inside}) for _ in range({{E}}))", _MODULES
    )


def _class(init: str, forward: str) -> ExpertForm:
    body = "".join(f"        {line}\n" for line in init.splitlines())
    steps = "".join(f"        {line}\n" for line in forward.splitlines())
    text = (
        "class Expert(nn.Module):\n    def __init__(self, d, h):\n        super().__init__()\n"
        f"{body}\n    def forward(self, x):\n{steps}"
    )
    return ExpertForm(
        "self.experts = nn.ModuleList([Expert({D}, {H}) for _ in range({E})])", _MODULES, text
    )


def _stack(init: str, run: str, batched: str, chosen: str) -> ExpertForm:
    def method(name: str, arguments: str, body: str) -> str:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        return f"def {name}(self, {arguments}):\n{lines}"

    return ExpertForm(
        init,
        method("run", "e, rows", run)
        + "\n"
        + method("batched", "rows", batched)
        + "\n"
        + method("chosen", "rows, ids", chosen),
        stacked=True,
    )


EXPERTS = {
    "relu": _sequential("nn.Linear({D}, {H})", "nn.ReLU()", "nn.Linear({H}, {D})"),
    "gelu": _sequential("nn.Linear({D}, {H}, bias=False)", "nn.GELU()", "nn.Linear({H}, {D})"),
    "tanh gelu": _sequential(
        "nn.Linear({D}, {H})", 'nn.GELU(approximate="tanh")', "nn.Linear({H}, {D}, bias=False)"
    ),
    "dropout": _sequential(
        "nn.Linear({D}, {H})",
        "nn.SiLU()",
        "nn.Dropout(0.1)",
        "nn.Linear({H}, {D})",
        "nn.Dropout(0.1)",
    ),
    "norm": _sequential(
        "nn.LayerNorm({D})", "nn.Linear({D}, {H})", "nn.SiLU()", "nn.Linear({H}, {D})"
    ),
    "one linear": ExpertForm(
        "self.experts = nn.ModuleList(nn.Linear({D}, {D}) for _ in range({E}))", _MODULES
    ),
    "swiglu": _class(
        "self.w1 = nn.Linear(d, h, bias=False)\nself.w2 = nn.Linear(h, d, bias=False)\n"
        "self.w3 = nn.Linear(d, h, bias=False)",
        "return self.w2(F.silu(self.w1(x)) * self.w3(x))",
    ),
    "packed": _class(
        "self.up = nn.Linear(d, 2 * h)\nself.down = nn.Linear(h, d)",
        "gate, up = self.up(x).chunk(2, dim=-1)\nreturn self.down(F.gelu(gate) * up)",
    ),
    "clamped": _class(
        "self.w1 = nn.Linear(d, h)\nself.w2 = nn.Linear(h, d)\nself.w3 = nn.Linear(d, h)",
        "gate = self.w1(x).clamp(max=1.0)\nup = self.w3(x).clamp(min=-1.0, max=1.0)\n"
        "return self.w2((up + 1) * gate * torch.sigmoid(gate * 1.702))",
    ),
    "squared relu": _class(
        "self.w1 = nn.Linear(d, h)\nself.w2 = nn.Linear(h, d)",
        "return self.w2(torch.square(F.relu(self.w1(x))))",
    ),
    "residual": _class(
        "self.w1 = nn.Linear(d, h)\nself.w2 = nn.Linear(h, d)",
        "return x + self.w2(torch.tanh(self.w1(x)))",
    ),
    "stack": _stack(
        "self.w1 = nn.Parameter(torch.randn({E}, {D}, {H}) * 0.2)\n"
        "self.w2 = nn.Parameter(torch.randn({E}, {H}, {D}) * 0.2)",
        "return F.relu(rows @ self.w1[e]) @ self.w2[e]",
        "return torch.bmm(F.relu(torch.bmm(rows, self.w1)), self.w2)",
        'h = F.relu(torch.einsum("tkd,tkdh->tkh", rows, self.w1[ids]))\n'
        'return torch.einsum("tkh,tkhd->tkd", h, self.w2[ids])',
    ),
    "stack of linears": _stack(
        "self.w1 = nn.Parameter(torch.randn({E}, {H}, {D}) * 0.2)\n"
        "self.b1 = nn.Parameter(torch.randn({E}, {H}) * 0.1)\n"
        "self.w2 = nn.Parameter(torch.randn({E}, {D}, {H}) * 0.2)\n"
        "self.b2 = nn.Parameter(torch.randn({E}, {D}) * 0.1)",
        "h = F.gelu(F.linear(rows, self.w1[e], self.b1[e]))\n"
        "return F.linear(h, self.w2[e], self.b2[e])",
        'h = F.gelu(torch.einsum("ecd,ehd->ech", rows, self.w1) + self.b1[:, None])\n'
        'return torch.einsum("ech,edh->ecd", h, self.w2) + self.b2[:, None]',
        "h = (self.w1[ids] @ rows[..., None]).squeeze(-1) + self.b1[ids]\n"
        "return (self.w2[ids] @ F.gelu(h)[..., None]).squeeze(-1) + self.b2[ids]",
    ),
    "stack packed": _stack(
        "self.up = nn.Parameter(torch.randn({E}, {D}, 2 * {H}) * 0.2)\n"
        "self.down = nn.Parameter(torch.randn({E}, {H}, {D}) * 0.2)",
        "gate, up = (rows @ self.up[e]).chunk(2, -1)\nreturn (F.silu(gate) * up) @ self.down[e]",
        "gate, up = torch.bmm(rows, self.up).chunk(2, -1)\n"
        "return torch.bmm(F.silu(gate) * up, self.down)",
        "gate, up = (rows.unsqueeze(-2) @ self.up[ids]).squeeze(-2).chunk(2, -1)\n"
        "return ((F.silu(gate) * up).unsqueeze(-2) @ self.down[ids]).squeeze(-2)",
    ),
    "stack interleaved": _stack(
        "self.up = nn.Parameter(torch.randn({E}, {D}, 2 * {H}) * 0.2)\n"
        "self.down = nn.Parameter(torch.randn({E}, {H}, {D}) * 0.2)",
        "both = rows @ self.up[e]\n"
        "return (F.silu(both[..., ::2]) * both[..., 1::2]) @ self.down[e]",
        "both = torch.bmm(rows, self.up)\n"
        "return torch.bmm(F.silu(both[..., ::2]) * both[..., 1::2], self.down)",
        "both = (rows.unsqueeze(-2) @ self.up[ids]).squeeze(-2)\n"
        "y = F.silu(both[..., ::2]) * both[..., 1::2]\n"
        "return (y.unsqueeze(-2) @ self.down[ids]).squeeze(-2)",
    ),
    "three layers": _sequential(
        "nn.Linear({D}, {H})",
        "nn.ReLU()",
        "nn.Linear({H}, {H})",
        "nn.Tanh()",
        "nn.Linear({H}, {D})",
    ),
    "centred": _class(
        "self.w1 = nn.Linear(d, h)\nself.w2 = nn.Linear(h, d)",
        "return self.w2(torch.relu(self.w1(x - x.mean(0, keepdim=True))))",
    ),
    "counted": _class(
        "self.w1 = nn.Linear(d, h)\nself.w2 = nn.Linear(h, d)",
        "return self.w2(F.silu(self.w1(x))) / max(1, x.shape[0])",
    ),
    "softmax": _class(
        "self.w1 = nn.Linear(d, h)\nself.w2 = nn.Linear(h, d)",
        "return self.w2(self.w1(x).softmax(-1))",
    ),
    "scaled": _class(
        "self.w1 = nn.Linear(d, h)\nself.w2 = nn.Linear(h, d)\n"
        "self.scale = nn.Parameter(torch.randn(d))",
        "return self.w2(F.gelu(self.w1(x))) * self.scale",
    ),
    "norm after": _class(
        "self.w1 = nn.Linear(d, h)\nself.w2 = nn.Linear(h, d)\nself.norm = nn.LayerNorm(d)",
        "return self.norm(self.w2(F.relu(self.w1(x))))",
    ),
    "divided": _class(
        "self.w1 = nn.Linear(d, h)\nself.w2 = nn.Linear(h, d)",
        "h = F.silu(self.w1(x))\nreturn self.w2(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True)))",
    ),
    "unlike": ExpertForm(
        "self.experts = nn.ModuleList(\n"
        "    nn.Sequential(nn.Linear({D}, {H} + 4 * e), nn.ReLU(), nn.Linear({H} + 4 * e, {D}))\n"
        "    for e in range({E})\n)",
        _MODULES,
    ),
    "zero and copy": ExpertForm(
        "self.experts = nn.ModuleList(nn.Linear({D}, {D}) for _ in range({E} - 2))",
        "def run(self, e, rows):\n    if e == {E} - 1:\n        return torch.zeros_like(rows)\n"
        "    return rows if e == {E} - 2 else self.experts[e](rows)\n",
    ),
    "constant": ExpertForm(
        "self.experts = nn.ModuleList(nn.Linear({D}, {D}) for _ in range({E} - 1))\n"
        "self.constant = nn.Parameter(torch.randn({D}))\nself.mix = nn.Linear({D}, 2)",
        "def run(self, e, rows):\n    if e < {E} - 1:\n        return self.experts[e](rows)\n"
        "    mix = self.mix(rows).softmax(-1)\n"
        "    return mix[..., :1] * rows + mix[..., 1:] * self.constant\n",
    ),
    "low rank beside a shared one": ExpertForm(
        "self.base = nn.Linear({D}, {D})\n"
        "self.a = nn.ModuleList(nn.Linear({D}, 4, bias=False) for _ in range({E}))\n"
        "self.b = nn.ModuleList(nn.Linear(4, {D}, bias=False) for _ in range({E}))",
        "def run(self, e, rows):\n    return self.base(rows) + self.b[e](self.a[e](rows)) * 2.0\n",
    ),
    "one shared weight": ExpertForm(
        "self.up = nn.Linear({D}, {H})\n"
        "self.experts = nn.ModuleList(nn.Linear({H}, {D}) for _ in range({E}))",
        "def run(self, e, rows):\n    return self.experts[e](F.relu(self.up(rows)))\n",
    ),
}
