"""The tensors of a GGUF file as the weights of transformers' model.

    attn_q, attn_k              rows in pairs -> halves of a head, for llamas and granite
    ffn_gate_exps, ffn_up_exps  [E, H, D] each -> gate_up_proj [E, 2 * H, D]; gpt-oss has their rows
                                in turn, and stores its experts as [E, D, 2 * H]
    attn_k_b, attn_v_b          [heads, rank, k], [heads, v, rank] -> [heads * (k + v), rank]
    nextn blocks                predict further tokens: not read

Rows move, and the numbers of a row stay together: codes move as values do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moec.errors import CaptureError
from moec.ir.formats.integer import Quantised
from moec.sources.checkpoint.gguf.architectures import Architecture, architecture_of
from moec.sources.checkpoint.gguf.model import LAYER, model_name
from moec.sources.checkpoint.gguf.rotary import FACTORS, LONG
from moec.sources.checkpoint.gguf.weights import NEAREST, GgufWeights, stored_weights
from moec.sources.checkpoint.weight import CheckpointWeight, WeightCodes

Weights = dict[str, CheckpointWeight]
Rows = Callable[[Sequence[Tensor]], Tensor]

_EXPERTS = re.compile(r"ffn_(gate_up|gate|up|down)_exps\.(weight|bias)")
_PAIRED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def read(config: Mapping[str, Any], files: GgufWeights) -> Weights:
    """The weights under transformers' names. Raises CaptureError where tensors that belong
    together do not fit."""
    _, architecture = architecture_of(files.header.fields)
    layers: dict[int, Weights] = {}
    weights: Weights = {}
    for name, weight in stored_weights(files).items():
        if name in LONG:
            raise CaptureError(f"{name}: rotary embeddings of the type longrope are not mapped")
        if match := LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = weight
        elif name != FACTORS:
            weights[model_name(architecture, name)] = weight
    for number, parts in layers.items():
        if number < config["num_hidden_layers"]:
            arranged = _layer(config, architecture, parts)
            named = {model_name(architecture, f"blk.{number}.{p}"): w for p, w in arranged.items()}
            stem = model_name(architecture, f"blk.{number}.ffn_exps.weight").rpartition(".")[0]
            experts = _experts(architecture, parts)
            weights |= named | {f"{stem}.{part}": weight for part, weight in experts.items()}
    return weights


def _layer(config: Mapping[str, Any], architecture: Architecture, parts: Weights) -> Weights:
    """The tensors of a layer but the experts', with those joined that the model has in one."""
    result = {part: weight for part, weight in parts.items() if not _EXPERTS.fullmatch(part)}
    for part, weight in parts.items():
        stem = part.rpartition(".")[0]
        if architecture.paired and stem in _PAIRED:
            heads = config.get(_PAIRED[stem], config["num_attention_heads"])
            result[part] = _reordered(weight, _unpaired(weight, heads))
        elif part in architecture.rows:
            count = math.prod(weight.shape)
            result[part] = _by_rows([weight], lambda t: t[0].view(1, -1), (1, count))
    if "attn_k_b.weight" in parts or "attn_v_b.weight" in parts:
        halves = (_removed(result, "attn_k_b.weight"), _removed(result, "attn_v_b.weight"))
        result["attn_kv_b.weight"] = _latent(*halves)
    if "ffn_in_shexp" in architecture.names and "ffn_gate_shexp.weight" in parts:
        gate, up = (_removed(result, f"ffn_{side}_shexp.weight") for side in ("gate", "up"))
        result["ffn_in_shexp.weight"] = _joined(gate, up, 0)
    return result


def _experts(architecture: Architecture, parts: Weights) -> Weights:
    """The experts' weights and biases, as the model names them."""
    result: Weights = {}
    for ending in sorted({match[2] for part in parts if (match := _EXPERTS.fullmatch(part))}):
        suffix = "" if ending == "weight" else "_bias"
        down = _removed(parts, f"ffn_down_exps.{ending}")
        both = parts.get(f"ffn_gate_up_exps.{ending}")
        if both is None:
            gate, up = (_removed(parts, f"ffn_{side}_exps.{ending}") for side in ("gate", "up"))
            both = _joined(gate, up, 1, architecture.in_turn)
        if architecture.in_turn and ending == "weight":
            both, down = _transposed(both), _transposed(down)
        result |= {f"gate_up_proj{suffix}": both, f"down_proj{suffix}": down}
    return result


