"""Experts in common forms: rows [R, D] -> rows [R, D]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.forms.sizes import D, H


class SwiGLU(nn.Module):
    act = staticmethod(F.silu)

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.down = nn.Linear(H, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class GeGLU(SwiGLU):
    act = staticmethod(F.gelu)


class Mlp(nn.Module):
    """Two layers with biases."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.act = act
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Packed(nn.Module):
    """Gate and up in one matrix, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(D, 2 * H, bias=False), nn.Linear(H, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Interleaved(nn.Module):
    """GPT-OSS: gate and up alternate, clamped, with its alpha."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(D, 2 * H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
        return self.down((up + 1) * (gate * torch.sigmoid(gate * 1.702)))


class Transposed(nn.Module):
    """Weights as [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(D, H) / 3)
        self.down = nn.Parameter(torch.randn(H, D) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up) @ self.down


class Single(nn.Linear):
    def __init__(self) -> None:
        super().__init__(D, D)


class Normed(nn.Module):
    """An own norm before the layers, with its own gain."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(D) + 0.5)
        self.mlp = Mlp(F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.mlp(x * scale * self.gain)


EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "relu": Mlp,
    "gelu": lambda: Mlp(F.gelu),
    "packed": Packed,
    "interleaved": Interleaved,
    "transposed": Transposed,
    "single": Single,
    "normed": Normed,
}
