"""What a recording of the routing costs: CPU time of one thread with and without it, in turn.

    python -m benchmarks.models.record_routing

Runs examples/tiny_moe: a prompt of 8 x 128 tokens, 24 tokens after each of four prompts, and 500
single steps of four texts, whose tenth percentiles are comparable on a busy machine too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import moec
from moec.runtime.call.executor import load, record_routing
from moec.runtime.process.threads import set_threads

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "tiny_moe" / "checkpoint"
PAIRS, STEPS = 24, 500


def seconds(model: moec.CompiledModel, run: Callable[[], object], recorded: bool) -> float:
    """CPU seconds of a run."""
    with model.record_routing() if recorded else nullcontext():
        start = time.process_time()
        run()
        return time.process_time() - start


def steps(model: moec.CompiledModel) -> tuple[float, float]:
    """CPU seconds of a step without and with a recording: the tenth percentile of `STEPS`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.moec"
        model.save(path)
        executor = load(path)
        caches = executor.new_caches(4, 64)
        rows, requests = np.arange(4)[:, None], executor.number_requests(4)
        times = np.empty((STEPS, 2))
        for step in range(-10, STEPS):
            counts = [np.full((4, 1), 5), np.full(4, step % 64), rows, np.zeros(4, np.int64)]
            for recorded in (0, 1):
                with record_routing(executor) if recorded else nullcontext():
                    start = time.process_time_ns()
                    executor.decode(counts, caches, requests, np.ones(4, np.int64))
                    times[step, recorded] = time.process_time_ns() - start
    plain, recorded = np.percentile(times, 10, axis=0) / 1e9
    return float(plain), float(recorded)


def main() -> None:
    import torch

    set_threads(1)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    text = "\n".join(path.read_text() for path in sorted((ROOT / "moec" / "plan").glob("*.py")))
    ids = torch.tensor(tokenizer.encode(text).ids[:1024]).reshape(8, 128)
    prompts = ids[:4, :16].tolist()
    model = moec.compile(CHECKPOINT, record_routing=True, verify=False)
    runs: dict[str, Callable[[], object]] = {
        "prefill": lambda: model(ids),
        "generation": lambda: model.generate(prompts, max_new_tokens=24),
    }
    print("| | without | recorded | least/least | median of pairs |")
    print("|---|---|---|---|---|")
    for name, run in runs.items():
        for warm in (False, True):
            seconds(model, run, warm)
        pairs = [(seconds(model, run, False), seconds(model, run, True)) for _ in range(PAIRS)]
        plain, recorded = (min(times) * 1e3 for times in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(
            f"| {name} | {plain:.2f} ms | {recorded:.2f} ms | {recorded / plain:.3f} | "
            f"{ratio:.3f} |"
        )
    plain, recorded = steps(model)
    print(f"| step | {plain * 1e3:.3f} ms | {recorded * 1e3:.3f} ms | {recorded / plain:.3f} | - |")


if __name__ == "__main__":
    main()
