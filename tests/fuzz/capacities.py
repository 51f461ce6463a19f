"""Capacities in common styles: `weights` and `ids` [T, K] become `capacity`, `place`, `kept` and
other `weights`."""

from __future__ import annotations

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
    "floor of a float": "capacity = max(1, math.floor(tokens * 1.3 * {K} / {E}))",
    "of a text": "capacity = max(2, math.ceil(x.shape[1] * {K} * 1.2 / {E}))",
    "clamped": "capacity = min(max(tokens * {K} // {E}, 2), 9)",
    "tenths": "capacity = int(tokens * 0.1) + 3",
    "square root": "capacity = max(2, int(tokens**0.5))",
    "whole root": "capacity = max(1, math.isqrt(tokens) * {K} // 2)",
    "root upwards": "capacity = math.ceil(math.sqrt(tokens) * 1.5)",
    "root rounded down": "capacity = int(tokens**0.5 // 1) + 1",
    "greater root": "capacity = max(2, int((tokens * {K} / {E}) ** 0.75))",
    "rounded float": "capacity = round(tokens * 0.3) + 1",
    "factor divided": "capacity = max(1, int(tokens * 1.25 * {K} // {E}))",
    "texts and lengths": "capacity = x.shape[0] + x.shape[1] // 2",
    "divided first": "capacity = max(int((tokens // {E}) * 1.5), {K})",
    "branches": (
        "capacity = tokens * {K} // {E}\nif tokens < 20:\n    capacity = tokens\n"
        "elif tokens > 90:\n    capacity = capacity // 2"
    ),
    "longest": "capacity = 4 if x.shape[1] <= 8 else max(4, x.shape[1] // 2)",
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
    "score": (
        "held = torch.zeros_like(probs).scatter(1, ids, weights.to(probs.dtype))\n"
        "place = held.argsort(dim=0, descending=True, stable=True).argsort(dim=0).gather(1, ids)"
    ),
    "last": (
        "hot = F.one_hot(ids, {E})\n"
        "place = (hot.flip(0).view(-1, {E}).cumsum(0) - 1).view(tokens, -1, {E}).flip(0)\n"
        "place = place.gather(-1, ids[..., None])[..., 0]"
    ),
    "slots in turn": (
        "filled, parts = torch.zeros({E}, dtype=torch.long), []\n"
        "for slot in range(ids.shape[1]):\n"
        "    hot = F.one_hot(ids[:, slot], {E})\n"
        "    parts.append(((hot.cumsum(0) - 1 + filled) * hot).sum(-1))\n"
        "    filled = filled + hot.sum(0)\n"
        "place = torch.stack(parts, 1)"
    ),
    "argsort": (
        "order = ids.reshape(-1).argsort(stable=True)\n"
        "counts = F.one_hot(ids.reshape(-1), {E}).sum(0)\n"
        "begins = counts.cumsum(0) - counts\n"
        "place = torch.empty_like(order)\n"
        "place[order] = torch.arange(order.shape[0]) - begins[ids.reshape(-1)[order]]\n"
        "place = place.view(tokens, -1)"
    ),
    "slots of their own": (
        "hot = F.one_hot(ids, {E})\nplace = ((hot.cumsum(0) - 1) * hot).sum(-1)"
    ),
}
"""Whose rows come first: those of earlier or later tokens, of larger weights, or all first choices
before all second ones; or every choice has places of its own."""

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
    "with the first": (
        "kept = place < capacity\nkept[:, -1] = kept[:, -1] & kept[:, 0]\nweights = weights * kept"
    ),
    "greatest": ("kept = (place < capacity) & (weights > 0)\nweights = weights * kept.float()"),
}
