"""One file for ONNX Runtime: a module of your own, exported whole, run at any number of tokens.

The file is run and compared with eager before it gets its name; the report says how far apart they
were, and what share of the tokens chose the same experts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec


class Expert(nn.Module):
    """silu(gate(x)) * up(x), as most models have it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Routed(nn.Module):
    """Each token goes to the two experts that its router likes best."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:  # [T, D] -> [T, D]
        h = self.norm(x)
        weights, chosen = F.softmax(self.router(h), dim=-1).topk(2, dim=-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            y = y.index_add(0, token, expert(h[token]) * weights[token, slot, None])
        return x + y


torch.manual_seed(0)
model = Routed(width=64, hidden=128, experts=8).eval()
compiled = moec.compile(model, (torch.randn(33, 64),), build=False)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "routed.onnx"
    for options in ({"ep": "portable"}, {"ep": "cpu", "moe": "op"}):
        made = compiled.export_onnx(path, **options)
        error, share = made.errors["output"], min(made.parity.values())
        form = "com.microsoft.MoE" if options.get("moe") == "op" else "standard operators"
        print(f"{form}: {made.nodes} nodes, error {error:.1e}, {share:.0%} of the tokens agree")

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            for tokens in (1, 33, 500):  # the number of tokens is free
                x = torch.randn(tokens, 64)
                (y,) = session.run(None, {"x": x.numpy()})
                torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)
print("equal to eager for 1, 33 and 500 tokens")
