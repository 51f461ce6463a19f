"""Parts of a module by name: tensors, chains of submodules, lists of like submodules."""

from __future__ import annotations

import copy
import itertools
from typing import TypeGuard

import torch
from torch import nn

from moec.capture.behaviour.layer.description import Path


def tensor(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer."""
    owner, _, attribute = name.rpartition(".")
    value = getattr(module.get_submodule(owner), attribute)
    assert isinstance(value, torch.Tensor)
    return value


def walk(module: nn.Module, path: Path, rows: torch.Tensor) -> torch.Tensor:
    """The result of applying the submodules of `path` to rows, one after the other."""
    for name in path:
        part = module.get_submodule(name)
        rows = _batch_normed(part, rows) if _is_fixed_batch_norm(part) else part(rows)
    return rows


def _is_fixed_batch_norm(part: nn.Module) -> TypeGuard[nn.BatchNorm1d]:
    return isinstance(part, nn.BatchNorm1d) and not part.training and part.track_running_stats


def _batch_normed(part: nn.BatchNorm1d, rows: torch.Tensor) -> torch.Tensor:
    """Batch norm with the stored statistics, written out: torch's operator for it has no kernel."""
    assert part.running_mean is not None
    assert part.running_var is not None
    rows = (rows - part.running_mean) * (part.running_var + part.eps).rsqrt()
    return rows if part.weight is None else rows * part.weight + part.bias


def may_hold_experts(module: nn.Module) -> bool:
    """Whether a direct child is a list of submodules, or any parameter has three axes [E, ..]."""
    for part in module.children():
        if isinstance(part, nn.ModuleList | nn.ModuleDict) and len(part) > 1:
            return True
    return any(p.dim() == 3 for p in module.parameters())


def float_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the first float tensor of the module, which is taken for that of its tokens."""
    floats = (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return next((t.dtype for t in floats), torch.float32)


def in_float32(module: nn.Module) -> nn.Module:
    """The module if it is in float32, else a float32 copy: rounding to 16 bits hides differences
    between rules."""
    floats = (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    if all(t.dtype is torch.float32 for t in floats):
        return module
    return _copy(module).float()


def shaken(module: nn.Module) -> nn.Module:
    """A float32 copy in which no tensor is constant: untrained biases of zeros would hide how the
    module uses them."""
    twin, generator = _copy(module).float(), torch.Generator().manual_seed(7)
    for t in itertools.chain(twin.parameters(), twin.buffers()):
        if not t.is_floating_point() or t.numel() < 2:
            continue
        if t.isfinite().all() and not (t == t.flatten()[0]).all():
            continue
        value = float(torch.nan_to_num(t.detach().flatten()[0]))
        noise = torch.rand(t.shape, generator=generator)
        t.data.copy_(value * (0.5 + noise) if value else 0.6 * noise - 0.3)
    return twin


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy. Non-leaf tensors in attributes (a balance loss from the last training step) are
    detached first, because torch refuses to copy them."""
    attributes = (value for part in module.modules() for value in vars(part).values())
    results = (t for t in attributes if isinstance(t, torch.Tensor) and not t.is_leaf)
    return copy.deepcopy(module, {id(t): t.detach().clone() for t in results})
