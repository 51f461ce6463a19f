"""What narrow copies of experts cost and gain: damage on a real model, speed on a larger one.

    $ MOEC_UPCYCLED=FOLDER python -m benchmarks.models.narrow_experts write FOLDER
    $ python -m benchmarks.models.narrow_experts damage FOLDER/upcycled.moec
    $ python -m benchmarks.models.narrow_experts speed FOLDER/synthetic.moec

The real model is that of benchmarks/models/upcycle.py, one text of it, token by token; the other
has random weights in OLMoE's form: 2 layers of 64 experts of 6.3 MB, 8 a token, .8 GB.
"""

from __future__ import annotations

import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.models import larger_than_memory

BUDGETS = (0.0, 0.05, 0.1, 0.2, 1.0)
SYNTHETIC = {
    "hidden_size": 1024, "num_hidden_layers": 2, "vocab_size": 8192,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip


def started(path: Path, share: float, narrow: float, predict: str = "never") -> Any:
    from moec.runtime.artifact.artifact import read
    from moec.runtime.expert_store.native import StoreOptions
    from moec.runtime.expert_store.start import start_with_slots, stored_sizes

    opened = read(path)
    slots = [max(1, round(share * layer.experts)) for layer in stored_sizes(opened)]
    options = StoreOptions(predict=predict, narrow=narrow)
    return start_with_slots(opened, slots, reading="direct", options=options)


def steps(executor: Any, words: list[int]) -> Iterator[np.ndarray]:
    """Logits after each token."""
    from moec.runtime.text.texts import Texts

    texts = Texts(executor, 1, len(words))
    for word in words:
        logits = texts.feed([[word]])
        yield logits.reshape(-1, logits.shape[-1])[-1].astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@click.group()
def main() -> None:
    """Narrow copies of experts."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--only", default="upcycled,synthetic")
def write(folder: Path, only: str) -> None:
    import torch

    import moec

    if "upcycled" in only:
        from benchmarks.models.upcycle import smollm2

        model, example = smollm2()
        moec.compile(model.to(torch.bfloat16), example, tiers=True, verify=False).save(
            folder / "upcycled.moec"
        )
    if "synthetic" in only:
        larger_than_memory.SHAPE |= SYNTHETIC
        larger_than_memory.write_model(folder)
        moec.compile(str(folder / "model"), tiers=True, verify=False).save(
            folder / "synthetic.moec"
        )


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tokens", default=600)
def damage(path: Path, tokens: int) -> None:
    """Perplexity, KL from the exact model, and bytes read a token, of a text of the library."""
    import moec
    from moec.runtime.expert_store.start import store_report

    text = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text(encoding="utf-8")
    words = moec.load(path).tokenizer.encode(text)[:tokens]
    click.echo("| in slots | budget | carried | perplexity | KL | MB a token | hits |")
    for share in (0.5, 0.25):
        exact: list[np.ndarray] = []
        for narrow in BUDGETS:
            executor = started(path, share, narrow)
            losses, kls = [], []
            for number, logits in enumerate(steps(executor, words)):
                log = log_softmax(logits)
                if narrow == 0:
                    exact.append(log)
                kls.append(float((np.exp(exact[number]) * (exact[number] - log)).sum()))
                if number + 1 < len(words):
                    losses.append(-float(log[words[number + 1]]))
            counts = store_report(executor).counts
            click.echo(
                f"| {share} | {narrow} | {counts.narrow_weight / max(counts.weight, 1e-9):.3f} | "
                f"{np.exp(np.mean(losses)):.3f} | {np.mean(kls):.5f} | "
                f"{counts.bytes_read / len(words) / 1e6:.2f} | {counts.hits / counts.visits:.1%} |"
            )


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--share", type=float, required=True)
@click.option("--budgets", default="0,0.1,0.2")
@click.option("--predict", default="never")
@click.option("--tokens", nargs=2, default=(100, 60))
def speed(path: Path, share: float, budgets: str, predict: str, tokens: tuple[int, int]) -> None:
    """Milliseconds and bytes a token, after some tokens in which experts are hashed."""
    from moec.runtime.expert_store.start import store_report

    larger_than_memory.SHAPE |= SYNTHETIC
    first, timed = larger_than_memory.tokens(larger_than_memory.TOKENS)
    words = [*first, *timed][: sum(tokens)]
    for narrow in map(float, budgets.split(",")):
        executor, times = started(path, share, narrow, predict), []
        before = store_report(executor).counts
        end = time.perf_counter()
        for number, _ in enumerate(steps(executor, words)):
            begin, end = end, time.perf_counter()
            times.append(end - begin)
            if number + 1 == tokens[0]:
                before = store_report(executor).counts
                end = time.perf_counter()
        counts, timed_steps = store_report(executor).counts, times[tokens[0] :]
        read = counts.bytes_read - before.bytes_read
        visits = counts.visits - before.visits
        weight = max(counts.weight - before.weight, 1e-9)
        click.echo(
            f"| {share} | {narrow} | {(counts.narrow_weight - before.narrow_weight) / weight:.3f} |"
            f" {(counts.narrow_reads - before.narrow_reads) / len(timed_steps):.1f} | "
            f"{(counts.hits - before.hits) / visits:.1%} | {read / len(timed_steps) / 1e6:.1f} MB |"
            f" {1e3 * statistics.median(timed_steps):.1f} | "
            f"{1e3 * statistics.mean(timed_steps):.1f} | "
            f"{read / (counts.read_seconds - before.read_seconds) / 1e9:.2f} GB/s a thread |"
        )
        del executor


if __name__ == "__main__":
    main()
