"""What a recording of the routing costs: CPU time of one thread with and without it, in turn.

    python benchmarks/record_routing.py

Runs examples/tiny_moe: a prompt of 8 x 128 tokens, and 24 tokens after each of four prompts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from tokenizers import Tokenizer

import moec
from moec.runtime.threads import set_threads

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "tiny_moe" / "checkpoint"
PAIRS = 24


def seconds(model: moec.CompiledModel, run: Callable[[], object], recorded: bool) -> float:
    """CPU seconds of a run."""
    with model.record_routing() if recorded else nullcontext():
        start = time.process_time()
        run()
        return time.process_time() - start


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


if __name__ == "__main__":
    main()
