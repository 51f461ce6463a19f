"""Dispatch and combine in common styles: `flat`, `weights` and `ids` become `out` [T, D]."""

from __future__ import annotations

_OUT = "out = torch.zeros_like(flat)\n"
_EACH = _OUT + "for e in range({E}):\n"
_PAIR = "self.run(e, flat[token]) * weights[token, slot, None]"
_FULL = "full = flat.new_zeros(tokens, {E}).scatter(1, ids, weights)\n"
_SORTED = "order = ids.reshape(-1).argsort()\ntoken = order // ids.shape[1]\n"

DISPATCHES = {
    "where": (
        _EACH
        + "    token, slot = torch.where(ids == e)\n"
        + f"    out.index_add_(0, token, {_PAIR})"
    ),
    "where, empty": (
        _EACH + "    token, slot = (ids == e).nonzero(as_tuple=True)\n"
        "    if token.numel() == 0:\n        continue\n"
        f"    out.index_add_(0, token, {_PAIR})"
    ),
    "plus": _EACH + "    token, slot = torch.where(ids == e)\n" + f"    out[token] += {_PAIR}",
    "one_hot": (
        "mask = F.one_hot(ids, {E}).permute(2, 1, 0)\n"
        + _EACH
        + "    slot, token = torch.where(mask[e])\n"
        f"    out.index_add_(0, token, ({_PAIR}).to(flat.dtype))"
    ),
    "hit": (
        "mask = F.one_hot(ids, {E}).permute(2, 1, 0)\n"
        "hit = mask.sum(dim=(-1, -2)).greater(0).nonzero()\n" + _OUT + "for one in hit:\n"
        "    e = one[0]\n    slot, token = torch.where(mask[e])\n"
        f"    out.index_add_(0, token, {_PAIR})"
    ),
    "unique": (
        _OUT + "for e in ids.unique().tolist():\n    token, slot = torch.where(ids == e)\n"
        f"    out.index_add_(0, token, {_PAIR})"
    ),
    "any": (
        _EACH + "    share = (weights * (ids == e)).sum(-1)\n    m = (ids == e).any(-1)\n"
        "    if m.any():\n        out[m] += self.run(e, flat[m]) * share[m, None]"
    ),
    "share": (
        _EACH + "    share = (weights * (ids == e)).sum(dim=-1, keepdim=True)\n"
        "    out = out + share * self.run(e, flat)"
    ),
    "full": _FULL + "out = sum(full[:, e, None] * self.run(e, flat) for e in range({E}))",
    "full in place": _FULL + _EACH + "    out += full[:, e].unsqueeze(-1) * self.run(e, flat)",
    "slots": (
        _OUT + "for slot in range(ids.shape[1]):\n    for e in range({E}):\n"
        "        m = ids[:, slot] == e\n"
        "        if m.any():\n"
        "            out[m] += weights[m, slot].unsqueeze(1) * self.run(e, flat[m])"
    ),
    "counts": (
        "counts = torch.bincount(ids.flatten(), minlength={E}).tolist()\n"
        + _EACH
        + "    if counts[e] == 0:\n        continue\n    token, slot = torch.where(ids == e)\n"
        f"    out[token] += {_PAIR}"
    ),
    "numpy": (
        _SORTED
        + "ends = ids.reshape(-1).bincount(minlength={E}).cpu().numpy().cumsum(0)\n"
        + _OUT
        + "for e, end in enumerate(ends):\n    start = 0 if e == 0 else ends[e - 1]\n"
        "    if start == end:\n        continue\n    rows = token[start:end]\n"
        "    y = self.run(e, flat[rows]) * weights.reshape(-1, 1)[order[start:end]]\n"
        "    out.index_add_(0, rows, y)"
    ),
    "slices": (
        _SORTED + "rows, share = flat[token], weights.reshape(-1)[order]\n"
        "counts = ids.flatten().bincount(minlength={E}).tolist()\nparts, start = [], 0\n"
        "for e, count in enumerate(counts):\n    end = start + count\n"
        "    if count:\n        parts.append(self.run(e, rows[start:end]))\n    start = end\n"
        "y = torch.cat(parts) * share[:, None]\n"
        "out = torch.zeros_like(flat).index_add_(0, token, y)"
    ),
    "split": (
        "order = ids.flatten().sort(stable=True)[1]\n"
        "sizes = F.one_hot(ids.flatten(), {E}).sum(0).tolist()\n"
        "parts = flat[order // ids.shape[1]].split(sizes)\n"
        "ys = torch.cat([self.run(e, part) for e, part in enumerate(parts)])\n"
        "back = torch.empty_like(ys)\nback[order] = ys\n"
        "out = (back.view(tokens, -1, {D}) * weights[..., None]).sum(1)"
    ),
    "repeat": (
        "rows = flat.repeat_interleave(ids.shape[1], dim=0)\ny = torch.empty_like(rows)\n"
        "chosen = ids.reshape(-1)\nfor e in range({E}):\n"
        "    y[chosen == e] = self.run(e, rows[chosen == e]).to(y.dtype)\n"
        "out = (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)"
    ),
    "gather": (
        "ys = torch.stack([self.run(e, flat) for e in range({E})], dim=1)\n"
        "picked = ys.gather(1, ids[..., None].expand(-1, -1, {D}))\n"
        "out = (picked * weights[..., None]).sum(1)"
    ),
    "taken": (
        "ys = torch.stack([self.run(e, flat) for e in range({E})], dim=1)\n"
        "out = (ys.take_along_dim(ids[..., None], 1) * weights[..., None]).sum(1)"
    ),
    "unbound masks": (
        "hot = F.one_hot(ids, {E}).to(weights.dtype)\n"
        "shares = (hot * weights[..., None]).sum(1).unbind(-1)\n"
        + _OUT
        + "for e, share in enumerate(shares):\n"
        "    rows = share.nonzero()[:, 0]\n"
        "    out[rows] += self.run(e, flat[rows]) * share[rows][:, None]"
    ),
    "bounds of a search": (
        "ranked, order = ids.reshape(-1).sort(stable=True)\n"
        "ends = torch.searchsorted(ranked, torch.arange({E}), right=True).tolist()\n"
        + _OUT
        + "start = 0\nfor e, end in enumerate(ends):\n"
        "    pick = order[start:end]\n    start = end\n"
        "    token = pick // ids.shape[1]\n"
        "    y = self.run(e, flat[token]) * weights.reshape(-1)[pick].unsqueeze(-1)\n"
        "    out.index_add_(0, token, y)"
    ),
    "index": (
        "ys = torch.stack([self.run(e, flat) for e in range({E})], dim=1)\n"
        "picked = ys[torch.arange(tokens)[:, None], ids]\n"
        "out = (picked * weights.unsqueeze(-1)).sum(dim=1)"
    ),
    "einsum": (
        _FULL + "ys = torch.stack([self.run(e, flat) for e in range({E})])\n"
        'out = torch.einsum("te,etd->td", full, ys)'
    ),
    "batched": (
        _FULL + "y = self.batched(flat.unsqueeze(0).expand({E}, -1, -1))\n"
        "out = (y * full.t()[..., None]).sum(0)"
    ),
    "batched repeat": (
        _FULL + "y = self.batched(flat.repeat({E}, 1).view({E}, -1, {D}))\n"
        'out = torch.einsum("etd,te->td", y, full)'
    ),
    "input side": (
        _EACH + "    token, slot = torch.where(ids == e)\n"
        "    rows = flat[token] * weights[token, slot, None]\n"
        "    out.index_add_(0, token, self.run(e, rows))"
    ),
    "input side, dense": (_FULL + _EACH + "    out = out + self.run(e, flat * full[:, e, None])"),
    "input side, stack": (
        _FULL + "rows = flat.repeat({E}, 1) * full.t().reshape(-1, 1)\n"
        "out = self.batched(rows.view({E}, -1, {D})).sum(0)"
    ),
    "assigned": (_EACH + f"    token, slot = torch.where(ids == e)\n    out[token] = {_PAIR}"),
    "scatter_add": (
        _SORTED + "counts = ids.flatten().bincount(minlength={E}).tolist()\n"
        "parts = torch.split(flat[token], counts)\n"
        "ys = torch.cat([self.run(e, part) for e, part in enumerate(parts)])\n"
        "ys = ys * weights.flatten()[order].unsqueeze(-1)\n"
        "out = torch.zeros_like(flat).scatter_add(0, token[:, None].expand(-1, {D}), ys)"
    ),
    "index_put": (
        _EACH + "    token, slot = torch.where(ids == e)\n"
        f"    out.index_put_((token,), {_PAIR}, accumulate=True)"
    ),
    "stack of slots": (
        "y = flat.new_zeros(tokens, ids.shape[1], {D})\n"
        "for e in range({E}):\n    token, slot = torch.where(ids == e)\n"
        "    y[token, slot] = self.run(e, flat[token])\n"
        "out = torch.einsum('tkd,tk->td', y, weights)"
    ),
    "weights gathered": (
        "y = self.chosen(flat[:, None].expand(-1, ids.shape[1], -1), ids)\n"
        "out = (y * weights[..., None]).sum(1)"
    ),
    "product with a mask": (
        _EACH + "    share = ((ids == e).to(weights.dtype) * weights).sum(1, keepdim=True)\n"
        "    out = out + torch.where(share > 0, self.run(e, flat) * share, 0.0)"
    ),
    "one by one": (
        "rows, parts = flat.unsqueeze(1), []\n"
        "for e in range({E}):\n    parts.append(self.run(e, rows))\n"
        "ys = torch.cat(parts, dim=1)\n"
        "hot = F.one_hot(ids, {E}).to(weights.dtype)\n"
        "out = (torch.matmul(weights.unsqueeze(1), hot) @ ys).squeeze(1)"
    ),
    "sorted, back by argsort": (
        "order = ids.reshape(-1).argsort(stable=True)\nback = order.argsort()\n"
        "rows = flat.repeat_interleave(ids.shape[1], 0)[order]\n"
        "ends = F.one_hot(ids.reshape(-1), {E}).sum(0).cumsum(0).tolist()\n"
        "parts, start = [], 0\nfor e in range({E}):\n"
        "    parts.append(self.run(e, rows[start:ends[e]]))\n    start = ends[e]\n"
        "ys = torch.cat(parts)[back].view(tokens, -1, {D})\n"
        "out = (ys * weights[..., None]).sum(1)"
    ),
    "over rows": (
        _EACH + "    rows = (ids == e).any(-1).nonzero().squeeze(-1)\n"
        "    share = (weights * (ids == e)).sum(-1)[rows]\n"
        "    out = out.index_add(0, rows, self.run(e, flat[rows]) * share.unsqueeze(-1))"
    ),
    "index_select": (
        _EACH + "    hits = torch.nonzero(ids.reshape(-1) == e).view(-1)\n"
        "    if hits.shape[0] > 0:\n"
        "        token = torch.div(hits, ids.shape[1], rounding_mode='floor')\n"
        "        y = self.run(e, flat.index_select(0, token))\n"
        "        out.index_add_(0, token, y * weights.reshape(-1, 1).index_select(0, hits))"
    ),
    "two passes": (
        _EACH + "    if e % 2 == 0:\n"
        "        share = (weights * (ids == e)).sum(-1, keepdim=True)\n"
        "        out = out + share * self.run(e, flat)\n"
        "for e in range(1, {E}, 2):\n"
        "    share = (weights * (ids == e)).sum(-1, keepdim=True)\n"
        "    out = out + share * self.run(e, flat)"
    ),
}

