"""`moec list passes|targets|models|formats`."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from moec.commands.options.options import OneOf, json_option
from moec.errors import UsageError
from moec.spelling import did_you_mean

if TYPE_CHECKING:
    from moec.target.cuda import CudaTarget


_BRIEF = ("pass", "from", "kind", "what_it_does")
_NAMES = {"pass", "gives", "target", "model", "class", "from", "kind", "format"}
"""Columns that are never wrapped, so that their values can be copied and searched."""


@click.command("list")
@click.argument("what", type=OneOf(["passes", "targets", "models", "formats"]))
@click.argument("name", required=False)
@json_option
def command(what: str, name: str | None, as_json: bool) -> None:
    """List the passes in their order, the targets, the models known to work, or the formats of
    checkpoints.

    With the NAME of a pass, say what it does, its options and its source.
    """
    rows = {"passes": every_pass, "targets": targets, "models": models, "formats": formats}[what]()
    if name is not None:
        if what != "passes":
            raise UsageError(f"list {what} takes no name: leave out {name}")
        rows = [row for row in rows if row["pass"] == name]
        if not rows:
            near = did_you_mean(name, [row["pass"] for row in every_pass()])
            raise UsageError(f"there is no pass {name!r}{near or '; see moec list passes'}")
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    elif name is not None:
        (row,) = rows
        click.echo("\n".join([f"{name}  {row['kind']}, {row['from']}", *_details(row)]))
    elif what == "passes":
        _show_brief(rows)
    else:
        _show(rows)


def _details(row: dict[str, Any]) -> list[str]:
    source = [f"source: {row['source']}"] if "source" in row else []
    options = row.get("fields") or [f"options: {row['options']}"]
    return [f"  {line}" for line in (row["what_it_does"], *options, *source)]


def _show(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from moec.report.text import terminal_width

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), overflow="fold", no_wrap=column in _NAMES)
    for row in rows:
        table.add_row(*(str(cell) for cell in row.values()))
    Console(width=terminal_width(), highlight=False, emoji=False).print(table)


def _show_brief(rows: list[dict[str, Any]]) -> None:
    """One line per pass, cut at the terminal's width."""
    from moec.report.text import terminal_width

    widths = [max(len(row[column]) for row in rows) for column in _BRIEF]
    head = dict(zip(_BRIEF, (column.replace("_", " ") for column in _BRIEF), strict=True))
    for row in (head, *rows):
        cells = (row[column].ljust(width) for column, width in zip(_BRIEF, widths, strict=True))
        line, width = "  ".join(cells).rstrip(), terminal_width()
        click.echo(line if len(line) <= width else f"{line[: width - 1]}…")
    click.echo("Opt-in passes run with --passes +NAME. moec list passes NAME has their options.")
    click.echo("moec.transform(model, passes, calib=...) returns a module that can be trained.")


def every_pass() -> list[dict[str, Any]]:
    return passes() + opt_in_passes()


def opt_in_passes() -> list[dict[str, Any]]:
    """One row per pass that runs only on request: what it does, its options, its source."""
    from moec.passes.core.options import default, expected
    from moec.passes.core.runner import Kind
    from moec.pipeline import EXACT_OPT_IN, OPT_IN

    exact = {kind for kind in EXACT_OPT_IN if vars(kind).get("kind") is not Kind.CHANGES}
    return [
        {
            "pass": kind.name,
            "gives": "MOE",
            "from": "opt-in",
            "kind": "exact" if kind in exact else "approximate",
            "what_it_does": first_line(kind),
            "options": ", ".join(map(default, fields(kind))) or "-",  # type: ignore[arg-type]
            "fields": [
                f"{default(f)}: {f.metadata['says']} ({expected(f, kind)})"
                for f in fields(kind)  # type: ignore[arg-type]
            ],
            "source": kind.source,
        }
        for kind in OPT_IN
    ]


def passes() -> list[dict[str, Any]]:
    """One row per pass: the first line of its class's docstring, and its options."""
    from moec.passes.core.runner import Kind
    from moec.pipeline import DECODE, ON_REQUEST, PHASES

    leveled = [pair for phase in (*PHASES, DECODE) for pair in phase.leveled]
    level: dict[str, str] = {p.name: option for option, p in ON_REQUEST}
    for at, p in leveled:
        level[p.name] = min(f"-O{at}", level.get(p.name, f"-O{at}"))
    every = (*(p for _, p in leveled), *(p for _, p in ON_REQUEST))
    return [
        {
            "pass": p.name,
            "gives": p.gives.name,
            "from": level[p.name],
            "kind": "exact" if p.kind is Kind.EXACT else "approximate",
            "what_it_does": first_line(p),
            "options": ", ".join(f"{f.name}={getattr(p, f.name)}" for f in fields(p)) or "-",  # type: ignore[arg-type]
        }
        for p in {p.name: p for p in every}.values()
    ]


def first_line(thing: Any) -> str:
    doc = getattr(thing, "doc", None) or thing.__doc__ or ""
    return str(doc).strip().partition("\n")[0].rstrip(".")


