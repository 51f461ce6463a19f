"""Two ranks with one thread each beside one process with one thread, and with two.

    python -m benchmarks.plans.speedup [--layers 8] [--texts 8] [--prompt-tokens 64] [--rounds 9]

The model has the shape of Granite-3.0-1B-A400M with fewer layers, in bf16, and random weights. Each
rank has half of the experts of every layer, and half of the texts. All contenders are processes
that wait while another is measured, in turn. Prefill reads the prompts of all texts, decode writes
`--new-tokens` tokens after each. Every contender must have the same logits, up to rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from subprocess import PIPE

import numpy as np
import torch
import torch.distributed as dist

import moec
from benchmarks.models.granite import SHAPE
from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.parallel.decoder import RankDecoder
from moec.parallel.launch import launch
from moec.parallel.process import Job, joined
from moec.plan.inputs.workload import Workload
from moec.plan.network.exchange import Form
from moec.plan.plan import LayerPlan, Plan
from moec.runtime.call.executor import load
from moec.runtime.package import DECODE
from moec.runtime.process.threads import set_threads
from moec.runtime.text.texts import Decoder, Texts
from moec.target.cpu import processor

RANKS = 2
ALONE = {"1 thread": 1, "2 threads": 2}
TOGETHER = f"{RANKS} ranks"
ROUNDING = 0.02
"""Of bf16, through all layers: the greatest distance of logits, as a share of their norm."""


@dataclass(frozen=True)
class Took:
    """A round of one contender: seconds of the prompts and of a token of all texts, by the clock
    and of CPU (of the busiest rank), and the last logits of the first text."""

    clock: tuple[float, float]
    cpu: tuple[float, float]
    logits: list[float]


@dataclass(frozen=True)
class Work:
    texts: int
    prompt: int
    new: int

    def took(self, decoder: Decoder) -> Took:
        generator = np.random.default_rng(0)
        shape = (self.texts, self.prompt + self.new)
        tokens = generator.integers(SHAPE["vocab_size"], size=shape).tolist()
        texts = Texts(decoder, self.texts, self.prompt + self.new)
        times = [(time.perf_counter(), time.process_time())]
        texts.feed([text[: self.prompt] for text in tokens])
        times.append((time.perf_counter(), time.process_time()))
        for at in range(self.prompt, self.prompt + self.new):
            logits = texts.feed([text[at : at + 1] for text in tokens])
        times.append((time.perf_counter(), time.process_time()))
        (prefill, cpu), (decode, cpu_of_decode) = np.diff(times, axis=0).tolist()
        of_token = cpu_of_decode / self.new
        return Took((prefill, decode / self.new), (cpu, of_token), logits[0].tolist())


def plan(layers: int, form: Form) -> Plan:
    """Half of the experts of each layer on each rank; a deduplicated row goes to a rank once."""
    experts = SHAPE["num_local_experts"]
    half = experts // RANKS
    slots = tuple(tuple(range(rank * half, (rank + 1) * half)) for rank in range(RANKS))
    return Plan(
        model="granite", cluster="this machine", devices=RANKS, node_size=1,
        workload=Workload(tokens=1, sequences=0, context=0), routing="uniform",
        layers=tuple(
            LayerPlan(
                layer=layer, experts=experts, attention=1, ranks=RANKS, slots=slots,
                form=form, seconds={},
            )
            for layer in range(layers)
        ),
        seconds=0.0, memory=0.0, memory_limit=0.0,
    )  # fmt: skip


def build(folder: Path, layers: int, form: Form) -> None:
    """The artifact of one process, and the ranks."""
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    torch.manual_seed(0)
    config = GraniteMoeConfig(**{**SHAPE, "num_hidden_layers": layers}, dtype=torch.bfloat16)
    model = GraniteMoeForCausalLM(config).to(torch.bfloat16).eval()
    ids = {"input_ids": torch.arange(2 * 8).reshape(2, 8)}
    moec.compile(model, (), ids, verify=False).save(folder / "one.moec")
    ranks = moec.compile_ranks(
        model, plan(layers, form), folder / "two.ranks", (), ids, verify=False
    )
    assert not ranks.declined, ranks.declined


def serve(artifact: str, threads: int, work: Work) -> None:
    """Measures once for each line that it reads."""
    set_threads(threads)
    decoder = load(artifact)
    for _ in sys.stdin:
        print(json.dumps(asdict(work.took(decoder))), flush=True)


@contextmanager
def servers(artifact: Path, work: Work) -> Iterator[dict[str, Callable[[], Took]]]:
    """A process for each contender of one process; each is measured by a call."""
    with ExitStack() as stack:
        calls = {}
        for name, threads in ALONE.items():
            words = ("benchmarks.plans.speedup", "--serve", artifact, threads)
            numbers = (work.texts, work.prompt, work.new)
            command = [sys.executable, "-m", *map(str, (*words, *numbers))]
            pipes = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True)
            process = stack.enter_context(pipes)
            stack.callback(process.kill)
            calls[name] = partial(answer, process)
        yield calls


def answer(process: subprocess.Popen[str]) -> Took:
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    return Took(**json.loads(process.stdout.readline()))


def measure(job: Job, rounds: int, work: Work) -> dict[str, list[Took]]:
    """On rank 0 what each contender took in each round, the first of which is not counted. Rank 1
    waits while one process is measured."""
    results: dict[str, list[Took]] = {name: [] for name in (*ALONE, TOGETHER)}
    with joined(job, DECODE) as (ranks, files), ExitStack() as stack:
        decoder = RankDecoder(files, ranks)

        def together() -> Took:
            dist.barrier()
            took = work.took(decoder)
            cpu = torch.tensor(took.cpu, dtype=torch.float64)
            dist.all_reduce(cpu, dist.ReduceOp.MAX)
            return replace(took, cpu=tuple(cpu.tolist()))

        calls: dict[str, Callable[[], Took]] = {TOGETHER: together}
        if ranks.rank == 0:
            one = stack.enter_context(servers(job.folder.with_name("one.moec"), work))
            calls = {"1 thread": one["1 thread"], TOGETHER: together, "2 threads": one["2 threads"]}
        for number in range(rounds + 1):
            for name in list(calls)[:: 1 if number % 2 else -1]:
                results[name].append(calls[name]())
    return {name: rows[1:] for name, rows in results.items()}


def table(results: Mapping[str, list[Took]], work: Work) -> list[dict[str, Cell]]:
    """Medians, and ratios of medians to one process with one thread."""
    right = np.array(results["1 thread"][0].logits)
    for name, rounds in results.items():
        distance = np.linalg.norm(np.array(rounds[0].logits) - right) / np.linalg.norm(right)
        assert distance < ROUNDING, (name, distance)
    rows: list[dict[str, Cell]] = []
    for phase, name in enumerate(("prefill", "decode")):
        tokens = work.texts * (work.prompt if phase == 0 else 1)
        clock, cpu = (
            {n: statistics.median(getattr(r, of)[phase] for r in rs) for n, rs in results.items()}
            for of in ("clock", "cpu")
        )
        both = zip(results["1 thread"], results[TOGETHER], strict=True)
        ratios = [one.clock[phase] / two.clock[phase] for one, two in both]
        base = clock["1 thread"]
        rows.append(
            {
                "phase": name,
                "texts": work.texts,
                **{f"{n}, tokens/s": round(tokens / s, 1) for n, s in clock.items()},
                "2 threads, times as fast": round(base / clock["2 threads"], 2),
                "2 ranks, times as fast": round(base / clock[TOGETHER], 2),
                "least of a round": round(min(ratios), 2),
                "most": round(max(ratios), 2),
                "CPU of 1 thread / of a rank": round(cpu["1 thread"] / cpu[TOGETHER], 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--form", choices=("flat", "deduplicated"), default="flat")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="the model, if it was built before")
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    add_record_options(parser, processor())
    options = parser.parse_args()
    if options.serve:
        artifact, threads, *numbers = options.serve
        serve(artifact, int(threads), Work(*map(int, numbers)))
        return
    work = Work(options.texts, options.prompt_tokens, options.new_tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        if not (folder / "two.ranks").exists():
            build(folder, options.layers, options.form)
        load_before = os.getloadavg()[0]
        job = Job(folder / "two.ranks", None, None, 600.0, 1)
        results = launch(job, RANKS, measure, options.rounds, work)
    rows = table(results, work)
    for row in rows:
        print(json.dumps(row))
    record_if_asked(
        options, "ranks-speedup", f"{options.layers} layers, {options.form}", rows,
        f"{os.cpu_count()} cores, load {load_before:.1f} before, {options.rounds} rounds in turn",
    )  # fmt: skip


if __name__ == "__main__":
    main()
