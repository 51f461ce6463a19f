"""Finds the feed-forward networks among the linear layers of a module.

An FFN consists of linear layers from D to H, consecutive in the order of their names, followed by
one from H to D: `fc1, act, fc2`, `gate, up, down`, `linear1, linear2`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from moec.errors import UsageError
from moec.torch_private import children_of, parameters_of


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
            m for m in model.modules() if any(p is linear.weight for p in parameters_of(m).values())
        ]
        holders = [c for m in model.modules() for c in children_of(m).values() if c is linear]
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
