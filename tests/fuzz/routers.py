"""Gates, routers and capacities in common styles, as lines of a forward.

`flat` [T, D] and `tokens` are defined before them. A gate defines `logits` [T, E], a router
`probs`, `weights` and `ids` [T, K], and a capacity changes `weights`. {E}, {K} and {D} are replaced
by numbers in the style of the layer.
"""

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
}
"""By name: lines of __init__, and of forward."""

_SOFTMAX = "probs = logits.softmax(-1)\n"
_TOP = _SOFTMAX + "weights, ids = probs.topk({K}, dim=-1)\n"

ROUTERS = {
    "softmax then top-k": _TOP,
    "renormalised": _TOP + "weights = weights / weights.sum(dim=-1, keepdim=True)",
    "renormalised in place": _TOP + "weights /= weights.sum(dim=-1, keepdim=True)",
    "renormalised, eps": _TOP + "weights = weights / (weights.sum(-1, keepdim=True) + 1e-9)",
    "renormalised, clamp": _TOP
    + "weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)",
    "by the norm": _TOP + "weights = weights / torch.norm(weights, p=2, dim=-1, keepdim=True)",
    "in float32": (
        "probs = F.softmax(logits, dim=1, dtype=torch.float32)\n"
        "weights, ids = torch.topk(probs, {K}, dim=-1)\n"
        "weights /= weights.sum(dim=-1, keepdim=True)"
    ),
    "top-k then softmax": (
        "top, ids = logits.topk({K}, dim=-1)\nweights = top.softmax(-1)\nprobs = logits.softmax(-1)"
    ),
    "filled with -inf": (
        "top, ids = logits.topk({K}, dim=-1)\n"
        'sparse = torch.full_like(logits, float("-inf")).scatter(-1, ids, top)\n'
        "probs = sparse.softmax(-1)\nweights = probs.gather(-1, ids)"
    ),
    "one more than used": (
        "top, more = logits.topk(min({K} + 1, {E}), dim=1)\n"
        "ids, weights = more[:, :{K}], top[:, :{K}].softmax(1)\nprobs = logits.softmax(-1)"
    ),
    "sigmoid": (
        "probs = logits.sigmoid()\n"
        "weights, ids = probs.topk({K}, dim=-1)\n"
        "weights = weights / weights.sum(-1, keepdim=True) * 2.5"
    ),
    "top-k then sigmoid": (
        "top, ids = logits.topk({K}, dim=-1)\nweights = torch.sigmoid(top)\n"
        "probs = logits.sigmoid()"
    ),
    "correction bias": (
        "probs = logits.sigmoid()\n"
        "ids = torch.topk(probs + self.correction, {K}, dim=-1, sorted=False)[1]\n"
        "weights = probs.gather(1, ids)\n"
        "weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 1.5"
    ),
    "groups": (
        "probs = logits.softmax(dim=-1)\n"
        "best = probs.view(tokens, 2, -1).max(dim=-1).values\n"
        "group = torch.topk(best, k=1, dim=-1, sorted=False)[1]\n"
        "mask = torch.zeros_like(best).scatter_(1, group, 1)\n"
        "mask = mask.unsqueeze(-1).expand(tokens, 2, {E} // 2).reshape(tokens, -1)\n"
        "masked = probs.masked_fill(~mask.bool(), 0.0)\n"
        "weights, ids = torch.topk(masked, k={K}, dim=-1, sorted=False)"
    ),
    "groups, corrected": (
        "probs = logits.sigmoid()\n"
        "choice = probs + self.correction\n"
        "best = choice.view(tokens, 2, {E} // 2).topk(2, dim=-1)[0].sum(dim=-1)\n"
        "group = torch.topk(best, k=1, dim=-1, sorted=False)[1]\n"
        "mask = torch.zeros_like(best).scatter_(1, group, 1)\n"
        "mask = mask.unsqueeze(-1).expand(-1, 2, {E} // 2).reshape(tokens, -1)\n"
        "choice = choice.masked_fill(~mask.bool(), 0.0)\n"
        "ids = torch.topk(choice, k={K}, dim=-1, sorted=False)[1]\n"
        "weights = probs.gather(1, ids)\n"
        "weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5"
    ),
    "expert choice": (
        _SOFTMAX + "share, rows = probs.t().topk(min(tokens, max(1, 2 * tokens // {E})), dim=-1)\n"
        "weights = torch.zeros_like(probs).scatter(0, rows.t(), share.t())\n"
        "ids = torch.arange({E}).expand(tokens, -1)"
    ),
    "argsort": (
        _SOFTMAX + "ids = probs.argsort(dim=-1, descending=True)[:, :{K}]\n"
        "weights = torch.gather(probs, 1, ids)"
    ),
    "sort": (
        _SOFTMAX + "ranked, order = torch.sort(probs, dim=-1, descending=True)\n"
        "weights, ids = ranked[:, :{K}], order[:, :{K}]"
    ),
    "softplus": (
        "probs = F.softplus(logits).sqrt()\n"
        "weights, ids = probs.topk({K}, dim=-1)\n"
        "weights = weights / weights.sum(-1, keepdim=True)"
    ),
    "temperature": (
        "probs = (logits / 0.7).softmax(-1)\nweights, ids = torch.topk(probs, k={K}, dim=-1)"
    ),
    "threshold": _TOP + "weights = torch.where(weights < 0.2, torch.zeros_like(weights), weights)",
    "threshold times": (
        _TOP + "weights = weights * (weights > 0.15)\n"
        "weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)"
    ),
    "top-p": (
        _SOFTMAX + "ranked, ids = probs.sort(-1, descending=True)\n"
        "weights = ranked * ((ranked.cumsum(-1) - ranked) < 0.6)\n"
        "weights = weights / weights.sum(-1, keepdim=True)"
    ),
    "maximum": _SOFTMAX + "weights, ids = probs.max(dim=-1, keepdim=True)",
    "argmax": (
        _SOFTMAX
        + "ids = torch.argmax(probs, dim=-1, keepdim=True)\nweights = probs.gather(-1, ids)"
    ),
    "argmax twice": (
        _SOFTMAX + "first = probs.argmax(dim=-1)\n"
        "others = probs.masked_fill(F.one_hot(first, {E}).bool(), 0.0)\n"
        "second = others.argmax(dim=-1)\n"
        "ids = torch.stack([first, second], dim=-1)\n"
        "weights = probs.gather(-1, ids)\n"
        "weights = weights / weights.sum(-1, keepdim=True)"
    ),
}

