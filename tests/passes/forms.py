"""Small MoE layers in every form in which people write them: x[T, D] -> y[T, D].

D model width, H hidden width, E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, H, E, K = 8, 16, 4, 2


# ---- routers: logits [T, E] -> weights [T, k], experts [T, k] ----------------------------


def softmax_topk(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = logits.softmax(-1).topk(K, -1)
    return weights, experts


def softmax_topk_renormalised(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = F.softmax(logits, dim=-1, dtype=torch.float32).topk(K, -1)
    return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), experts


def topk_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = torch.topk(logits, K, dim=-1)
    return weights.softmax(-1), experts


def sorted_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same choice by a full sort."""
    weights, experts = torch.sort(logits, dim=-1, descending=True)
    return weights[:, :K].softmax(-1), experts[:, :K]


def topk_sigmoid(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = torch.topk(logits, K, dim=-1)
    return weights.sigmoid(), experts


def sigmoid_scaled(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = logits.sigmoid().topk(K, -1)
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) * 2.5, experts


def softmax_norm(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Renormalised by the 1-norm, as DBRX does."""
    weights, experts = logits.softmax(-1).topk(K, -1)
    return weights / torch.linalg.vector_norm(weights, ord=1, dim=-1, keepdim=True), experts


def switch(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = logits.softmax(-1).max(-1, keepdim=True)
    return weights, experts


def argmax_only(logits: Tensor) -> tuple[Tensor, Tensor]:
    experts = logits.argmax(-1, keepdim=True)
    return torch.ones_like(experts, dtype=logits.dtype), experts


def tempered(logits: Tensor) -> tuple[Tensor, Tensor]:
    """No `Routing`: the weights are square roots of probabilities."""
    weights, experts = logits.softmax(-1).topk(K, -1)
    return weights.sqrt(), experts


def sparsemixer(logits: Tensor, jitter: float = 0.05) -> tuple[Tensor, Tensor]:
    """PhiMoE's sampler at inference."""
    left, weights, experts = logits, [], []
    for _ in range(2):
        top, chosen = left.max(-1, keepdim=True)
        factor = logits.abs().clamp(min=top)
        far = (top - logits) / factor > 2 * jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, chosen))
        experts.append(chosen)
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(weights, -1), torch.cat(experts, -1)