def targets() -> list[dict[str, Any]]:
    from moec.target import cpu, cuda

    host, depends = cpu.host(), "depends on CPU"
    here = f"{host.name}, this machine's"
    rows: list[tuple[Any, ...]] = [("cpu", here, host.vector_lanes, "the features of this machine")]
    for t in cpu.TARGETS.values():
        lacking = cpu.missing(t)
        here = f"lacks {' '.join(lacking)}" if lacking else "runs"
        rows.append((t.name, here, t.vector_lanes, " ".join(t.features) or "nothing"))
    needs = "the features that LLVM lists for the CPU"
    rows.append(("llvm:-mcpu=...", depends, depends, needs))
    for gpu in cuda.TARGETS.values():
        needs = f"{gpu.example} or similar, with {' '.join(gpu.tensor_cores)}"
        rows.append((gpu.name, gpu_here(gpu), 32, needs))
    return [dict(zip(("target", "here", "lanes", "needs"), row, strict=True)) for row in rows]


def gpu_here(target: CudaTarget) -> str:
    """What this machine can do for a GPU target."""
    from moec.target import nvidia

    driver = nvidia.driver()
    gpus = driver.gpus if driver else ()
    here = "GPU present" if any(target.runs_on(gpu.capability) for gpu in gpus) else "no GPU"
    compiles = nvidia.nvcc() or nvidia.nvrtc()
    return f"compiles; {here}" if compiles else f"neither nvcc nor NVRTC; {here}"


def models() -> list[dict[str, Any]]:
    rows = *FAMILIES, *(("any module", form, says) for form, says in FORMS.items())
    return [{"model": model, "class": form, "what": what} for model, form, what in rows]


def formats() -> list[dict[str, Any]]:
    """One row for each format of checkpoints, in the order in which they are recognised."""
    from moec.sources.checkpoint.table import FORMATS

    return [
        {
            "format": format.name,
            "recognised_by": format.recognised_by,
            "weights": format.holds,
            "in_the_artifact": format.stored_as,
        }
        for format in FORMATS
    ]


_FAMILIES = """
mixtral MixtralForCausalLM softmax of the chosen logits
qwen2_moe Qwen2MoeForCausalLM a shared expert with a sigmoid gate
qwen3_moe Qwen3MoeForCausalLM renormalised softmax
olmoe OlmoeForCausalLM softmax before top-k
deepseek_v2 DeepseekV2ForCausalLM groups of experts, shared experts, MLA
deepseek_v3 DeepseekV3ForCausalLM sigmoid with correction bias, groups, MLA
gpt_oss GptOssForCausalLM interleaved gate and up with clamp, biases, sinks
granitemoe GraniteMoeForCausalLM softmax after top-k
phimoe PhimoeForCausalLM sparsemixer
switch_transformers SwitchTransformersForConditionalGeneration top-1, capacity, encoder and decoder
jetmoe JetMoeForCausalLM attention made of experts too
llama4_text Llama4ForCausalLM sigmoid top-1, weights on the input side
glm4_moe Glm4MoeForCausalLM sigmoid with correction bias, groups
glm4_moe_lite Glm4MoeLiteForCausalLM sigmoid with correction bias, MLA
ernie4_5_moe Ernie4_5_MoeForCausalLM softmax with correction bias
minimax_m2 MiniMaxM2ForCausalLM sigmoid with correction bias
granitemoeshared GraniteMoeSharedForCausalLM a shared expert without a gate
gemma4_text Gemma4ForCausalLM a factor per expert, next to a dense MLP
lfm2_moe Lfm2MoeForCausalLM short convolutions between the blocks
mimo_v2_flash MiMoV2FlashForCausalLM sliding windows with sinks
cohere2_moe Cohere2MoeForCausalLM attention and experts side by side
aria_text AriaTextForCausalLM transposed weights
qwen3_next Qwen3NextForCausalLM gated delta rule, a shared expert with a gate
kimi_linear KimiLinearForCausalLM delta rule with a decay per channel, MLA
granitemoehybrid GraniteMoeHybridForCausalLM Mamba 2, a shared expert
nemotron_h NemotronHForCausalLM Mamba 2, experts without a gate
deepseek_v32 DeepseekV32ForCausalLM as deepseek_v3, with sparse attention
minimax MiniMaxForCausalLM lightning attention, renormalised softmax
longcat_flash LongcatFlashForCausalLM experts that copy their rows
jamba JambaForCausalLM Mamba, softmax before top-k
"""
FAMILIES = tuple(line.split(" ", 2) for line in _FAMILIES.strip().splitlines())
"""Families of transformers: the type of a model, its class, and what is peculiar to its blocks."""

FORMS = {
    "hf experts op": "experts that transformers decorates with use_experts_implementation",
    "static loop": "a loop over the experts: torch.where and index_add_, or masks",
    "gathered weights": "each token's expert weights gathered, then bmm",
    "sort + grouped_mm": "rows sorted by expert, then grouped_mm",
    "dense dispatch with capacity": "einsum with a dispatch mask, tokens dropped (GShard)",
    "evaluate all, then select": "every expert evaluated, then selected or masked",
}
