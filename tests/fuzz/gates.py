"""Gates in common styles, as lines of a forward: `flat` [T, D] becomes `logits` [T, E]. {E}, {K},
{D} and {H} are replaced by numbers in the style of the layer, in all files of this folder."""

from __future__ import annotations

GATES = {
    "linear": ("self.gate = nn.Linear({D}, {E}, bias=False)", "logits = self.gate(flat)"),
    "bias": ("self.gate = nn.Linear({D}, {E})", "logits = self.gate(flat)"),
    "matrix": (
        "self.router = nn.Parameter(torch.randn({D}, {E}) * 0.3)",
        "logits = flat @ self.router",
    ),
    "float32": (
        "self.gate = nn.Linear({D}, {E}, bias=False)",
        "logits = F.linear(flat.float(), self.gate.weight.float())",
    ),
    "norm": (
        "self.norm = nn.LayerNorm({D})\nself.gate = nn.Linear({D}, {E})",
        "logits = self.gate(self.norm(flat))",
    ),
    "cosine": (
        "self.centres = nn.Parameter(torch.randn({E}, {D}))\n"
        "self.heat = nn.Parameter(torch.tensor(4.0))",
        "logits = F.normalize(flat, dim=-1) @ F.normalize(self.centres, dim=-1).t() * self.heat",
    ),
    "mlp": (
        "self.gate = nn.Sequential(nn.Linear({D}, 12), nn.Tanh(), nn.Linear(12, {E}))",
        "logits = self.gate(flat)",
    ),
    "einsum": (
        "self.router = nn.Parameter(torch.randn({E}, {D}) * 0.3)",
        'logits = torch.einsum("td,ed->te", flat, self.router)',
    ),
    "soft cap": (
        "self.gate = nn.Linear({D}, {E})",
        "logits = 3.0 * torch.tanh(self.gate(flat) / 3.0)",
    ),
    "clamp": ("self.gate = nn.Linear({D}, {E})", "logits = self.gate(flat).clamp(-2.0, 2.0)"),
    "noise": (
        "self.gate = nn.Linear({D}, {E})",
        "logits = self.gate(flat)\n"
        "scale = 1.0 / {E} if self.training else 0.0\n"
        "logits = logits + torch.randn_like(logits) * scale",
    ),
    "jitter": (
        "self.gate = nn.Linear({D}, {E})",
        "logits = self.gate(flat)\n"
        "if self.training:\n    logits = logits + torch.rand_like(logits)",
    ),
    "rounded": (
        "self.gate = nn.Linear({D}, {E}, bias=False)",
        "logits = (self.gate(flat) * 2).round() / 2",
    ),
    "relu": (
        "self.gate = nn.Linear({D}, {E})",
        "logits = F.relu(self.gate(flat))",
    ),
    "float64": (
        "self.gate = nn.Linear({D}, {E}, bias=False)",
        "logits = flat.double() @ self.gate.weight.double().t()",
    ),
    "normed weight": (
        "self.gate = nn.Linear({D}, {E}, bias=False)",
        "logits = F.linear(flat, F.normalize(self.gate.weight, dim=-1)) * 3.0",
    ),
    "jittered input": (
        "self.gate = nn.Linear({D}, {E}, bias=False)\nself.jitter = 0.1",
        "seen = flat\n"
        "if self.training and self.jitter > 0:\n"
        "    seen = seen * torch.empty_like(seen).uniform_(1 - self.jitter, 1 + self.jitter)\n"
        "logits = self.gate(seen)",
    ),
    "batch norm": (
        "self.norm = nn.BatchNorm1d({D})\nself.gate = nn.Linear({D}, {E})",
        "logits = self.gate(self.norm(flat))",
    ),
    "some disabled": (
        "self.gate = nn.Linear({D}, {E})\n"
        'self.register_buffer("usable", torch.tensor([True] * ({E} - 1) + [False]))',
        'logits = self.gate(flat).masked_fill(~self.usable, float("-inf"))',
    ),
    "mean of text": (
        "self.gate = nn.Linear({D}, {E})",
        "logits = self.gate(flat + x.mean(1, keepdim=True).expand_as(x).reshape(-1, {D}))",
    ),
}
"""By name: lines of __init__, and of forward."""
