"""A model larger than memory: moec's store of experts, mapped files, and llama.cpp.

    $ python -m benchmarks.models.larger_than_memory write FOLDER   # 8.5 GB, three times
    $ moec export FOLDER/model -o FOLDER/model.gguf
    $ moec compile FOLDER/model --store --verify off -o FOLDER/model.moec
    $ python -m benchmarks.models.larger_than_memory measure FOLDER CGROUP --record RESULTS
    $ python -m benchmarks.models.larger_than_memory draw docs/images/larger_than_memory.png

CGROUP is a folder below /sys/fs/cgroup that a process may move itself to: mapped files get as much
memory there, with their pages in the page cache, as the store takes. llama.cpp needs
llama-cpp-python.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.records import Cell, append_record, measured_now, newest, read_records

SHAPE: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SHARES = (1.0, 0.5, 0.25, 0.125)
CLAIM, CONTEXT = "larger-than-memory", 512
TOKENS = (192, 48)
"""Before those that are timed, and these. Slots take many to be warm, as each expert is hashed when
it is first read."""
TOKENS_MAPPED = (24, 16)
"""With a full page cache, which takes seconds a token."""
PREFERENCE = 1.0
"""The standard deviation of an expert's logit over experts that all tokens have in common, beside
that of 1 between tokens."""


def write_model(folder: Path) -> None:
    """Random weights, whose routers prefer some experts as trained ones do: all tokens have a
    direction in common, which each router weighs differently for each expert."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = OlmoeForCausalLM(OlmoeConfig(**SHAPE, dtype=torch.bfloat16)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    width = SHAPE["hidden_size"]
    common = torch.randn(width) / width**0.5
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.data.fill_(1)
        elif name.endswith("embed_tokens.weight"):
            weight.data.copy_(torch.randn(weight.shape) + width**0.5 * common)
        elif name.endswith("gate.weight"):
            rows = torch.randn(weight.shape) / width**0.5
            liked = PREFERENCE * torch.randn(len(weight), 1) * common / width**0.5
            weight.data.copy_(2**0.5 * (rows + liked))
        else:
            weight.data.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.save_pretrained(folder / "model")


def tokens(counts: tuple[int, int]) -> tuple[list[int], list[int]]:
    """The same for all: random words, one after another, first those that are not timed."""
    drawn = np.random.default_rng(0).integers(2, SHAPE["vocab_size"], sum(TOKENS))
    words = [int(token) for token in drawn]
    return words[: counts[0]], words[counts[0] : sum(counts)]


def step_times(step: Callable[[int], object], words: Sequence[int]) -> list[float]:
    """Seconds of each token."""
    times = []
    for word in words:
        start = time.perf_counter()
        step(word)
        times.append(time.perf_counter() - start)
    return times


def milliseconds(times: Sequence[float]) -> dict[str, Cell]:
    return {"ms": 1e3 * statistics.median(times), "mean": 1e3 * statistics.mean(times)}


def time_moec(path: Path, share: float | None, counts: tuple[int, int]) -> dict[str, Cell]:
    """`share` of each layer's experts in slots; None: all weights mapped, without a store."""
    from moec.runtime.artifact.artifact import read
    from moec.runtime.call.executor import start
    from moec.runtime.expert_store.start import start_with_slots, store_report, stored_sizes
    from moec.runtime.text.texts import Texts

    opened = read(path)
    if share is None:
        executor = start(opened)
    else:
        slots = [round(share * layer.experts) for layer in stored_sizes(opened)]
        executor = start_with_slots(opened, slots, reading="direct")
    texts, (first, timed) = Texts(executor, 1, CONTEXT), tokens(counts)
    step_times(lambda word: texts.feed([[word]]), first)
    before = store_report(executor)
    row = milliseconds(step_times(lambda word: texts.feed([[word]]), timed))
    if (after := store_report(executor)) and before:
        visits = after.counts.visits - before.counts.visits
        row["hits"] = (after.counts.hits - before.counts.hits) / visits
        row["mb"] = (after.counts.bytes_read - before.counts.bytes_read) / len(timed) / 1e6
    return row


def time_llama(path: Path, counts: tuple[int, int]) -> dict[str, Cell]:
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=CONTEXT, n_threads=2, use_mmap=True, verbose=False)
    first, timed = tokens(counts)
    step_times(lambda word: model.eval([word]), first)
    return milliseconds(step_times(lambda word: model.eval([word]), timed))