WIDTH = {"maximum": 1, "argmax": 1, "argmax twice": 2}
"""Choices a token of routers that set it."""

OF_ALL = frozenset({"top-p", "expert choice"})
"""Routers whose tokens have a weight for every expert: nothing else limits those."""

GROUPED = frozenset({"groups", "groups, corrected"})
"""Routers that choose at most two experts, of an even number."""

CORRECTED = frozenset({"correction bias", "groups, corrected"})

LIMITS = {
    "number": "capacity = 5",
    "self": "capacity = self.capacity",
    "int": "capacity = int(tokens * 1.25 * {K} / {E})",
    "int and least": "capacity = max(int(tokens * {K} * 1.1 / {E}), 4)",
    "factor": "capacity = max(int(self.factor * tokens * {K} / {E}), 1)",
    "round": "capacity = max(1, round(tokens * {K} / {E}))",
    "torch": "capacity = int(torch.ceil(torch.tensor(tokens / {E} * 1.25)).to(torch.int64))",
    "ceil": "capacity = math.ceil(tokens / {E} * 1.1)",
    "ceil and least": "capacity = max(math.ceil({K} * tokens / {E}), 3)",
    "floor": "capacity = max(1, tokens * {K} // {E})",
    "upwards": "capacity = -(-tokens * {K} // {E})",
    "min": "capacity = min(tokens, max(2, int(2.0 * tokens / {E})))",
    "even": "capacity = int(1.5 * tokens / {E})\ncapacity += capacity % 2",
    "multiple": "capacity = (int(tokens * {K} / {E}) + 3) // 4 * 4",
    "branch": "capacity = int(tokens * 1.5 / {E})\nif capacity < 4:\n    capacity = 4",
    "many": "capacity = 64 if tokens > 100 else tokens",
}

ORDERS = {
    "tokens": (
        "hot = F.one_hot(ids, {E})\n"
        "place = (hot.view(-1, {E}).cumsum(0) - 1).view(tokens, -1, {E})\n"
        "place = place.gather(-1, ids[..., None])[..., 0]"
    ),
    "choices": (
        "hot = F.one_hot(ids.t().reshape(-1), {E})\n"
        "place = ((hot.cumsum(0) - 1) * hot).sum(-1).view(-1, tokens).t()"
    ),
    "float": (
        "hot = F.one_hot(ids, {E}).float()\n"
        "hot = hot.flatten(0, 1)\n"
        "place = ((hot.cumsum(0) - 1.0) * hot).sum(-1).view(tokens, -1).long()"
    ),
    "weight": (
        "first = weights.max(dim=-1).values.argsort(descending=True, stable=True)\n"
        "hot = F.one_hot(ids[first], {E})\n"
        "place = (hot.view(-1, {E}).cumsum(0) - 1).view(tokens, -1, {E})[first.argsort()]\n"
        "place = place.gather(-1, ids[..., None])[..., 0]"
    ),
}
"""Whose rows come first: those of earlier tokens, of larger weights, or all first choices before
all second ones."""

DROPS = {
    "times": "kept = place < capacity\nweights = weights * kept",
    "where": (
        "kept = place < capacity\nweights = torch.where(kept, weights, torch.zeros_like(weights))"
    ),
    "fill": "kept = place < capacity\nweights = weights.masked_fill(place >= capacity, 0.0)",
    "renormalised": (
        "kept = place < capacity\nweights = weights * kept.to(weights.dtype)\n"
        "weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)"
    ),
}