def _removed(parts: Weights, part: str) -> CheckpointWeight:
    if part not in parts:
        raise CaptureError(f"the file has no {part} in a layer that needs it")
    return parts.pop(part)


def _by_rows(
    weights: Sequence[CheckpointWeight], rows: Rows, shape: tuple[int, ...]
) -> CheckpointWeight:
    """The weight of a shape whose rows are those of others, as `rows` arranges them."""
    joined = replace(
        weights[0],
        shape=shape,
        tensors=tuple(name for weight in weights for name in weight.tensors),
        values=lambda: rows([weight.values() for weight in weights]),
        codes=None,
    )
    held = [weight.codes for weight in weights if weight.codes is not None]
    if len(held) == len(weights) and len({each.format for each in held}) == 1:

        def codes() -> Quantised:
            parts = [each.read() for each in held]
            zeros = [part.zeros for part in parts if part.zeros is not None]
            return Quantised(
                rows([part.codes for part in parts]),
                rows([part.scales for part in parts]),
                rows(zeros) if zeros else None,
            )

        stored = WeightCodes(held[0].format, codes)
        return replace(joined, codes=stored, values=stored.values)
    if not held and len({(weight.nearest, weight.reason) for weight in weights}) == 1:
        return joined
    return replace(joined, nearest=NEAREST, reason="gate and up are of different types", dtype=None)


def _unpaired(weight: CheckpointWeight, heads: int) -> Tensor:
    """The rows in transformers' order: halves of a head, where llama.cpp has pairs."""
    rows = weight.shape[0]
    if rows % (2 * heads):
        raise CaptureError(f"the {rows} rows of {weight.tensors[0]} are not of {heads} heads")
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def _reordered(weight: CheckpointWeight, order: Tensor) -> CheckpointWeight:
    return _by_rows([weight], lambda parts: parts[0][order], weight.shape)


def _joined(
    first: CheckpointWeight, second: CheckpointWeight, axis: int, in_turn: bool = False
) -> CheckpointWeight:
    """Two weights of one shape as one, along an axis, or with their rows in turn."""
    shape = list(first.shape)
    if first.shape != second.shape or len(shape) <= axis:
        raise CaptureError(
            f"{first.tensors[0]} is {shape}, and {second.tensors[0]} is {list(second.shape)}"
        )
    shape[axis] *= 2

    def rows(parts: Sequence[Tensor]) -> Tensor:
        if in_turn:
            return torch.stack(tuple(parts), axis + 1).flatten(axis, axis + 1)
        return torch.cat(tuple(parts), axis)

    return _by_rows([first, second], rows, tuple(shape))


def _transposed(weight: CheckpointWeight) -> CheckpointWeight:
    """The weight [E, N, K] of a model that stores [E, K, N]."""
    if len(weight.shape) != 3:
        raise CaptureError(f"{weight.tensors[0]} is {list(weight.shape)}, no stack of experts")
    e, n, k = weight.shape
    codes = weight.codes and replace(weight.codes, transposed=True)
    values = codes.values if codes else lambda: weight.values().mT
    return replace(weight, shape=(e, k, n), codes=codes, values=values)


def _latent(k: CheckpointWeight, v: CheckpointWeight) -> CheckpointWeight:
    """The weight [heads * (k + v), rank] of attn_k_b [heads, rank, k] and attn_v_b
    [heads, v, rank]."""
    fits = len(k.shape) == len(v.shape) == 3
    if not fits or k.shape[0] != v.shape[0] or k.shape[1] != v.shape[2]:
        raise CaptureError(
            f"{k.tensors[0]} is {list(k.shape)}, and {v.tensors[0]} is {list(v.shape)}"
        )
    few = k.dtype is None or v.dtype is None
    return CheckpointWeight(
        (k.shape[0] * (k.shape[2] + v.shape[1]), k.shape[1]),
        k.tensors + v.tensors,
        lambda: torch.cat((k.values().float().mT, v.values().float()), 1).flatten(0, 1),
        nearest=NEAREST if few else None,
        reason="attn_k_b is stored across its rows" if few else "",
        dtype=None if few else k.dtype,
    )
