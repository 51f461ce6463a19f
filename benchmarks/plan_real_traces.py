"""Plans made from one half of a real trace, replayed on the other half, against even routing.

    python benchmarks/plan_real_traces.py

Traces are recorded from examples/tiny_moe on code (the sources of this project) and on prose (its
documentation). Times are predicted by the simulator; the routing is measured.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

import moec
from moec.plan.cluster import Cluster, read_cluster
from moec.plan.model import read_model
from moec.plan.planner import Planner
from moec.plan.popularity import normalised, of_distribution
from moec.plan.simulate import of_trace, simulate
from moec.plan.workload import Workload
from moec.runtime.routing_trace import RoutingTrace

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "tiny_moe" / "checkpoint"
TEXTS = {"code": ("moec/plan", "*.py"), "prose": (".", "*.md")}
TOKENS, LENGTH = 16_384, 128


def main() -> None:
    print("| text | tokens | drift | plan of a half | even routing | gain |")
    print("|---|---|---|---|---|---|")
    for name in TEXTS:
        row(name, recorded(name))


def recorded(name: str) -> RoutingTrace:
    folder, pattern = TEXTS[name]
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    text = "\n".join(path.read_text() for path in sorted((ROOT / folder).glob(pattern)))
    ids = torch.tensor(tokenizer.encode(text).ids[:TOKENS])
    ids = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    model = moec.compile(CHECKPOINT, record_routing=True, verify=False)
    with model.record_routing() as routing:
        for part in ids.split(8):
            model(part)
    return routing.trace()


def row(name: str, trace: RoutingTrace) -> None:
    model, cluster = read_model(str(CHECKPOINT)), small()
    first, second = trace.halves()
    loads = tuple(normalised(count.astype(float)) for count in first.counts())
    later = [normalised(count.astype(float)) for count in second.counts()]
    drift = max(float(abs(a - b).sum() / 2) for a, b in zip(loads, later, strict=True))
    work = Workload(tokens=4096, sequences=0, context=0, compute="f32")
    even = of_distribution("uniform", [layer.experts for layer in model.each_layer])
    planners = [Planner(model, cluster, work, load, name) for load in (loads, even)]
    times = [simulate(p.best(), planners[0].cost, of_trace(second)).seconds * 1e3 for p in planners]
    print(
        f"| {name} | {trace.tokens} | {drift:.3f} | {times[0]:.3f} ms | {times[1]:.3f} ms | "
        f"{1 - times[0] / times[1]:.1%} |"
    )


def small() -> Cluster:
    """Eight devices too small to hold all experts of the model (assumed numbers)."""
    import msgspec

    box = read_cluster("two-sockets")
    device = msgspec.structs.replace(
        box.device,
        memory=msgspec.structs.replace(box.device.memory, value=2.2e6),
        reserved=msgspec.structs.replace(box.device.reserved, value=0.0),
    )
    level = msgspec.structs.replace(box.levels[0], joins=8)
    return msgspec.structs.replace(box, name="8 small devices", device=device, levels=(level,))


if __name__ == "__main__":
    main()
