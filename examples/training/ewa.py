"""Experts Weights Averaging: trains FFNs as mixtures of experts, and deploys them as FFNs.

    ewa = EWA(model, experts=4, share=LinearRate(0, 0.3, steps))
    optimizer = …(model.parameters())          after EWA: the experts are new parameters
    for …: loss.backward(); optimizer.step(); ewa.step()
    model = ewa.fold()

During training each FFN consists of N experts, and the tokens of a forward pass are divided evenly
among them at random: there is no router, no loss, no capacity, and the FLOPs are those of one FFN.
After every step the experts share weights; at the end each FFN is their mean. In eval mode the mean
is used, so that validation measures the model that will be deployed.

An FFN consists of linear layers from D to H, consecutive in the order of their names, followed by
one from H to D: `fc1, act, fc2`, `gate, up, down`, `linear1, linear2`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from moec.errors import UsageError


@dataclass(frozen=True)
class ConstantRate:
    """The same share rate at each step."""

    rate: float

    def __call__(self, step: int) -> float:
        return self.rate


@dataclass(frozen=True)
class LinearRate:
    """A share rate that is linear from `start` at step 0 to `stop` at step `steps`, then
    constant."""

    start: float
    stop: float
    steps: int

    def __call__(self, step: int) -> float:
        done = min(step / self.steps, 1.0) if self.steps else 1.0
        return self.start + (self.stop - self.start) * done


def share(stack: torch.Tensor, rate: float) -> torch.Tensor:
    """W_i <- (1 - rate) W_i + rate / (N - 1) * (the sum of all other W_j), for a stack [N, …].

    The mean over the experts does not change, and equal experts stay equal, bit by bit.
    """
    count = len(stack)
    return stack + rate * count / (count - 1) * (mean(stack) - stack)


def mean(stack: torch.Tensor) -> torch.Tensor:
    """The mean over the first axis; for equal rows exactly that row, bit by bit."""
    return stack[0] + (stack - stack[0]).mean(0)


class Partition:
    """A random partition of the tokens, shared by all linear layers of one FFN.

    The first layer that is called draws it with torch's generator, so that activation
    checkpointing, which restores the generator, repeats it. A layer that is called again draws a
    new one.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.order = torch.empty(0, dtype=torch.int64)
        self.used: set[int] = set()

    def of(self, layer: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """A permutation i64[T] of tokens [T, D]: the first T/N belong to expert 0, and so on."""
        if not self.used or id(layer) in self.used:
            self.order = torch.randperm(len(tokens), device=tokens.device)
            self.used = set()
        if len(self.order) != len(tokens):
            raise UsageError(
                f"an FFN's linear layers are called with {len(self.order)} and {len(tokens)} "
                "tokens: experts cannot be assigned; name the FFNs to train with ffns=..."
            )
        self.used.add(id(layer))
        return self.order


class ExpertLinear(nn.Module):
    """Replaces a linear layer by N layers, `weights` [N, out, in] and `biases` [N, out], each for
    its part of the tokens. All of them start with the weights of the original layer."""

    def __init__(self, dense: nn.Linear, partition: Partition) -> None:
        super().__init__()
        # in a list, so that its parameters are not the model's during training
        self.dense = [dense]
        self.partition = partition
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.weights = self._stacked(dense.weight)
        self.biases = None if dense.bias is None else self._stacked(dense.bias)

    def _stacked(self, tensor: torch.Tensor) -> nn.Parameter:
        copies = tensor.detach().expand(self.partition.count, *tensor.shape).clone()
        return nn.Parameter(copies, requires_grad=tensor.requires_grad)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]: the weight in eval mode and after folding."""
        return mean(self.weights)

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.biases is None else mean(self.biases)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        if not self.training:
            return nn.functional.linear(x, self.weight, self.bias)
        tokens = x.reshape(-1, x.shape[-1])
        order = self.partition.of(self, tokens)
        parts = tokens[order].tensor_split(self.partition.count)
        outputs = [
            nn.functional.linear(
                part, self.weights[e], None if self.biases is None else self.biases[e]
            )
            for e, part in enumerate(parts)
        ]
        rows = torch.cat(outputs)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        return rows[back].reshape(*x.shape[:-1], self.out_features)

    def share(self, rate: float) -> None:
        with torch.no_grad():
            for stack in self.parameters():
                stack.copy_(share(stack, rate))

    def folded(self) -> nn.Linear:
        """The original linear layer, with the experts' mean."""
        (dense,) = self.dense
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.biases is not None:
                dense.bias.copy_(mean(self.biases))
        return dense