WITH_CAPACITY = {
    "gshard": (
        "slots = F.one_hot(place.clamp(min=0, max=capacity - 1), capacity).to(flat.dtype)\n"
        "slots = slots * kept[..., None].to(flat.dtype)\n"
        "hot = F.one_hot(ids, {E}).to(flat.dtype)\n"
        'combine = torch.einsum("tk,tke,tkc->tec", weights, hot, slots)\n'
        "dispatch = combine.bool().to(flat.dtype)\n"
        'rows = torch.einsum("tec,td->ecd", dispatch, flat)\n'
        "ys = torch.stack([self.run(e, rows[e]) for e in range({E})])\n"
        'out = torch.einsum("tec,ecd->td", combine, ys)'
    ),
    "places": (
        "slots = F.one_hot(torch.where(kept, place, capacity), capacity + 1)[..., :-1]\n"
        "slots = slots.to(flat.dtype)\nhot = F.one_hot(ids, {E}).to(flat.dtype)\n"
        'rows = torch.einsum("tke,tkc,td->ecd", hot, slots, flat)\n'
        "ys = torch.stack([self.run(e, rows[e]) for e in range({E})])\n"
        'out = torch.einsum("tke,tkc,tk,ecd->td", hot, slots, weights, ys)'
    ),
    "kept": (
        _OUT + "for e in range({E}):\n    token, slot = torch.where((ids == e) & kept)\n"
        f"    out.index_add_(0, token, {_PAIR})"
    ),
    "sent nowhere": (
        "sent = torch.where(kept, ids, {E})\n"
        + _EACH
        + "    token, slot = torch.where(sent == e)\n"
        f"    out.index_add_(0, token, {_PAIR})"
    ),
    "cut": (
        _EACH + "    token, slot = torch.where(ids == e)\n"
        "    if len(token) > capacity:\n"
        "        token, slot = token[:capacity], slot[:capacity]\n"
        f"    out.index_add_(0, token, {_PAIR})"
    ),
    "table": (
        "table = flat.new_zeros({E} * capacity + 1, {D})\n"
        "where = torch.where(kept, ids * capacity + place, {E} * capacity)\n"
        "table = table.index_copy(0, where.reshape(-1), flat.repeat_interleave(ids.shape[1], 0))\n"
        "rows = table[:-1].view({E}, capacity, {D})\n"
        "ys = torch.cat([self.run(e, rows[e]) for e in range({E})])\n"
        "ys = torch.cat([ys, ys.new_zeros(1, {D})])\n"
        "out = (ys[where] * weights[..., None]).sum(1)"
    ),
    "buffer": (
        "rows = flat.new_zeros({E}, capacity, {D})\n"
        "slot = torch.where(kept, place, 0)\n"
        "copies = flat[:, None].expand(-1, ids.shape[1], -1) * kept[..., None].to(flat.dtype)\n"
        "rows.index_put_((ids, slot), copies, accumulate=True)\n"
        "ys = torch.stack([self.run(e, rows[e]) for e in range({E})])\n"
        "out = (ys[ids, slot] * weights[..., None]).sum(1)"
    ),
    "cut, and the rest copied": (
        "out = flat.clone()\nfor e in range({E}):\n"
        "    token, slot = torch.where(ids == e)\n"
        "    token, slot = token[:capacity], slot[:capacity]\n"
        f"    out[token] = {_PAIR}"
    ),
    "heaviest": (
        _EACH + "    share = (weights * (ids == e)).sum(-1)\n"
        "    best, token = share.topk(min(capacity, tokens))\n"
        "    out.index_add_(0, token, self.run(e, flat[token]) * best[:, None])"
    ),
}
"""These also take `capacity`, `place` and `kept` [T, K]."""

BY_EXPERT = {
    "rows of experts": (
        _EACH + "    y = self.run(e, flat[rows[e]])\n"
        "    out.index_add_(0, rows[e], (y * share[e, :, None]).to(flat.dtype))"
    ),
    "einsum of experts": (
        "hot = F.one_hot(rows, tokens).to(flat.dtype)\n"
        'chosen = torch.einsum("ect,td->ecd", hot, flat)\n'
        "ys = torch.stack([self.run(e, chosen[e]) for e in range({E})])\n"
        'out = torch.einsum("ect,ec,ecd->td", hot, share.to(flat.dtype), ys)'
    ),
}
"""These take `rows` and `share` [E, C] of experts that choose their tokens."""

STACKED = frozenset({"batched", "batched repeat", "input side, stack", "weights gathered"})
"""These take experts whose weights are stacks."""
