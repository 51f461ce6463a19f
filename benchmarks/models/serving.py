"""`moec serve` beside llama.cpp's server, under the loads of `moec bench --serve`.

$ python -m benchmarks.models.granite FOLDER --gguf --tokenizer SmolLM2.gguf
$ moec compile FOLDER/model -o bf16.moec
$ moec serve bf16.moec --threads 2 --slots 16 --context 320 --prefix-tokens 0 --port 8001 &
$ llama-server -m FOLDER/model-bf16.gguf -t 2 -tb 2 -np 16 -c 5120 --port 8002 --cache-ram 0 &
$ python -m benchmarks.models.serving http://127.0.0.1:8001/v1 http://127.0.0.1:8002/v1
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from statistics import median

from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.inspect.bench.clients import ServerLoad, measure
from moec.inspect.bench.served import Served, served
from moec.target.cpu import processor

PROMPT, NEW = 256, 64


def row(clients: int, rounds: Sequence[tuple[Served, Served]]) -> dict[str, Cell]:
    """Medians of the rounds; moec comes first in each."""
    ours, theirs = zip(*rounds, strict=True)
    ratio = median(a.tokens_per_second / b.tokens_per_second for a, b in rounds)
    return {
        "clients": clients,
        "moec tokens/s": round(median(s.tokens_per_second for s in ours), 1),
        "llama.cpp tokens/s": round(median(s.tokens_per_second for s in theirs), 1),
        "ratio": round(ratio, 2),
        "moec first token p95": round(median(s.first[1] for s in ours), 2),
        "llama.cpp first token p95": round(median(s.first[1] for s in theirs), 2),
        "failed": sum(s.failed for pair in rounds for s in pair),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("urls", nargs=2, help="that of moec, that of llama.cpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", default="bf16", help="what moec and llama.cpp compute in")
    add_record_options(parser, processor())
    options = parser.parse_args()
    rows, before = [], os.getloadavg()[0]
    for url in options.urls:
        measure(url, ServerLoad(2, PROMPT, NEW, clients=1))  # fills caches
    for clients in (1, 4, 8, 16):
        load = ServerLoad(max(4, clients), PROMPT, NEW, clients=clients)
        rounds = []
        for seed in (100 * clients + i for i in range(options.rounds)):  # no prompt comes twice
            one, other = (served(load, measure(url, load, seed=seed)) for url in options.urls)
            rounds.append((one, other))
        rows.append(row(clients, rounds))
        print(json.dumps(rows[-1]), flush=True)
    conditions = (
        f"max(4, clients) requests of {PROMPT} + {NEW} tokens, 2 threads; load average of two "
        f"cores {before:.1f} before, {os.getloadavg()[0]:.1f} after"
    )
    record_if_asked(options, "serving", options.case, rows, conditions)


if __name__ == "__main__":
    main()
