"""Contenders that run a file: ONNX Runtime and OpenVINO with an ONNX file that has past keys and
values as inputs and present ones as outputs, llama.cpp with a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from moec.errors import SetupError, UsageError
from moec.inspect.bench.contenders import Contender, Tokens
from moec.inspect.bench.names import PACKAGES, files_of

PAST, PRESENT = "past_key_values.", "present."


def of_files(names: Sequence[str], files: Sequence[Path], threads: int) -> list[Contender]:
    """A contender for each name in PACKAGES, with the file of the right kind.

    Raises UsageError where a file or a package is missing, or a file is superfluous.
    """
    return [_MAKE[name](file, threads) for name, file in files_of(names, files).items()]


@dataclass(frozen=True)
class _Engine:
    """A runtime of an ONNX file: its inputs by name, each with dtype and shape (None: any size)."""

    inputs: Mapping[str, tuple[np.dtype[Any], tuple[int | None, ...]]]
    run: Callable[[Mapping[str, Any]], Mapping[str, Any]]  # returns logits and present.*
    zeros: Callable[[np.ndarray[Any, Any]], Any]  # an array in the engine's form of caches
    logits: Callable[[Any], np.ndarray[Any, Any]]


@dataclass
class _WithPast:
    """Texts of one length; present keys and values are passed on as past ones without a copy."""

    engine: _Engine
    texts: int
    length: int = 0
    past: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (dtype, shape) in self.engine.inputs.items():
            if name.startswith(PAST):
                sizes = [self.texts, shape[1] or 0, 0, shape[3] or 0]
                self.past[name] = self.engine.zeros(np.zeros(sizes, dtype))

    def feed(self, tokens: Tokens) -> np.ndarray[Any, Any]:
        ids = np.array(tokens, dtype=np.int64)
        positions = np.arange(self.length, self.length + ids.shape[1])[None].repeat(self.texts, 0)
        self.length += ids.shape[1]
        mask = np.ones((self.texts, self.length), dtype=np.int64)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {n: self.engine.zeros(a) for n, a in inputs.items() if n in self.engine.inputs}
        outputs = self.engine.run({**feeds, **self.past})
        self.past = {n: outputs[PRESENT + n.removeprefix(PAST)] for n in self.past}
        return self.engine.logits(outputs["logits"])[:, -1]


def _check(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    pasts = [name for name in inputs if name.startswith(PAST)]
    presents = {PRESENT + name.removeprefix(PAST) for name in pasts}
    unknown = set(inputs) - set(pasts) - {"input_ids", "attention_mask", "position_ids"}
    if not pasts or not presents <= set(outputs) or "logits" not in outputs or unknown:
        raise SetupError(
            f"--file {path}: its inputs must be input_ids and past_key_values.*, its outputs "
            "logits and present.*, as in files that moec export or optimum write with a cache"
        )


def _onnxruntime(path: Path, threads: int) -> Contender:
    ort = _imported("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    _check(path, [value.name for value in session.get_inputs()], outputs)
    kinds = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
    inputs = {
        value.name: (
            np.dtype(kinds[value.type]),
            tuple(d if isinstance(d, int) else None for d in value.shape),
        )
        for value in session.get_inputs()
    }

    def run(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        return dict(zip(outputs, session.run_with_ort_values(outputs, dict(feeds)), strict=True))

    engine = _Engine(inputs, run, ort.OrtValue.ortvalue_from_numpy, lambda value: value.numpy())
    return Contender("onnxruntime", lambda texts, room: _WithPast(engine, texts))


def _openvino(path: Path, threads: int) -> Contender:
    ov = _imported("openvino")
    model = ov.Core().read_model(str(path))
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(model, "CPU", hints)
    outputs = [port.get_any_name() for port in compiled.outputs]
    _check(path, [port.get_any_name() for port in compiled.inputs], outputs)
    inputs = {
        port.get_any_name(): (
            np.dtype(port.get_element_type().to_dtype()),
            tuple(d.get_length() if d.is_static else None for d in port.get_partial_shape()),
        )
        for port in compiled.inputs
    }

    def run(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        request = compiled.create_infer_request()
        for name, tensor in feeds.items():
            request.set_tensor(name, tensor)
        request.infer()
        return {name: request.get_tensor(name) for name in outputs}

    engine = _Engine(inputs, run, ov.Tensor, lambda tensor: tensor.data)
    return Contender("openvino", lambda texts, room: _WithPast(engine, texts))


@dataclass
class _Llama:
    """One text, with llama.cpp's own cache and batching."""

    model: Any

    def feed(self, tokens: Tokens) -> np.ndarray[Any, Any]:
        self.model.eval(tokens[0])
        pointer = self.model._ctx.get_logits()
        return np.ctypeslib.as_array(pointer, (1, self.model.n_vocab()))


def _llama_cpp(path: Path, threads: int) -> Contender:
    library = _imported("llama_cpp", "llama.cpp")
    held: dict[int, Any] = {}

    def start(texts: int, room: int) -> _Llama:
        if texts != 1:
            raise UsageError("--baseline llama.cpp reads one text: leave out --batch")
        if room not in held:
            held[room] = library.Llama(
                str(path),
                n_ctx=room,
                n_batch=room,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        held[room].reset()
        return _Llama(held[room])

    return Contender("llama.cpp", start)


def _imported(module: str, name: str = "") -> Any:
    try:
        return import_module(module)
    except ImportError:
        package = PACKAGES[name or module]
        raise SetupError(
            f"--baseline {name or module} needs its package: pip install {package}"
        ) from None


_MAKE = {"onnxruntime": _onnxruntime, "openvino": _openvino, "llama.cpp": _llama_cpp}
