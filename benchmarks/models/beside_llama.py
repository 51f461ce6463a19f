"""A GGUF file by moec and by llama.cpp, beside its dequantised weights in float32 ("exact").

    $ moec compile FILE.gguf -o FILE.moec
    $ python -m benchmarks.models.beside_llama texts FILE.gguf FILE.moec
    $ python -m benchmarks.models.beside_llama logits FILE.gguf FILE.moec [FILE.gguf FILE.moec ...]

It needs llama-cpp-python. Texts and logits are of windows of Python's documentation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-untyped]
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch.nn import functional as F

import moec
from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.files.gguf import read_header
from moec.sources.checkpoint.gguf.model import configuration
from moec.sources.checkpoint.gguf.weights import map_gguf
from moec.sources.checkpoint.load import load_model
from moec.sources.checkpoint.table import GGUF
from moec.sources.memory.memory import InMemory
from moec.target.cpu import processor

TEXTS, TOKENS = 20, 64
WINDOWS, ROWS = 8, 64


def exact_model(path: Path) -> Any:
    """The model of transformers in float32 with the dequantised weights of a GGUF file."""
    header = read_header(path)
    fields = configuration(header)
    config = transformers.AutoConfig.for_model(**fields, dtype=torch.float32)
    weights = GGUF.read(fields, map_gguf(header))
    model, _ = load_model(transformers.AutoModelForCausalLM, config, weights, InMemory())
    return model.eval()


def llama(path: Path, room: int) -> Any:
    from llama_cpp import Llama

    options = {"n_threads": 2, "n_threads_batch": 2, "logits_all": True, "verbose": False}
    return Llama(str(path), n_ctx=room, n_batch=room, **options)


def windows(model: Any, count: int, length: int) -> list[list[int]]:
    """Token ids [count, length] of Python's documentation, evenly spaced."""
    ids = model.tokenizer.encode("\n".join(topics.values())[:400_000])
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [list(ids[start : start + length]) for start in starts]


def llama_logits(model: Any, ids: list[int], new: int = 0) -> NDArray[np.float32]:
    """[len(ids) + new, vocabulary], where `new` tokens are the likeliest ones."""
    model.reset()
    model.eval(ids)
    for _ in range(new):
        model.eval([int(model.scores[model.n_tokens - 1].argmax())])
    return np.array(model.scores[: len(ids) + new])


def exact_logits(model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    """[len(ids), vocabulary]"""
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0])


def compare_texts(path: Path, artifact: Path) -> Iterator[dict[str, Cell]]:
    """Greedy texts of TOKENS tokens after TEXTS prompts of as many, pair by pair. A gap is how much
    the exact model prefers one of the two tokens that first differ, in nats."""
    ours, exact, theirs = moec.load(artifact), exact_model(path), llama(path, 2 * TOKENS)
    prompts = windows(ours, TEXTS, TOKENS)
    greedy = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": None}
    texts = {
        "moec": [
            list(ours.generate([p], max_new_tokens=TOKENS, stop=[])[0])[-TOKENS:] for p in prompts
        ],
        "llama.cpp": [
            llama_logits(theirs, p, TOKENS)[TOKENS - 1 : -1].argmax(-1).tolist() for p in prompts
        ],
        "exact": exact.generate(torch.tensor(prompts), **greedy)[:, TOKENS:].tolist(),
    }
    for one, other in combinations(texts, 2):
        same, gaps = [], []
        for prompt, a, b in zip(prompts, texts[one], texts[other], strict=True):
            length = next((i for i in range(TOKENS) if a[i] != b[i]), TOKENS)
            same.append(length)
            if length < TOKENS:
                logits = exact_logits(exact, [*prompt, *a[:length]])[-1]
                gaps.append(float(abs(logits[a[length]] - logits[b[length]])))
        yield {
            "artifact": artifact.stem,
            "texts of": f"{one}, {other}",
            f"equal of {TEXTS}": sum(length == TOKENS for length in same),
            "median of equal tokens": statistics.median(same),
            "greatest gap": round(max(gaps, default=0.0), 3),
        }


def kl(p: NDArray[np.float32], q: NDArray[np.float32]) -> tuple[float, float]:
    """The mean and the median of the KL divergences of rows of logits, in nats."""
    log_p, log_q = (F.log_softmax(torch.from_numpy(x).double(), -1) for x in (p, q))
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return float(f"{rows.mean():.1e}"), float(f"{rows.median():.1e}")


def compare_logits(path: Path, artifact: Path) -> Iterator[dict[str, Cell]]:
    """The logits of WINDOWS prompts of ROWS tokens."""
    ours, exact, theirs = moec.load(artifact), exact_model(path), llama(path, ROWS)
    prompts = windows(ours, WINDOWS, ROWS)
    m = np.concatenate([np.asarray(ours(np.array([p])), np.float32)[0] for p in prompts])
    n = np.concatenate([llama_logits(theirs, p) for p in prompts])
    e = np.concatenate([exact_logits(exact, p) for p in prompts])
    row: dict[str, Cell] = {"artifact": artifact.stem}
    pairs = {"llama.cpp, moec": (n, m), "exact, moec": (e, m), "exact, llama.cpp": (e, n)}
    for names, pair in pairs.items():
        row[f"KL {names}"], row[f"median {names}"] = kl(*pair)
    yield row | {"same argmax %": round(100 * float((m.argmax(-1) == n.argmax(-1)).mean()), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["texts", "logits"])
    parser.add_argument("files", type=Path, nargs="+", help="a GGUF file and its artifact, in turn")
    add_record_options(parser, processor())
    options = parser.parse_args()
    rows: list[dict[str, Cell]] = []
    for path, artifact in zip(options.files[::2], options.files[1::2], strict=True):
        rows += (compare_texts if options.what == "texts" else compare_logits)(path, artifact)
        print(json.dumps(rows), flush=True)
    record_if_asked(options, "llama-cpp", options.what, rows, "2 threads")


if __name__ == "__main__":
    main()
