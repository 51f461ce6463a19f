"""Shared experts, which add to `out` [T, D], and what a layer returns beside it."""

from __future__ import annotations

SHARED = {
    "none": ("", ""),
    "plus": ("self.shared = nn.Linear({D}, {D})", "out = out + self.shared(flat)"),
    "gated": (
        "self.shared = nn.Sequential(nn.Linear({D}, {H}), nn.SiLU(), nn.Linear({H}, {D}))\n"
        "self.shared_gate = nn.Linear({D}, 1, bias=False)",
        "out = out + torch.sigmoid(self.shared_gate(flat)) * self.shared(flat)",
    ),
    "residual": ("", "out = flat + out"),
    "scaled": ("self.shared = nn.Linear({D}, {D})", "out = 1.5 * out + self.shared(flat)"),
    "list": (
        "self.shared = nn.ModuleList(nn.Linear({D}, {D}) for _ in range(2))",
        "for shared in self.shared:\n    out = out + shared(flat)",
    ),
    "mixed": (
        "self.shared = nn.Linear({D}, {D})\nself.mix = nn.Linear({D}, 2)",
        "mix = self.mix(flat).softmax(-1)\n"
        "out = out * mix[..., 0:1] + self.shared(flat) * mix[..., 1:]",
    ),
    "dropped pass": (
        "",
        "out = torch.where(weights.sum(-1, keepdim=True) == 0, flat, out)",
    ),
    "of the mean": (
        "self.shared = nn.Linear({D}, {D})",
        "out = out + self.shared(flat.mean(0, keepdim=True))",
    ),
    "like an expert": ("", "out = out + self.run(0, flat)"),
    "norm after": ("self.after = nn.LayerNorm({D})", "out = self.after(out + flat)"),
    "weighted by the rest": (
        "self.shared = nn.Linear({D}, {D})",
        "out = out + (1 - weights.sum(-1, keepdim=True)) * self.shared(flat)",
    ),
    "head": ("self.head = nn.Linear({D}, {D}, bias=False)", "out = self.head(out.relu())"),
}

_LOSS = (
    "load = F.one_hot(ids, {E}).float().sum(1).mean(0)\n"
    "loss = {E} * (load * probs.float().mean(0)).sum()\n"
)
OUTPUTS = {
    "tensor": "return {Y}",
    "logits": "return {Y}, logits",
    "loss": _LOSS + "return {Y}, loss",
    "dict": _LOSS + 'return {{"hidden": {Y}, "loss": loss, "ids": ids}}',
    "dataclass": _LOSS + "return Output({Y}, loss, 0, None)",
    "none": "return {Y}, None",
    "counts": "return {Y}, F.one_hot(ids.reshape(-1), {E}).sum(0)",
    "weights": "return {Y}, (weights, ids)",
    "entropy": "return {Y}, -(probs * (probs + 1e-9).log()).sum(-1).mean()",
    "z loss": "return {Y}, torch.logsumexp(logits.float(), dim=-1).square().mean()",
    "nested": (
        "parts = [(ids == e).sum() for e in range({E})]\n"
        'return {{"y": [{Y}, (probs, None)], "parts": parts, "number": 3}}'
    ),
    "drops": "return {Y}, (weights == 0).sum(), [None]",
    "busiest": (
        "counts = F.one_hot(ids, {E}).sum((0, 1))\n"
        "return {Y}, counts.argmax(), counts.float() / counts.sum()"
    ),
    "variation": (
        "load = torch.zeros_like(probs).scatter(1, ids, weights.to(probs.dtype)).float().sum(0)\n"
        "loss = load.var() / (load.mean().square() + 1e-10)\nreturn {Y}, loss"
    ),
    "logits of texts": "return {Y}, logits.view(x.shape[0], x.shape[1], -1)",
    "masked loss": (
        "used = torch.zeros_like(probs).scatter(1, ids, 1.0)\n"
        "return {Y}, (used.mean(0) * probs.mean(0)).sum() * {E}, used.sum(0).std()"
    ),
}