class Router(nn.Module):
    def __init__(self, rule: Callable[[Tensor], tuple[Tensor, Tensor]], experts: int = E) -> None:
        super().__init__()
        self.rule = rule
        self.gate = nn.Linear(D, experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.rule(self.gate(x))


class Grouped(nn.Module):
    """DeepSeek: V3 scores groups by their best two and corrects the choice, V2 by their best."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.version = version
        self.gate = nn.Linear(D, 8, bias=False)
        self.correction = nn.Parameter(torch.randn(8) * 0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x)
        if self.version == 3:
            scores = logits.sigmoid()
            choice = scores + self.correction
            groups = choice.view(-1, 4, 2).topk(2, dim=-1)[0].sum(-1)
        else:
            choice = scores = logits.softmax(-1)
            groups = choice.view(-1, 4, 2).max(-1).values
        kept = torch.zeros_like(groups).scatter_(1, groups.topk(2, sorted=False)[1], 1)
        mask = kept.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
        choice = choice.masked_fill(~mask.bool(), float("-inf") if self.version == 3 else 0.0)
        experts = choice.topk(3, sorted=False)[1]
        weights = scores.gather(1, experts)
        if self.version == 3:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * 1.5, experts


# ---- experts: rows [R, D] -> [R, D] ------------------------------------------------------


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


# ---- form 2: loops -----------------------------------------------------------------------


class Loop(nn.Module):
    """Every expert for every token, weighed by what the mask leaves."""

    def __init__(
        self,
        expert: Callable[[], nn.Module] = SwiGLU,
        rule: Callable[[Tensor], tuple[Tensor, Tensor]] = softmax_topk_renormalised,
        router: nn.Module | None = None,
        count: int = E,
    ) -> None:
        super().__init__()
        self.router = router or Router(rule, count)
        self.experts = nn.ModuleList(expert() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weights * (chosen == number)).sum(-1)
            out = out + share[:, None] * expert(x)
        return out


class Batched3D(Loop):
    """Tokens as [B, S, D] all the way."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (chosen == number)).sum(-1, keepdim=True)
        return out


class OneHotLoop(Loop):
    """The share of each expert from an einsum with one-hot ids."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        shares = torch.einsum("tk,tke->te", weights, F.one_hot(chosen, E).to(x.dtype))
        out = 0
        for number, expert in enumerate(self.experts):
            out = out + shares[:, number : number + 1] * expert(x)
        return out


class RowsLoop(Loop):
    """Each expert for its own rows, found by where."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class SlicedLoop(nn.Module):
    """Each expert a slice of stacked weights; rows by nonzero of a one-hot mask, as Mixtral."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(softmax_topk_renormalised)
        self.up = nn.Parameter(torch.randn(E, H, D) / 3)
        self.down = nn.Parameter(torch.randn(E, D, H) / 4)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        mask = F.one_hot(chosen, E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for number in range(E):
            slot, token = torch.where(mask[number])
            rows = F.linear(F.gelu(F.linear(x[token], self.up[number])), self.down[number])
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out


class SharedExpert(Loop):
    """A dense branch is added, gated or not; before the loop or after it."""

    def __init__(self, gated: bool, first: bool) -> None:
        super().__init__()
        self.shared = Mlp()
        self.gate = nn.Linear(D, 1, bias=False) if gated else None
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        dense = self.shared(x)
        if self.gate is not None:
            dense = torch.sigmoid(self.gate(x)) * dense
        if not self.first:
            return super().forward(x) + dense
        weights, chosen = self.router(x)
        out = dense
        for number, expert in enumerate(self.experts):
            out = out + (weights * (chosen == number)).sum(-1)[:, None] * expert(x)
        return out


# ---- forms 3 to 6: stacked weights -------------------------------------------------------


class Stacks(nn.Module):
    """up[E, H, D] with a bias, down[E, D, H]."""

    def __init__(
        self,
        rule: Callable[[Tensor], tuple[Tensor, Tensor]] = softmax_topk_renormalised,
        router: nn.Module | None = None,
        count: int = E,
    ) -> None:
        super().__init__()
        self.router = router or Router(rule, count)
        self.up = nn.Parameter(torch.randn(count, H, D) / 3)
        self.bias = nn.Parameter(torch.randn(count, H) / 3)
        self.down = nn.Parameter(torch.randn(count, D, H) / 4)
        self.count = count


class Gathered(Stacks):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        hidden = torch.einsum("td,tkhd->tkh", x, self.up[chosen]) + self.bias[chosen]
        rows = torch.einsum("tkh,tkdh->tkd", F.gelu(hidden), self.down[chosen])
        return (rows * weights[..., None]).sum(1)


class GatheredBmm(Stacks):
    """Flattened choices and batched products, as transformers' batched_mm."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        k, flat = chosen.shape[-1], chosen.reshape(-1)
        rows = x.repeat_interleave(k, dim=0)
        hidden = torch.bmm(self.up[flat], rows.unsqueeze(-1)).squeeze(-1) + self.bias[flat]
        rows = torch.bmm(self.down[flat], F.gelu(hidden).unsqueeze(-1)).squeeze(-1)
        return (rows * weights.reshape(-1, 1)).view(-1, k, D).sum(1)


class Sorted(Stacks):
    """Rows sorted by expert, grouped products, results added to their tokens."""

    scatter = True

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        k, flat = chosen.shape[-1], chosen.reshape(-1)
        ids, order = torch.sort(flat, stable=True)
        ends = torch.bincount(flat, minlength=E).cumsum(0).to(torch.int32)
        rows = x[order // k]
        hidden = F.grouped_mm(rows, self.up.transpose(-2, -1), offs=ends) + self.bias[ids]
        rows = F.grouped_mm(F.gelu(hidden), self.down.transpose(-2, -1), offs=ends)
        rows = rows * weights.reshape(-1)[order][:, None]
        if self.scatter:
            return torch.zeros_like(x).index_add(0, order // k, rows)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return rows[back].view(-1, k, D).sum(1)


class SortedBack(Sorted):
    """As before, with the rows put back in order and summed."""

    scatter = False


class Capacity(Stacks):
    """GShard: dispatch and combine as [T, E, C] tensors; choices beyond C are dropped."""

    def __init__(self, size: int = 3, by_slot: bool = True, renormalise: bool = False) -> None:
        super().__init__(softmax_topk)
        self.size, self.by_slot, self.renormalise = size, by_slot, renormalise

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        hot = F.one_hot(chosen, E)
        if self.by_slot:
            place = hot.transpose(0, 1).reshape(-1, E).cumsum(0) - 1
            place = place.reshape(K, -1, E).transpose(0, 1)
        else:
            place = (hot.reshape(-1, E).cumsum(0) - 1).reshape(-1, K, E)
        kept = (hot * (place < self.size)).to(x.dtype)
        place = F.one_hot((place * hot).sum(-1).clamp(max=self.size - 1), self.size).to(x.dtype)
        if self.renormalise:
            weights = weights * kept.sum(-1)
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
        combine = torch.einsum("tke,tkc,tk->tec", kept, place, weights)
        dispatch = (combine > 0).to(x.dtype)
        rows = torch.einsum("tec,td->ecd", dispatch, x)
        hidden = F.gelu(torch.einsum("ecd,ehd->ech", rows, self.up) + self.bias[:, None])
        return torch.einsum("tec,ecd->td", combine, torch.einsum("ech,edh->ecd", hidden, self.down))


class SwitchCapacity(Stacks):
    """DeepSpeed's top-1 gate: argmax, its probability, a capacity."""

    def forward(self, x: Tensor) -> Tensor:
        gates = F.softmax(self.router.gate(x), dim=1)
        mask = F.one_hot(torch.argmax(gates, dim=1), E)
        place = torch.cumsum(mask, dim=0) - 1
        mask = mask * torch.lt(place, 2)
        spot = F.one_hot((place * mask).sum(1), 2).to(x.dtype)
        gates = gates * mask.to(x.dtype)
        combine = torch.einsum("se,sc->sec", gates, spot)
        rows = torch.einsum("sec,sm->ecm", combine.bool().to(x.dtype), x)
        hidden = F.relu(torch.bmm(rows, self.up.transpose(1, 2)))
        rows = torch.bmm(hidden, self.down.transpose(1, 2))
        return torch.einsum("sec,ecm->sm", combine, rows)


class AllThenWeigh(Stacks):
    """Every expert for every token, weights zero where it was not chosen."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        dense = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, chosen, weights)
        hidden = F.gelu(torch.einsum("td,ehd->teh", x, self.up) + self.bias)
        rows = torch.einsum("teh,edh->ted", hidden, self.down)
        return (rows * dense[..., None]).sum(1)


class AllThenMatmul(Stacks):
    """The same through broadcast matmuls, experts first."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        shares = (F.one_hot(chosen, E).to(x.dtype) * weights[..., None]).sum(1)
        hidden = torch.matmul(x.unsqueeze(0), self.up.transpose(1, 2)) + self.bias[:, None]
        rows = torch.matmul(F.gelu(hidden), self.down.transpose(1, 2))
        return (rows * shares.t()[..., None]).sum(0)


class AllThenGather(Loop):
    """Every expert's result stacked, the chosen ones gathered."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        rows = torch.stack([expert(x) for expert in self.experts], 1)
        rows = rows.gather(1, chosen[..., None].expand(-1, -1, D))
        return (rows * weights[..., None]).sum(1)


class InputSide(nn.Module):
    """Llama 4: the weight multiplies what the expert reads."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.both = nn.Parameter(torch.randn(E, D, 2 * H) / 3)
        self.down = nn.Parameter(torch.randn(E, H, D) / 4)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        top, chosen = torch.topk(logits, K, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, top).sigmoid()
        rows = x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)
        gate, up = torch.bmm(rows.view(E, -1, D), self.both).chunk(2, dim=-1)
        rows = torch.bmm(up * F.silu(gate), self.down).view(-1, D)
        return rows.reshape(E, -1, D).sum(0)


class InputSideBiased(InputSide):
    """A bias makes the experts that were not chosen speak: no MoE block does this."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(E, 1, 2 * H))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        top, chosen = torch.topk(logits, K, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, top).sigmoid()
        rows = x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)
        gate, up = (torch.bmm(rows.view(E, -1, D), self.both) + self.bias).chunk(2, dim=-1)
        return torch.bmm(up * F.silu(gate), self.down).sum(0)


# ---- what is no MoE block, or none that moe.* can say ------------------------------------


class SoftMixture(Stacks):
    """Every token uses every expert."""

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router.gate(x).softmax(-1)
        hidden = F.gelu(torch.einsum("td,ehd->teh", x, self.up) + self.bias)
        return (torch.einsum("teh,edh->ted", hidden, self.down) * shares[..., None]).sum(1)


class SoftLoop(Loop):
    def forward(self, x: Tensor) -> Tensor:
        shares = self.router.gate(x).softmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + shares[:, number, None] * expert(x)
        return out


class Unequal(Loop):
    """One expert has another activation."""

    def __init__(self) -> None:
        super().__init__(Mlp)
        self.experts[2].act = torch.tanh


class Missing(Loop):
    """The loop leaves an expert out."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number in (0, 1, 3):
            share = (weights * (chosen == number)).sum(-1)
            out = out + share[:, None] * self.experts[number](x)
        return out


class AcrossTokens(Gathered):
    """The experts see the mean over all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        hidden = torch.einsum("td,tkhd->tkh", x, self.up[chosen])
        hidden = hidden - hidden.mean(0, keepdim=True)
        rows = torch.einsum("tkh,tkdh->tkd", hidden, self.down[chosen])
        return (rows * weights[..., None]).sum(1)


class Copies(RowsLoop):
    """The last two experts are none: their rows come back as they are, weighed."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            rows = expert(x[token]) if number < E - 2 else x[token]
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out


class WrongExpert(RowsLoop):
    """Looks like a loop, but rows are weighed with the weight of the other slot."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out.index_add_(0, token, expert(x[token]) * weights[token, 1 - slot, None] ** 2)
        return out


class Dense(nn.Module):
    """No experts at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Ensemble(Dense):
    """Branches side by side that nothing weighs or chooses among."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers], 1).sum(1)
