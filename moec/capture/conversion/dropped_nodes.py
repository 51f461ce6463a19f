"""Nodes of an export that a graph does not hold: assertions, and the numbers that only these read.

    torch._check_tensor_all(mask.sum() == 8)      all true, read, sym_ite(it, 1, 0), >= 0, <= 1

torch asserts the range of each number that it reads. Such arithmetic may be on conditions, which
are no sizes.
"""

from __future__ import annotations

import torch

_ASSERTIONS = ("_assert", "sym_constrain", "sym_size", "sym_numel", "sym_stride", "_guard")
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)


def reads_number(node: torch.fx.Node) -> bool:
    """Whether a node reads a number from data. Shapes name it, even where no node has it."""
    return "_local_scalar_dense" in str(node.target)


def dropped(node: torch.fx.Node) -> bool:
    """Whether a node only asserts, or is arithmetic on numbers that nothing but assertions read."""
    return _asserts(node) or (bool(node.users) and _is_arithmetic(node) and _only_asserted(node))


def _asserts(node: torch.fx.Node) -> bool:
    return any(part in str(node.target) for part in _ASSERTIONS) and not isinstance(
        node.meta.get("val"), torch.SymInt | int
    )


def _is_arithmetic(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), _NUMBERS) and not reads_number(node)


def _only_asserted(node: torch.fx.Node) -> bool:
    """Whether all that is computed of a number is asserted."""
    visited, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user in visited or _asserts(user):
                continue
            if not user.users or not _is_arithmetic(user):
                return False  # it is converted, as shapes may name it
            visited.add(user)
            waiting.append(user)
    return True
