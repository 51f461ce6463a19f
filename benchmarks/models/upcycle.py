"""SmolLM2-135M-Instruct with experts, as a second model for benchmarks/approximation/curves.py.

The dense model is that of benchmarks/models/smollm2.py. In the layers LAYERS, its MLP is replaced
by EXPERTS copies of it, with a router that chooses two of them (sparse upcycling, arXiv
2212.05055). Pruning equal copies would cost nothing, therefore:

  1. The router's rows are the centres of clusters of the MLP's inputs (spherical k-means).
  2. In each copy, the half of the neurons that its own tokens use least is reinitialised (as many
     as in arXiv 2502.19261, which selects at random).
  3. Copies and router are trained, layer by layer, to reproduce the dense MLP (Adam, STEPS steps of
     ROWS rows), on TOKENS tokens of Python's standard library.

The model as a whole is not trained: its perplexity is at best that of the dense model.
The environment may have another number of experts, and a folder to keep them in:

    MOEC_UPCYCLED=FOLDER MOEC_EXPERTS=4 moec compile benchmarks/models/upcycle.py:smollm2
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.smollm2 import load

LAYERS = (4, 11, 18, 25)
EXPERTS, K = int(os.environ.get("MOEC_EXPERTS", "8")), 2
TOKENS, WINDOW = 4096, 256
STEPS, ROWS, RATE = 40, 768, 1e-3
TEXT = ("ast.py", "typing.py", "pathlib.py", "dataclasses.py", "shutil.py", "email/message.py",
        "xml/dom/minidom.py", "pydoc_data/topics.py")  # fmt: skip


class Experts(nn.Module):
    """x [B, S, D] -> [B, S, D]: copies of one MLP, of which each token uses K."""

    def __init__(self, experts: Sequence[nn.Module], router: nn.Linear) -> None:
        super().__init__()
        self.experts, self.router = nn.ModuleList(experts), router

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(rows).softmax(-1).topk(K, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            y = y.index_add(0, token, expert(rows[token]) * weights[token, slot, None])
        return y.reshape(x.shape)


class Mlp(nn.Module):
    """SmolLM2's MLP: down(silu(gate x) * up x)."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(old.in_features, old.out_features, bias=False)
            for old in (like.gate_proj, like.up_proj, like.down_proj)
        )
        self.gate.weight.data.copy_(like.gate_proj.weight)
        self.up.weight.data.copy_(like.up_proj.weight)
        self.down.weight.data.copy_(like.down_proj.weight)

    def hidden(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.hidden(x))
        return result


def stored() -> tuple[Any, Any]:
    """The upcycled model and its tokenizer; trains the experts if the folder has none."""
    model, tokenizer = load()
    file = Path(os.environ["MOEC_UPCYCLED"]) / f"experts{EXPERTS}.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        upcycle(model, tokenizer)
        save_file({k: v for k, v in model.state_dict().items() if ".mlp.experts." in k
                   or ".mlp.router." in k}, file)  # fmt: skip
        return model, tokenizer
    for layer in (model.model.layers[number] for number in LAYERS):
        router = nn.Linear(layer.mlp.up_proj.in_features, EXPERTS)
        layer.mlp = Experts([Mlp(layer.mlp) for _ in range(EXPERTS)], router).eval()
    model.load_state_dict(load_file(file), strict=False)
    return model, tokenizer


def smollm2() -> tuple[Any, tuple[Tensor]]:
    return stored()[0], (torch.zeros(2, WINDOW, dtype=torch.int64),)


def upcycle(
    model: Any,
    tokenizer: Any,
    layers: Sequence[int] = LAYERS,
    steps: int = STEPS,
    bias: bool = True,
) -> list[float]:
    """Gives the dense model experts, in place. Returns, for each layer, the relative error of its
    output against the dense MLP's, on its training text."""
    root = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((root / name).read_text(encoding="utf-8") for name in TEXT)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - WINDOW, TOKENS // WINDOW).long()
    windows = torch.stack([ids[start : start + WINDOW] for start in starts])
    entering = _entering(model, windows, layers)
    errors = []
    for number, x in entering.items():
        layer = model.model.layers[number]
        result, error = _trained(layer.mlp, x, steps, bias)
        layer.mlp = result
        errors.append(error)
    return errors


def _entering(model: Any, windows: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """The inputs of the MLP of each of `layers`: [TOKENS, D]."""
    result: dict[int, list[Tensor]] = {number: [] for number in layers}

    def watch(number: int) -> Any:
        def keep(_: Any, inputs: tuple[Tensor, ...]) -> None:
            result[number].append(inputs[0].flatten(0, 1))

        return model.model.layers[number].mlp.register_forward_pre_hook(keep)

    handles = [watch(number) for number in layers]
    with torch.no_grad():
        for batch in windows.split(2):
            model.model(batch)
    for handle in handles:
        handle.remove()
    return {number: torch.cat(parts) for number, parts in result.items()}


def _centres(x: Tensor, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """Spherical k-means of the rows x [N, D] after subtracting their mean: centres of length 1
    [EXPERTS, D], and the mean [D]."""
    mean = x.mean(0)
    unit = F.normalize(x - mean)
    centres = unit[torch.randperm(len(x))[:EXPERTS]]
    for _ in range(rounds):
        private = F.one_hot((unit @ centres.T).argmax(-1), EXPERTS).float()
        centres = F.normalize(private.T @ unit + 1e-6 * centres)
    return centres, mean


def _trained(mlp: Any, x: Tensor, steps: int, bias: bool) -> tuple[Experts, float]:
    """The experts that replace an MLP, and their error on its rows x [N, D]."""
    with torch.no_grad():
        expected = mlp(x)
        centres, mean = _centres(x)
        router = nn.Linear(x.shape[1], EXPERTS, bias=bias)
        router.weight.copy_(centres * 4 / (x - mean).norm(dim=-1).mean())  # logits of -4 to 4
        if bias:
            router.bias.copy_(-(router.weight @ mean))
        else:  # rows at right angles to the mean need none
            router.weight.sub_(torch.outer(router.weight @ mean, mean / mean.square().sum()))
        chosen = router(x).topk(K).indices
        experts = []
        for number in range(EXPERTS):
            expert = Mlp(mlp)
            private = x[(chosen == number).any(-1)]
            use = expert.hidden(private).square().mean(0) * expert.down.weight.square().sum(0)
            least = use.argsort()[: len(use) // 2]
            for matrix in (expert.gate.weight, expert.up.weight):
                matrix[least] = torch.randn(len(least), x.shape[1]) * matrix.std()
            shape = (x.shape[1], len(least))
            expert.down.weight[:, least] = torch.randn(shape) * expert.down.weight.std() / 4
            experts.append(expert)
    module = Experts(experts, router)
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        sample = torch.randint(len(x), (ROWS,))
        loss = (module(x[sample]) - expected[sample]).square().sum() / expected[
            sample
        ].square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = float((module(x) - expected).norm() / expected.norm())
    return module.eval(), error