class EWA:
    """Replaces a model's FFNs by experts, in place, until `fold`.

    `ffns` are patterns of the names of modules that contain them ("blocks.*.mlp"); None finds all
    FFNs. `share` is the share rate: a number, `ConstantRate`, `LinearRate(start, stop, steps)`, or
    a function of the number of steps done. Create the optimizer after this object, from the model's
    parameters.

    Source: Experts Weights Averaging, arXiv 2308.06093. Raises UsageError where no FFN is found.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: int = 4,
        share: float | Callable[[int], float] = 0.0,
        ffns: str | Sequence[str] | None = None,
    ) -> None:
        if isinstance(experts, bool) or not isinstance(experts, int) or experts < 2:
            raise UsageError(f"experts is {experts!r}: give a whole number from 2")
        if any(isinstance(module, ExpertLinear) for module in model.modules()):
            raise UsageError("the model's FFNs are already experts: fold them first")
        self.model = model
        self.rate = share if callable(share) else ConstantRate(float(share))
        self.rate_at(0)
        self.steps = 0
        self.ffns = feedforwards(model, ffns)
        self.layers: dict[str, ExpertLinear] = {}
        for ffn in self.ffns:
            self._replace(ffn, Partition(experts))

    def _replace(self, ffn: NamedFFN, partition: Partition) -> None:
        for name, linear in ffn.linears:
            layer = ExpertLinear(linear, partition)
            layer.train(linear.training)
            self.model.set_submodule(name, layer)
            self.layers[name] = layer

    def rate_at(self, step: int) -> float:
        """The share rate after step number `step`. Raises UsageError outside of 0 to 1."""
        rate = self.rate(step)
        if not 0 <= rate <= 1:
            raise UsageError(f"the share rate is {rate:g} at step {step}, expected 0 to 1")
        return rate

    def step(self) -> None:
        """Share weights among experts. Call it once after each step of the optimizer."""
        self._check_open()
        rate = self.rate_at(self.steps)
        self.steps += 1
        if rate:
            for layer in self.layers.values():
                layer.share(rate)

    def fold(self) -> nn.Module:
        """The model with each FFN replaced by the mean of its experts; layers, names, parameters
        and speed are those of the original. Raises UsageError where an optimizer never updated the
        experts."""
        self._check_open()
        if self.steps and all(_equals_dense(layer) for layer in self.layers.values()):
            raise UsageError(
                f"no expert has changed in {self.steps} steps: create the optimizer from "
                "model.parameters() after EWA, and call EWA's step() after the optimizer's"
            )
        for name, layer in self.layers.items():
            dense = layer.folded()
            dense.train(layer.training)
            self.model.set_submodule(name, dense)
        self.layers = {}
        return self.model

    def _check_open(self) -> None:
        if not self.layers:
            raise UsageError(
                "the experts are already folded: create a new EWA to continue training"
            )


def _equals_dense(layer: ExpertLinear) -> bool:
    (dense,) = layer.dense
    return layer.weights.requires_grad and bool((layer.weights == dense.weight).all())


@dataclass(frozen=True)
class NamedFFN:
    """The linear layers of one FFN by their names in the model; the last one is from H to D."""

    linears: tuple[tuple[str, nn.Linear], ...]

    def __str__(self) -> str:
        return ", ".join(name for name, _ in self.linears)


def feedforwards(model: nn.Module, named: str | Sequence[str] | None) -> tuple[NamedFFN, ...]:
    """The FFNs of a model, or those inside modules that match a pattern in `named`
    ("blocks.*.mlp").

    Without names, an FFN must widen (H > D). A named module may also narrow, if it has no other
    linear layers. Raises UsageError where the model, or a pattern, has none.
    """
    ffns = tuple(_named_ffns(model, named))
    for ffn in ffns:
        _check_alone(model, ffn)
    return ffns


def _named_ffns(model: nn.Module, named: str | Sequence[str] | None) -> Sequence[NamedFFN]:
    if named is None:
        widening = tuple(_widening(_linears(model)))
        if not widening:
            raise UsageError(
                f"{type(model).__name__} has no FFN that could be found, a linear layer from D to "
                'H > D and one back: name the modules that hold one, such as ffns="blocks.*.mlp"'
            )
        return widening
    patterns = [named] if isinstance(named, str) else list(named)
    modules = dict(model.named_modules())
    ffns: dict[str, NamedFFN] = {}
    for pattern in patterns:
        matched = [name for name in modules if fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(
                f"ffns={pattern!r} matches no module of {type(model).__name__}, which has "
                f"{_first_names(modules)}"
            )
        inside = [ffn for name in matched for ffn in _inside(name, modules[name])]
        if not inside:
            kinds = f"{matched[0]} ({type(modules[matched[0]]).__name__})"
            raise UsageError(
                f"ffns={pattern!r}: {kinds} holds no FFN, linear layers from D to H and one back"
            )
        ffns |= {str(ffn): ffn for ffn in inside}
    return tuple(ffns.values())


def _inside(name: str, module: nn.Module) -> Sequence[NamedFFN]:
    linears = [(f"{name}.{path}".strip("."), m) for path, m in _linears(module)]
    return tuple(_widening(linears)) or tuple(_single_ffn(linears))


def _check_alone(model: nn.Module, ffn: NamedFFN) -> None:
    """Raises UsageError for layers or weights that are used more than once."""
    for name, linear in ffn.linears:
        owners = [
            m for m in model.modules() if any(p is linear.weight for p in m._parameters.values())
        ]
        holders = [c for m in model.modules() for c in m._modules.values() if c is linear]
        if len(owners) > 1 or len(holders) > 1:
            raise UsageError(
                f"{name} shares its weight with another layer of {type(model).__name__}, which "
                "would not be converted: name other FFNs with ffns=..."
            )


def _first_names(modules: dict[str, nn.Module]) -> str:
    names = [name for name in modules if name]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Exact instances only: a subclass of nn.Linear may compute something else."""
    return [(name, m) for name, m in module.named_modules() if type(m) is nn.Linear]


def _widening(linears: Sequence[tuple[str, nn.Linear]]) -> Iterator[NamedFFN]:
    run: list[tuple[str, nn.Linear]] = []
    for name, linear in linears:
        size = (linear.in_features, linear.out_features)
        same = bool(run) and size == (run[-1][1].in_features, run[-1][1].out_features)
        if run and size == (run[-1][1].out_features, run[-1][1].in_features):
            yield NamedFFN((*run, (name, linear)))
            run = []
        elif size[1] > size[0]:
            run = [*run, (name, linear)] if same else [(name, linear)]
        else:
            run = []


def _single_ffn(linears: Sequence[tuple[str, nn.Linear]]) -> Iterator[NamedFFN]:
    """All linear layers of a module as one FFN of any width, if they form one."""
    if len(linears) < 2:
        return
    *first, (_, last) = linears
    if all(
        (m.out_features, m.in_features) == (last.in_features, last.out_features) for _, m in first
    ):
        yield NamedFFN(tuple(linears))
