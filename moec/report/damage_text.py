"""The report on an approximate pass as text and a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moec.passes.core.damage import Damage, Distance
from moec.report.units import count, size

if TYPE_CHECKING:
    from rich.console import RenderableType

_NUMBERS = ("saved", "FLOPs", "layer error", "rerouted", "error", "KL", "ppl")


def parts(damage: Damage) -> Iterable[RenderableType]:
    """A title, a line for each layer, and a summary."""
    from rich.padding import Padding
    from rich.text import Text

    yield Text(f"{damage.name}, on {damage.tokens} tokens", style="bold")
    if damage.layers:
        for line in damage.layers:
            yield Padding(Text(f"{line.layer}: {line.says}"), (0, 0, 0, 2))
        yield _table(damage)
    for sentence in summary(damage):
        yield Padding(Text(sentence), (0, 0, 0, 2))


def _table(damage: Damage) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="bold",
        show_edge=False,
        collapse_padding=True,
    )
    table.add_column("layer", overflow="fold")
    for column in _NUMBERS:
        table.add_column(column, justify="right", no_wrap=True)
    for line in damage.layers:
        after = line.after
        table.add_row(
            line.layer,
            _bytes(line.bytes_saved),
            _flops(line.flops_saved),
            f"{line.error:.3f}",
            f"{line.changed:.1%}",
            f"{after.error:.3f}",
            _number(after.kl, ".4f"),
            _number(after.perplexity, ".2f"),
        )
    return table


def summary(damage: Damage) -> list[str]:
    """Savings and costs in sentences, after an explanation of the columns if there are layers."""
    before, after = damage.bytes_before, damage.bytes_after
    lines = []
    if damage.layers:
        lines.append(
            "layer error: of this layer's output; rerouted: share of tokens whose experts differ "
            "in this layer; error, KL and ppl: of the complete model after this layer was changed"
        )
    lines.append(
        f"total: {_bytes(before)} of weights before, {_bytes(after)} after; "
        f"{_flops(damage.flops_before)} FLOPs per token before, {_flops(damage.flops_after)} after"
    )
    lines.append(f"distance from the original: {distance(damage.original, damage.after)}")
    undone = sum(line.undone for line in damage.layers)
    if damage.budget:
        left = f"; {undone} of {len(damage.layers)} layers were left unchanged" if undone else ""
        lines.append(f"within the budget {damage.budget}{left}")
    return lines


def distance(original: Distance, after: Distance) -> str:
    parts = [f"error {after.error:.2e}", f"{after.changed:.1%} of tokens choose other experts"]
    if after.kl is not None and after.perplexity is not None:
        parts.append(f"KL {after.kl:.4f} nats per token")
        parts.append(f"perplexity {original.perplexity:.2f} becomes {after.perplexity:.2f}")
    return ", ".join(parts)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _bytes(number: float) -> str:
    return f"-{size(-number)}" if number < 0 else size(number)


def _flops(number: float) -> str:
    return f"-{count(-number)}" if number < 0 else count(number)
