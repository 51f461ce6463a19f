"""Small MoE layers over stacked weights: x[T, D] -> y[T, D]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.forms.loops import Loop
from tests.passes.forms.routers import Router, softmax_topk, softmax_topk_renormalised
from tests.passes.forms.sizes import D, E, H, K


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


class GatheredColumns(Stacks):
    """Matrices times columns, and the weights times the rows."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        hidden = (self.up[chosen] @ x[:, None, :, None]).squeeze(-1) + self.bias[chosen]
        rows = (self.down[chosen] @ F.gelu(hidden)[..., None]).squeeze(-1)
        return (weights[:, None] @ rows).squeeze(1)


class GatheredSummed(Stacks):
    """One product sums over the slots too."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        hidden = torch.einsum("td,tkhd->tkh", x, self.up[chosen]) + self.bias[chosen]
        return torch.einsum("tk,tkh,tkdh->td", weights, F.gelu(hidden), self.down[chosen])


class Embedded(Stacks):
    """Matrices looked up as embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        up = F.embedding(chosen, self.up.flatten(1)).unflatten(-1, (H, D))
        down = F.embedding(chosen, self.down.flatten(1)).unflatten(-1, (D, H))
        hidden = torch.einsum("td,tkhd->tkh", x, up) + F.embedding(chosen, self.bias)
        rows = torch.einsum("tkh,tkdh->tkd", F.gelu(hidden), down)
        return (rows * weights[..., None]).sum(1)


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
            position = hot.transpose(0, 1).reshape(-1, E).cumsum(0) - 1
            position = position.reshape(K, -1, E).transpose(0, 1)
        else:
            position = (hot.reshape(-1, E).cumsum(0) - 1).reshape(-1, K, E)
        mask = (hot * (position < self.size)).to(x.dtype)
        position = F.one_hot((position * hot).sum(-1).clamp(max=self.size - 1), self.size).to(
            x.dtype
        )
        if self.renormalise:
            weights = weights * mask.sum(-1)
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
        combine = torch.einsum("tke,tkc,tk->tec", mask, position, weights)
        dispatch = (combine > 0).to(x.dtype)
        rows = torch.einsum("tec,td->ecd", dispatch, x)
        hidden = F.gelu(torch.einsum("ecd,ehd->ech", rows, self.up) + self.bias[:, None])
        return torch.einsum("tec,ecd->td", combine, torch.einsum("ech,edh->ecd", hidden, self.down))


class SwitchCapacity(Stacks):
    """DeepSpeed's top-1 gate: argmax, its probability, a capacity."""

    def forward(self, x: Tensor) -> Tensor:
        gates = F.softmax(self.router.gate(x), dim=1)
        mask = F.one_hot(torch.argmax(gates, dim=1), E)
        position = torch.cumsum(mask, dim=0) - 1
        mask = mask * torch.lt(position, 2)
        spot = F.one_hot((position * mask).sum(1), 2).to(x.dtype)
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


class AllThenWhere(Stacks):
    """Every expert for every token, rows set to zero where it was not chosen."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        dense = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, chosen, weights)
        hits = F.one_hot(chosen, E).sum(1) > 0
        hidden = F.gelu(torch.einsum("td,ehd->teh", x, self.up) + self.bias)
        rows = torch.einsum("teh,edh->ted", hidden, self.down)
        rows = torch.where(hits[..., None], rows, torch.zeros_like(rows))
        return (rows * dense[..., None]).sum(1)


class AllThenSum(Stacks):
    """Hidden values are weighed, and one product sums over the experts too."""

    aligned = True

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        shares = torch.zeros(x.shape[0], E).scatter(1, chosen, weights)
        hidden = F.linear(x, self.up.flatten(0, 1), self.bias.flatten()).unflatten(-1, (E, H))
        hidden = F.gelu(hidden) * shares[..., None]
        if not self.aligned:
            hidden = hidden.transpose(1, 2)
        return F.linear(hidden.flatten(1), self.down.transpose(0, 1).flatten(1))


class Misaligned(AllThenSum):
    """Hidden values of all experts are multiplied by the weights of one."""

    aligned = False


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


class Repeated(Stacks):
    """Llama 4: every expert for every token, scaled first by a weight that is 0 where it was not
    chosen, and added to what a network of all tokens gives."""

    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(E, D, 2 * H))
        self.back = nn.Parameter(torch.randn(E, H, D))
        self.shared = nn.Linear(D, D) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        top, ids = self.router.gate(x).topk(1, dim=1)
        scores = torch.full((len(x), E), float("-inf")).scatter(1, ids, top).t().sigmoid()
        rows = torch.arange(len(x)).view(1, -1).expand(E, -1).reshape(-1, 1).expand(-1, D)
        read = (x.gather(0, rows) * scores.reshape(-1, 1)).view(E, -1, D)
        gate, up = torch.bmm(read, self.both).chunk(2, -1)
        y = torch.bmm(up * F.silu(gate), self.back).view(-1, D)
        start = torch.zeros_like(x) if self.shared is None else self.shared(x)
        return start.scatter_add(0, rows, y)
