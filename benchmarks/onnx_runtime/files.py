"""Compares ONNX files of one model in ONNX Runtime, one call of each in turn.

    python -m benchmarks.onnx_runtime.files A.onnx B.onnx --tokens 1 8 64 512 --threads 2

Every file takes `input_ids` [B, S]. Other integer inputs are ones, and past keys and values are
empty: each call processes a whole text. The script prints the median of each file, and the first
file's median divided by it. Threads do not spin between calls, because spinning would slow down the
next file.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import numpy as np
import onnxruntime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each count of tokens")
    parser.add_argument("--vocabulary", type=int, default=1000)
    options = parser.parse_args()
    sessions = {name: session(name, options.threads) for name in options.files}
    random = np.random.default_rng(0)
    for tokens in options.tokens:
        times: dict[str, list[float]] = {name: [] for name in sessions}
        start = time.perf_counter()
        while time.perf_counter() - start < options.seconds or len(times[options.files[0]]) < 4:
            ids = random.integers(3, options.vocabulary, (1, tokens))
            for name, result in sessions.items():
                times[name].append(seconds(result, ids))
        medians = {name: median(rows[1:]) for name, rows in times.items()}  # no warm-up
        first = medians[options.files[0]]
        print(f"{tokens} tokens, {len(times[options.files[0]]) - 1} calls of each")
        for name, rows in medians.items():
            print(f"  {rows * 1e3:9.2f} ms  {first / rows:5.2f}x  {name}")


def session(name: str, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(name, options, providers=["CPUExecutionProvider"])


def seconds(result: Any, ids: Any) -> float:
    feeds = {inputs.name: value(inputs, ids) for inputs in result.get_inputs()}
    start = time.perf_counter()
    result.run(None, feeds)
    return time.perf_counter() - start


def value(inputs: Any, ids: Any) -> Any:
    if inputs.name == "input_ids":
        return ids
    if inputs.type == "tensor(int64)":
        return np.ones_like(ids)
    _, heads, _, width = inputs.shape  # keys or values [B, heads, past, width]
    return np.zeros((len(ids), heads, 0, width), np.float32)


if __name__ == "__main__":
    main()
