"""Read-ME's cache: the hit rate of an expert cache that knows routes in advance, by its size.

    python -m benchmarks.systems.read_me [--seeds 3] [--record FILE.jsonl]

The model is the small one of examples/systems/23_read_me.py: five experts for five kinds of text,
with a trained and hoisted router. 48 requests of 12 tokens are decoded in batches, and the trace of
their experts is replayed, as in table 4 of arXiv 2410.19123 (seven experts, Chatbot Arena). No time
is measured: the results depend only on the seeds.
"""

from __future__ import annotations

import argparse
import sys
from statistics import mean
from typing import Any

from benchmarks.systems.latency import examples

import torch  # isort: skip
from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.target.cpu import processor

POLICIES = ("random", "lru", "belady")
BUDGET = 8  # requests in a batch


def routes(example: Any, seed: int) -> list[list[int]]:
    """The expert of each token, one list per request."""
    torch.manual_seed(seed)
    _, model, _ = example.build(example.SMALL, steps=40)
    windows, _ = example.corpus(example.SMALL, 32)
    requests = windows[torch.randperm(len(windows))[:48], :12]
    with torch.no_grad():
        experts: list[list[int]] = model.router(requests).argmax(-1).tolist()
    return experts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    add_record_options(parser, processor())
    options = parser.parse_args()
    ((_, example),) = examples({23})
    traces = [routes(example, seed) for seed in range(options.seeds)]
    rows: list[dict[str, Cell]] = []
    for size in range(2, example.SMALL.domains):
        row: dict[str, Cell] = {"cached experts": size}
        for policy in POLICIES:
            shares = []
            for trace in traces:
                uses = [experts[t] for t in range(len(trace[0])) for experts in trace]
                shares.append(100 * example.cache_hits(uses, size, policy) / len(uses))
            row[f"{policy} %"] = round(mean(shares), 2)
        rows.append(row)
        print("  ".join(f"{key} {cell}" for key, cell in row.items()))
    last = [[experts[-1] for experts in trace] for trace in traces]
    in_order = [range(start, start + BUDGET) for start in range(0, len(last[0]), BUDGET)]
    counts = [
        mean(example.experts_per_batch(trace, batches(trace)) for trace in last)
        for batches in (lambda _: in_order, lambda t: example.batches_by_expert(t, BUDGET))
    ]
    conditions = "experts in a batch of {}: {:.2f} as they come, {:.2f} by expert".format(
        BUDGET, *counts
    )
    print(conditions)
    seeds = "one seed" if options.seeds == 1 else f"mean of {options.seeds} seeds"
    case = f"{example.SMALL.domains} experts, {seeds}"
    record_if_asked(options, "read-me-cache", case, rows, conditions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
