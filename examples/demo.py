"""All steps with a trained model: compile, verify, report, generate, time.

    make demo

Everything is measured when it runs. Times are medians of interleaved rounds, so other load on the
machine slows down both sides; both sides have the same model and dtype.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import moec

CHECKPOINT = Path(__file__).resolve().parent / "tiny_moe" / "checkpoint"
PROMPT = "def read_lines(path):\n"
SHAPES = ((1, 1), (1, 16), (1, 128), (4, 128))  # (batch, sequence)


def median_times(
    rivals: dict[str, Callable[[], object]], rounds: int, seconds: float
) -> dict[str, float]:
    """Median seconds per call. In each round, the calls run in turn, for `seconds` each."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for call in rivals.values():
        call()
    for _ in range(rounds):
        for name, call in rivals.items():
            call()  # lets the threads of the previous call go to sleep
            stop = time.perf_counter() + seconds
            while (start := time.perf_counter()) < stop:
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def race(compiled: Callable[..., object], rounds: int, seconds: float) -> None:
    """Prints moec's times and those of both implementations that transformers has on CPUs."""
    models = {name: eager_model(name) for name in ("eager", "grouped_mm")}
    config, dtype = models["eager"].config, models["eager"].dtype
    click.echo(f"milliseconds a forward pass, {dtype}, {torch.get_num_threads()} threads")
    click.echo(f"{'batch x sequence':>17} {'eager':>9} {'grouped_mm':>11} {'moec':>9}")
    for batch, sequence in SHAPES:
        torch.manual_seed(0)
        ids = torch.randint(config.vocab_size, (batch, sequence))
        rivals = {name: partial(model, ids, use_cache=False) for name, model in models.items()}
        with torch.inference_mode():
            took = median_times({**rivals, "moec": partial(compiled, ids)}, rounds, seconds)
        ms = {name: 1e3 * value for name, value in took.items()}
        gain = min(ms["eager"], ms["grouped_mm"]) / ms["moec"]
        click.echo(
            f"{f'{batch} x {sequence}':>17} {ms['eager']:9.2f} {ms['grouped_mm']:11.2f} "
            f"{ms['moec']:9.2f}  {gain:.1f} times as fast as the better of the two"
        )
    click.echo("The model is small: at few tokens, much of eager's time is Python.")


def eager_model(experts: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()
    model.set_experts_implementation(experts)
    return model


def title(text: str) -> None:
    click.echo(f"\n== {text}")


@click.command(help="Compile the trained model of this repository, let it write, and time it.")
@click.option("--prompt", default=PROMPT, help="What the model continues.")
@click.option("--max-new-tokens", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Rounds of timing; 0 leaves it out.")
@click.option("--seconds", default=0.3, show_default=True, help="Time for each call in a round.")
@click.option("--threads", default=os.cpu_count() or 1, help="For both sides; default: cores.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Keep the artifact here.")
def main(
    prompt: str,
    max_new_tokens: int,
    rounds: int,
    seconds: float,
    threads: int,
    output: Path | None,
) -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    os.environ["TVM_NUM_THREADS"] = str(threads)  # read when the first kernel starts
    with tempfile.TemporaryDirectory() as folder:
        artifact = output or Path(folder) / "tiny_moe.moec"

        title("compile, and verify against eager PyTorch")
        start = time.perf_counter()
        compiled = moec.compile(CHECKPOINT)
        click.echo(compiled.report())
        click.echo(f"compiled and verified in {time.perf_counter() - start:.1f} s")

        compiled.save(artifact)
        click.echo(f"saved {artifact.name}, {artifact.stat().st_size / 1e6:.1f} MB")

        title(f"generate with the artifact, in a process without torch: moec run {artifact.name}")
        click.echo(prompt, nl=False)
        run = [sys.executable, "-m", "moec", "run", str(artifact), "--prompt", prompt]
        subprocess.run([*run, "--max-new-tokens", str(max_new_tokens)], check=True)

        if rounds:
            title("time against eager")
            race(compiled, rounds, seconds)

        title("serve it over HTTP, with OpenAI's interface and a page for browsers")
        click.echo("moec compile examples/tiny_moe/checkpoint -o tiny_moe.moec")
        click.echo("moec serve tiny_moe.moec")


if __name__ == "__main__":
    main()
