"""Plans made from one half of a real trace, replayed on the other half, against even routing.

    python -m benchmarks.plans.real_traces [--models tiny_moe,smollm2]

The routing of examples/tiny_moe and of the upcycled SmolLM2 (benchmarks/models/upcycle.py: experts
in four of 30 layers) is recorded on code, sources of Python's standard library, and on prose,
docstrings of it. The text is read in windows of 128 tokens, and its halves are of windows in random
order, or in the order of the files: then the second half is of other files than the first. Times
are predicted by the simulator; the routing is recorded. The eight devices have memory for all dense
weights and 0.3 of the experts (assumed).
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor
from transformers import AutoTokenizer

import moec
from benchmarks.plans.replay import simulate
from benchmarks.records import add_record_options, record_if_asked
from moec.plan.inputs.files import Quantity
from moec.plan.inputs.model import Layers, Model, read_model
from moec.plan.inputs.workload import Workload, normalised, of_distribution
from moec.plan.network.cluster import Cluster, read_cluster
from moec.plan.search.planner import Planner
from moec.plan.simulation.simulate import of_trace
from moec.runtime.call.routing_trace import RoutingTrace, of_ids

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe" / "checkpoint"
STDLIB = Path(sysconfig.get_path("stdlib"))
FILES = ("argparse.py", "tarfile.py", "inspect.py", "difflib.py", "statistics.py", "subprocess.py",
         "turtle.py", "decimal.py", "_pydecimal.py", "unittest/mock.py")  # fmt: skip
LENGTH, ROOM = 128, 0.3
WORK = Workload(tokens=4096, sequences=0, context=0, compute="f32")


@dataclass(frozen=True)
class Case:
    """The sizes of a model, its tokenizer, the number of tokens of each text, and what records the
    routing of ids [B, S]."""

    record: Callable[[Tensor], RoutingTrace]
    sizes: Model
    tokenizer: Any
    tokens: int


def tiny_moe() -> Case:
    compiled = moec.compile(CHECKPOINT, record_routing=True, verify=False)
    sizes = replace(read_model(str(CHECKPOINT)), name="tiny_moe", weights="f32")

    def record(ids: Tensor) -> RoutingTrace:
        with compiled.record_routing() as routing:
            for part in ids.split(8):
                compiled(part)
        return routing.trace()

    return Case(record, sizes, AutoTokenizer.from_pretrained(CHECKPOINT), 16_384)


def smollm2() -> Case:
    from benchmarks.models.smollm2 import load
    from benchmarks.models.upcycle import EXPERTS, LAYERS, K, upcycle

    torch.manual_seed(0)
    model, tokenizer = load()
    upcycle(model, tokenizer)
    c = model.config
    width, head = c.hidden_size, c.hidden_size // c.num_attention_heads
    attention = 2 * width * head * (c.num_attention_heads + c.num_key_value_heads)
    same = {
        "attention": attention, "heads": c.num_attention_heads, "head_width": head,
        "kv_heads": c.num_key_value_heads, "kv_values": 2 * c.num_key_value_heads * head,
    }  # fmt: skip
    layers = tuple(
        Layers(**same, experts=EXPERTS, k=K, hidden=c.intermediate_size)
        if number in LAYERS
        else Layers(**same, dense_hidden=c.intermediate_size)
        for number in range(c.num_hidden_layers)
    )
    sizes = Model(
        name="smollm2", width=width, weights="f32", vocabulary=c.vocab_size, layers=layers
    )

    def record(ids: Tensor) -> RoutingTrace:
        """By hooks of the routers in eager mode: to compile the model takes longer than to run it
        once."""
        chosen: dict[int, list[Tensor]] = {number: [] for number in LAYERS}

        def watch(number: int) -> Any:
            return lambda _, inputs, logits: chosen[number].append(logits.topk(K).indices)

        routers = [(number, model.model.layers[number].mlp.router) for number in LAYERS]
        handles = [router.register_forward_hook(watch(number)) for number, router in routers]
        with torch.no_grad():
            for part in ids.split(4):
                model.model(part)
        for handle in handles:
            handle.remove()
        return of_ids(torch.stack([torch.cat(chosen[n]) for n in LAYERS], 1).numpy(), EXPERTS)

    return Case(record, sizes, tokenizer, 3072)


MODELS: dict[str, Callable[[], Case]] = {"tiny_moe": tiny_moe, "smollm2": smollm2}


def texts() -> dict[str, str]:
    sources = [(STDLIB / name).read_text(encoding="utf-8") for name in FILES]
    return {
        "code": "\n".join(sources),
        "prose": "\n\n".join(text for source in sources for text in docstrings(source)),
    }


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def recorded(case: Case, text: str) -> RoutingTrace:
    ids = torch.tensor(case.tokenizer(text, verbose=False)["input_ids"][: case.tokens])
    return case.record(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH))


def small(model: Model) -> Cluster:
    """Eight devices with memory for the dense weights, buffers and `ROOM` of the experts."""
    box = read_cluster("two-sockets")
    level = replace(box.levels[0], joins=8)
    cluster = replace(box, name="8 small devices", levels=(level,))
    layers = model.each_layer
    needed = sum(
        model.dense_parameters(layer) + ROOM * layer.experts * model.expert_parameters(layer)
        for layer in layers
    )
    nothing = Quantity(0.0, "assumed")
    device = replace(cluster.device, memory=nothing, reserved=nothing)
    even = of_distribution("uniform", [layer.experts for layer in layers])
    rest = -Planner(model, replace(cluster, device=device), WORK, even, "").cost.memory_limit
    memory = Quantity(needed * model.bytes_per_weight + rest, "assumed")
    return replace(cluster, device=replace(device, memory=memory))


def shuffled(trace: RoutingTrace) -> RoutingTrace:
    """The windows of a trace in random order."""
    order = np.random.default_rng(0).permutation(trace.tokens // LENGTH)
    tokens = (order[:, None] * LENGTH + np.arange(LENGTH)).reshape(-1)
    arrays = (trace.ids, trace.step, trace.phase, trace.request)
    return RoutingTrace(*(array[tokens] for array in arrays), trace.experts)


def row(text: str, order: str, case: Case, trace: RoutingTrace) -> dict[str, str | int]:
    model, cluster = case.sizes, small(case.sizes)
    first, second = trace.halves()
    counts = [normalised(count.astype(float)) for count in first.counts()]
    later = [normalised(count.astype(float)) for count in second.counts()]
    drift = max(float(abs(a - b).sum() / 2) for a, b in zip(counts, later, strict=True))
    experts = [layer.experts for layer in model.each_layer]
    even = of_distribution("uniform", experts)
    parts = iter(counts)
    loads = tuple(next(parts) if e else none for e, none in zip(experts, even, strict=True))
    planners = (
        Planner(model, cluster, WORK, loads, text, trace=first),
        Planner(model, cluster, WORK, even, ""),
    )
    ours, other = (simulate(p.best(), planners[0].cost, of_trace(second)) for p in planners)
    return {
        "text": text,
        "halves": order,
        "tokens": trace.tokens,
        "drift": f"{drift:.3f}",
        "plan of a half": f"{ours.seconds * 1e3:.3f} ms",
        "even routing": f"{other.seconds * 1e3:.3f} ms",
        "gain": f"{1 - ours.seconds / other.seconds:.1%}",
        "busiest/mean": f"{max(layer.imbalance for layer in ours.layers):.2f}",
        "of even routing": f"{max(layer.imbalance for layer in other.layers):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny_moe,smollm2")
    add_record_options(parser, "predicted")
    options = parser.parse_args()
    for name in options.models.split(","):
        case = MODELS[name]()
        rows = []
        for kind, text in texts().items():
            trace = recorded(case, text)
            for order, ordered in (("random", shuffled(trace)), ("files", trace)):
                rows.append(row(kind, order, case, ordered))
                print(name, rows[-1], flush=True)
        record_if_asked(options, "plan-traces", name, rows, "8 devices, float32")


if __name__ == "__main__":
    main()
