"""Routers in common styles: `flat`, `logits` [T, E] and `tokens` become `probs` [T, E], `weights`
and `ids` [T, K]."""

from __future__ import annotations

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
    "ranked by a bias": (
        _SOFTMAX + "ids = (probs + self.correction).topk({K}, dim=-1).indices\n"
        "weights = probs.gather(1, ids)"
    ),
    "scale of experts": _TOP + "weights = weights * (1 + self.correction)[ids]",
    "even": _TOP + "weights = torch.ones_like(weights) / {K}",
    "straight through": (
        _TOP + "weights = (1.0 - weights).detach() + weights\nweights = weights / {K}"
    ),
    "softmax twice": _TOP + "weights = weights.softmax(-1)",
    "of the rest": (
        _TOP + "rest = 1 - weights.sum(-1, keepdim=True)\n"
        "weights = weights + rest / weights.shape[-1]"
    ),
    "by the greatest": _TOP + "weights = weights / weights[:, :1]",
    "near the greatest": (
        _TOP + "near = weights >= 0.5 * weights.amax(-1, keepdim=True)\n"
        "weights = torch.where(near, weights, 0.0)\n"
        "weights = weights / weights.sum(-1, keepdim=True)"
    ),
    "sigmoid of a softmax choice": (
        _SOFTMAX + "ids = probs.topk({K}, dim=-1)[1]\nweights = logits.gather(-1, ids).sigmoid()"
    ),
    "unsorted": (
        _SOFTMAX + "ids = probs.topk({K}, dim=-1, sorted=False)[1].sort(dim=-1)[0]\n"
        "weights = probs.gather(-1, ids)"
    ),
    "least": (
        "probs = (-logits).softmax(-1)\n"
        "top, ids = logits.topk({K}, dim=-1, largest=False)\nweights = (-top).softmax(-1)"
    ),
    "magnitude": (
        _SOFTMAX + "ids = logits.abs().topk({K}, dim=-1)[1]\n"
        "weights = logits.gather(-1, ids).softmax(-1)"
    ),
    "by the threshold of the last": (
        _SOFTMAX + "least = probs.topk({K}, dim=-1)[0][:, -1:]\n"
        "sparse = torch.where(probs < least, 0.0, probs)\n"
        "ids = torch.arange({E}).expand(tokens, -1)\n"
        "weights = sparse / sparse.sum(-1, keepdim=True)"
    ),
    "relu": ("probs = F.relu(logits)\nids = torch.arange({E}).expand(tokens, -1)\nweights = probs"),
    "all": (_SOFTMAX + "ids = torch.arange({E}).expand(tokens, -1)\nweights = probs"),
    "of texts": (
        _SOFTMAX + "probs = probs.view(x.shape[0], x.shape[1], -1).mean(1)\n"
        "weights, ids = probs.topk({K}, dim=-1)\n"
        "weights = weights.repeat_interleave(x.shape[1], 0)\n"
        "ids = ids.repeat_interleave(x.shape[1], 0)\n"
        "probs = probs.repeat_interleave(x.shape[1], 0)"
    ),
    "second if large": (
        _SOFTMAX + "weights, ids = probs.topk(2, dim=-1)\n"
        "second = torch.where(weights[:, 1] > 0.3, weights[:, 1], 0.0)\n"
        "weights = torch.stack([weights[:, 0], second], dim=1)\n"
        "weights = weights / weights.sum(1, keepdim=True)"
    ),
    "squeezed": (
        _SOFTMAX + "share, index = probs.topk(1, dim=-1)\n"
        "share, index = share.squeeze(-1), index.squeeze(-1)\n"
        "weights, ids = share.unsqueeze(1), index.unsqueeze(1)"
    ),
    "Sinkhorn": (
        _SOFTMAX + "cost = (logits.float() - logits.float().max()).exp()\n"
        "for turn in range(3):\n"
        "    cost = cost / (cost.sum(0, keepdim=True) + 1e-8)\n"
        "    cost = cost / (cost.sum(1, keepdim=True) + 1e-8)\n"
        "ids = cost.topk({K}, dim=-1)[1]\nweights = probs.gather(1, ids)"
    ),
    "two levels": (
        "parts = logits.view(tokens, 2, {E} // 2)\n"
        "probs = parts.logsumexp(-1, keepdim=True).softmax(1) * parts.softmax(-1)\n"
        "probs = probs.flatten(1)\nweights, ids = probs.topk({K}, dim=-1)"
    ),
    "group, then one of it": (
        "parts = logits.view(tokens, 2, {E} // 2)\n"
        "outer, group = parts.mean(-1).softmax(-1).max(-1, keepdim=True)\n"
        "inner = parts[torch.arange(tokens), group[:, 0]].softmax(-1)\n"
        "weights, ids = inner.topk({K}, dim=-1)\n"
        "weights, ids = weights * outer, ids + group * ({E} // 2)\n"
        "probs = logits.softmax(-1)"
    ),
    "heat of experts": (
        "probs = (logits * (1 + self.correction)).softmax(-1)\n"
        "weights, ids = probs.topk({K}, dim=-1)"
    ),
    "sigmoid by the sum of all": (
        "probs = logits.sigmoid()\nprobs = probs / probs.sum(-1, keepdim=True)\n"
        "weights, ids = torch.topk(probs, k={K}, dim=-1)"
    ),
    "masked by the chosen": (
        _SOFTMAX + "ids = probs.topk({K}, dim=-1).indices\n"
        "used = F.one_hot(ids, {E}).sum(1).to(probs.dtype)\n"
        "sparse = probs * used\nsparse = sparse / (sparse.sum(-1, keepdim=True) + 1e-9)\n"
        "weights = sparse.gather(1, ids)"
    ),
    "share of the greatest": (
        _SOFTMAX + "ids = torch.arange({E}).expand(tokens, -1)\n"
        "weights = torch.where(probs >= 0.4 * probs.amax(-1, keepdim=True), probs, 0.0)\n"
        "weights = weights / weights.sum(-1, keepdim=True)"
    ),
    "hash": (
        _SOFTMAX + "first = (torch.arange(tokens) % {E})[:, None]\n"
        "ids = (first + torch.arange({K})) % {E}\n"
        "weights = probs.gather(1, ids)"
    ),
}

WIDTH = {"maximum": 1, "argmax": 1, "argmax twice": 2, "second if large": 2, "squeezed": 1}
"""Choices a token of routers that set it."""

OF_ALL = frozenset(
    {
        "top-p",
        "expert choice",
        "by the threshold of the last",
        "relu",
        "all",
        "share of the greatest",
    }
)
"""Routers whose tokens have a weight for every expert: nothing else limits those."""

GROUPED = frozenset({"groups", "groups, corrected", "two levels", "group, then one of it"})
"""Routers that choose at most two experts, of an even number."""

CORRECTED = frozenset(
    {
        "correction bias",
        "groups, corrected",
        "ranked by a bias",
        "scale of experts",
        "heat of experts",
    }
)