def peak() -> int:
    """The most bytes that this process held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@click.group()
def main() -> None:
    """A model larger than memory."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def write(folder: Path) -> None:
    write_model(folder)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("way")
@click.option("--share", type=float)
@click.option("--container", type=click.Path(path_type=Path))
def once(folder: Path, way: str, share: float | None, container: Path | None) -> None:
    """One way, in this process."""
    if container is not None:
        (container / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    for file in folder.glob("model.*"):
        forget(file)
    counts = TOKENS if container is None else TOKENS_MAPPED
    if way == "llama.cpp":
        row = time_llama(folder / "model.gguf", counts)
    else:
        row = time_moec(folder / "model.moec", share, counts)
    click.echo(json.dumps({**row, "peak": peak()}))


def forget(path: Path) -> None:
    """Drops a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def limit(container: Path, size: int) -> None:
    """Of version 1 or 2 of cgroups."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        if (container / name).exists():
            (container / name).write_text(str(size), encoding="ascii")


def run(folder: Path, way: str, *options: str) -> dict[str, Any]:
    words = [sys.executable, "-m", __spec__.name, "once", str(folder), way, *options]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(
            f"{way} {options} ended with {done.returncode}: {done.stderr[-500:]}"
        )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    click.echo(f"{way} {' '.join(options)}: {row}", err=True)
    return row


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("container", type=click.Path(path_type=Path))
@click.option("--rounds", default=3)
@click.option("--record", type=click.Path(path_type=Path))
@click.option("--machine", default="")
def measure(folder: Path, container: Path, rounds: int, record: Path | None, machine: str) -> None:
    """All ways, in turns; mapped files in the first round only."""
    turns: dict[tuple[str, float], list[dict[str, Any]]] = {}

    def add(name: str, share: float, way: str, *options: str) -> dict[str, Any]:
        row = run(folder, way, *options)
        turns.setdefault((name, share), []).append(row)
        return row

    for number in range(rounds):
        add("all in memory", 1.0, "moec")
        add("llama.cpp, all in memory", 1.0, "llama.cpp")
        for share in SHARES:
            store = add("store", share, "moec", "--share", str(share))
            if share < 1 and number == 0:
                limit(container, store["peak"])
                add("mapped", share, "moec", "--container", str(container))
                add("llama.cpp, mapped", share, "llama.cpp", "--container", str(container))
    rows = [summary(*key, results) for key, results in turns.items()]
    for row in rows:
        click.echo(json.dumps(row))
    if record is not None:
        conditions = f"2 threads, medians of {rounds} rounds in turns (mapped: of one)"
        append_record(measured_now(CLAIM, "olmoe", machine, rows, conditions), record)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
def draw(path: Path) -> None:
    """The newest record's tokens a second by share of the experts in memory, as a picture."""
    from matplotlib.figure import Figure

    (record,) = newest(each for each in read_records() if each.claim == CLAIM)
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, label in (("store", "store"), ("", "mapped"), ("llama.cpp, ", "llama.cpp, mapped")):
        rows = [r for r in record.rows if r["weights"] in (label, f"{name}all in memory")]
        rows.sort(key=lambda row: float(row["experts in memory"] or 0))
        shares = [100 * float(row["experts in memory"] or 0) for row in rows]
        axis.plot(shares, [float(row["tokens/s"] or 0) for row in rows], "o-", label=label)
    axis.set(xlabel="% of the experts in memory", ylabel="tokens a second", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def summary(way: str, share: float, results: Sequence[dict[str, Any]]) -> dict[str, Cell]:
    """A row of the table: medians over rounds."""
    middle = {name: statistics.median(r[name] for r in results) for name in results[0]}
    row: dict[str, Cell] = {
        "weights": way,
        "experts in memory": share,
        "GB": round(middle["peak"] / 1e9, 2),
        "ms a token": round(middle["ms"], 1),
        "tokens/s": round(1e3 / middle["mean"], 2),
    }
    if "hits" in middle:
        row["hits"] = f"{middle['hits']:.0%}"
        row["MB read a token"] = round(middle["mb"])
    return row


if __name__ == "__main__":
    main()
