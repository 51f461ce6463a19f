"""The effect of refactor-dense on SmolLM2-135M-Instruct, with experts for code and prose.

    python -m benchmarks.approximation.refactor_dense [--keep 0.3,0.5] [--train STEPS] [--compile]
        [--append FILE.md]

Code is Python's standard library, prose the topics of its manual (pydoc). Channels are chosen on
some files and topics; perplexity is measured on others. "active" is the share of the dense model's
parameters that a token uses: of feed-forward layers, of all but the embeddings, and of all. It
includes the router, but not experts that the token is not sent to. "to their own" is the share of
held-out tokens that the router sends to the expert of their domain.

With --train, the last row is trained to reproduce the dense model's next-token distributions on the
calibration text and measured again; with --compile, it is timed against the dense model.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import shlex
import statistics
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from datetime import date
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from moec.runtime.process.threads import set_threads

THREADS = set_threads()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import moec  # noqa: E402
from benchmarks.models.smollm2 import FILE, load  # noqa: E402
from moec.dtypes import FLOATS  # noqa: E402
from moec.ir.graph import Program  # noqa: E402
from moec.ir.interpret.graph_module import GraphModule  # noqa: E402
from moec.passes.approximate.feedforward import feedforwards  # noqa: E402
from moec.passes.approximate.refactor_dense import RefactorDense  # noqa: E402
from moec.passes.calibration.data import load_calibration  # noqa: E402
from moec.passes.calibration.evaluator import Evaluator  # noqa: E402
from moec.passes.core.runner import Log  # noqa: E402
from moec.passes.specialise.hoist_routers import split  # noqa: E402

LENGTH, WINDOWS = 256, 4
CHOSEN_ON = ("argparse.py", "tarfile.py", "logging/__init__.py")
HELD_OUT = ("http/client.py", "urllib/parse.py")
RATE, BATCH = 3e-4, 2

Texts = Mapping[str, Mapping[str, Tensor]]


def texts(tokenizer: Any) -> tuple[Texts, Texts]:
    """By domain, i64[WINDOWS, LENGTH]: texts to choose channels on, and held-out texts."""
    root, names = Path(sysconfig.get_path("stdlib")), sorted(topics)

    def windows(text: str) -> dict[str, Tensor]:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        starts = torch.linspace(0, len(ids) - LENGTH, WINDOWS).long()
        return {"input_ids": torch.stack([ids[start : start + LENGTH] for start in starts])}

    def both(files: tuple[str, ...], first: int) -> Texts:
        code = "\n".join((root / name).read_text(encoding="utf-8") for name in files)
        prose = "\n".join(topics[name] for name in names[first::2])
        return {"code": windows(code), "prose": windows(prose)}

    return both(CHOSEN_ON, 0), both(HELD_OUT, 1)


def active(program: Program) -> tuple[int, int, int]:
    """How many parameters a token uses: of feed-forward layers, of all but embeddings, of all."""
    shares = {value: 1.0 for value in program.graph.params}
    layers = set()
    for op in program.graph.ops:
        if op.name == "moe.experts":
            shares |= dict.fromkeys(op.inputs[2:], 1 / op.inputs[1].shape[0])
            layers |= set(op.inputs[2:])
        if ".mlp" in op.origin:
            layers |= shares.keys() & set(op.inputs)
    tables = {op.inputs[0] for op in program.graph.ops if op.name == "aten.embedding.default"}
    counts = {
        v: share * program.weights[v.name].numel()
        for v, share in shares.items()
        if v.dtype in FLOATS and "inv_freq" not in v.name  # a buffer
    }
    kinds = (layers, shares.keys() - tables, shares.keys())
    mlp, body, total = (round(sum(counts.get(v, 0) for v in kind)) for kind in kinds)
    return mlp, body, total


def refactored(program: Program, pass_: RefactorDense, evaluator: Evaluator) -> Program:
    """The program with all layers changed, without the per-layer measurements of `moec.compile`."""
    layers, stats = pass_.observe(program, evaluator, Log())
    for layer, one in zip(layers, stats, strict=True):
        program = pass_.change(program, layer, one).program
    return program


def perplexity(program: Program, evaluator: Evaluator) -> tuple[dict[str, float], float]:
    """The perplexity by domain, and the share of tokens that are sent to the expert of their
    domain."""
    routes = [op for op in program.graph.ops if op.name in ("moe.route", "moe.gate")]
    domains = list(dict.fromkeys(evaluator.calibration.domains))
    nats, predicted = dict.fromkeys(domains, 0.0), dict.fromkeys(domains, 0)
    right = count = 0
    cases = zip(evaluator.calibration.cases, evaluator.calibration.domains, strict=True)
    probes = [op.outputs[1] for op in routes]
    for (case, domain), result in zip(cases, evaluator.run(program, probes), strict=True):
        (ids,) = case
        scores = result[0].log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
        nats[domain] -= float(scores.sum())
        predicted[domain] += scores.numel()
        for chosen in result[1:]:
            right += int((chosen == domains.index(domain)).sum())
            count += chosen.numel()
    return {d: math.exp(n / predicted[d]) for d, n in nats.items()}, right / max(count, 1)


def trained(program: Program, dense: Any, data: Texts, structure: Any, steps: int) -> GraphModule:
    """The module after `steps` training steps towards the dense model's next-token
    distributions."""
    example = ((), {"input_ids": next(iter(data.values()))["input_ids"][:1]})
    floats = {v.name: True for v in program.graph.params if v.dtype in FLOATS}
    module = GraphModule(program, floats, example, structure)
    ids = torch.cat([one["input_ids"] for one in data.values()])
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        batch = ids[torch.randperm(len(ids), generator=generator)[:BATCH]]
        with torch.no_grad():
            expected = dense(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        result = module(input_ids=batch).logits.log_softmax(-1)
        loss = (expected.exp() * (expected - result)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module


def milliseconds(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median time of each call; the calls run in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(entry) for name, entry in times.items()}


def run(options: argparse.Namespace) -> None:
    model, tokenizer = load()
    data, other = texts(tokenizer)
    example = {"input_ids": data["code"]["input_ids"][:2, :7]}
    captured = moec.compile(model, kwargs=example, stop_after="split-packed")
    original = captured.pass_results[-1].program
    full = active(original)
    count = sum(1 for _ in feedforwards(original.graph, Log()))
    print(f"{FILE}: {full[2]:,} parameters, {full[0]:,} of them in {count} feed-forward layers")
    print(f"{WINDOWS} windows of {LENGTH} tokens a domain, torch {torch.__version__}")
    print(f"load average before: {os.getloadavg()[0]:.1f}\n")
    chosen_on, held_out = (
        Evaluator(original, load_calibration(d, original, {})) for d in (data, other)
    )
    print(f"{'':22}{'active parameters':^30}{'perplexity':^24}{'to their own':>14}")
    print(f"{'':22}{'layers':>8}{'no embedding':>14}{'all':>8}{'code':>12}{'prose':>12}")

    def row(name: str, program: Program) -> None:
        shares = "".join(
            f"{result / most:{size}.0%}"
            for result, most, size in zip(active(program), full, (8, 14, 8), strict=True)
        )
        perplexities, right = perplexity(program, held_out)
        last = "" if program is original else f"{right:14.0%}"
        values = "".join(f"{value:12.1f}" for value in perplexities.values())
        print(f"{name:22}{shares}{values}{last}", flush=True)

    row("dense", original)
    for keep in map(float, options.keep.split(",")):
        for by in ("random", "activation"):
            program = refactored(original, RefactorDense(keep=keep, by=by), chosen_on)
            row(f"{keep:g} by {by}", program)
    structure = captured.captured.structure
    module = trained(program, model, data, structure, options.train)
    if options.train:
        row(f"  after {options.train} steps", module.program)
        print(f"(steps of {BATCH} windows, towards the dense model's distributions)")
    hoisted = moec.compile(module, passes="+hoist-routers", build=False).pass_results[-1]
    ops = [op.name for op in hoisted.program.graph.ops]
    gates, sorts = (ops.count(name) for name in ("moe.gate", "moe.sort"))
    parts = split(hoisted.program)
    assert parts is not None
    print(f"\nhoisted: {gates} router and {sorts} sort of tokens for {len(parts.choices)} layers")
    print(f"the router reads {', '.join(v.name for v in parts.route.graph.inputs)} alone")
    if options.compile:
        compare(model, module, example, other["code"]["input_ids"])


def compare(model: Any, module: GraphModule, example: Mapping[str, Tensor], ids: Tensor) -> None:
    """Compares the compiled module with the dense model."""
    dense = moec.compile(model, kwargs=example, kv_cache=False)
    compiled_model = moec.compile(module, passes="+hoist-routers", kv_cache=False)
    choices = compiled_model.routers(ids[:1])
    same = torch.equal(compiled_model.routed(choices, ids[:1]), compiled_model(ids[:1]))
    print(f"routers ahead, then the rest: the same bits as in one: {same}")
    for t in (1, LENGTH):
        calls: dict[str, Callable[[], Any]] = {
            "dense": partial(dense, ids[:1, :t]),
            "experts": partial(compiled_model, ids[:1, :t]),
            "router alone": partial(compiled_model.routers, ids[:1, :t]),
        }
        result = milliseconds(calls, 20 if t == 1 else 5)
        line = ", ".join(f"{name} {value:.2f} ms" for name, value in result.items())
        print(f"{t} tokens, {THREADS} threads: {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", default="0.3,0.5")
    parser.add_argument("--train", type=int, default=0, metavar="STEPS")
    parser.add_argument("--compile", action="store_true", help="time it beside the dense model")
    parser.add_argument("--append", type=Path, help="add what is printed to this Markdown file")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.append is None:
        run(options)
        return
    message = io.StringIO()
    with redirect_stdout(message):
        run(options)
    print(message.getvalue(), end="")
    words = sys.argv[1:]
    at = words.index("--append")
    command = shlex.join(
        ["python", "-m", "benchmarks.approximation.refactor_dense", *words[:at], *words[at + 2 :]]
    )
    body = textwrap.indent(message.getvalue(), "    ", lambda line: bool(line.strip()))
    with options.append.open("a", encoding="utf-8") as file:
        file.write(f"\n## SmolLM2-135M as experts for domains\n\n{date.today()}\n\n")
        file.write(f"    $ {command}\n{body}")


if __name__ == "__main__":
    main()
