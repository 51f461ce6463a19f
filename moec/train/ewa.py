"""Experts Weights Averaging: trains FFNs as mixtures of experts, and deploys them as FFNs.

    ewa = EWA(model, experts=4, share=LinearRate(0, 0.3, steps))
    optimizer = …(model.parameters())          after EWA: the experts are new parameters
    for …: loss.backward(); optimizer.step(); ewa.step()
    model = ewa.fold()

During training each FFN consists of N experts, and the tokens of a forward pass are divided evenly
among them at random: there is no router, no loss, no capacity, and the FLOPs are those of one FFN.
After every step the experts share weights; at the end each FFN is their mean. In eval mode the mean
is used, so that validation measures the model that will be deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moec.errors import UsageError
from moec.train.feedforward import NamedFFN, feedforwards


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
