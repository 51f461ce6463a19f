"""`moec.compare`: two artifacts, or a model and an artifact, beside each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import torch
from torch.nn.functional import kl_div

from moec.codegen.module_builder import as_array
from moec.dtypes import FLOATS
from moec.errors import InputError, UsageError
from moec.inspect.bench.contenders import compiled
from moec.inspect.bench.race import Load, race
from moec.inspect.comparison.comparison import ArtifactComparison, ComparedFact, OutputLine
from moec.inspect.exploration.explored_model import stored_weights, with_lines
from moec.ir.graph import Graph, Op, Value
from moec.model.compiled import CompiledModel
from moec.model.load import LoadedModel, load
from moec.model.stored import stored_graph
from moec.report.pass_graphs.table import GraphStep
from moec.report.quantisation import moved_lines, weight_formats
from moec.report.units import counted
from moec.runtime.arrays.tensor_files import read_tensors
from moec.runtime.checks import show_shape
from moec.runtime.dtypes import NUMPY
from moec.runtime.package import DECODE, MAIN, Port
from moec.runtime.process.temporary import temporary_folder
from moec.runtime.sizes.expressions import evaluate

Arrays = dict[str, Any]
Times = Mapping[str, Mapping[str, float]]
Results = dict[str, list[torch.Tensor]]
TOKENS, STEPS, ROUNDS, DRAWN = 256, 16, 10, 4
"""Tokens of a random text, steps and rounds that are timed, calls of a model without text."""
_MARGIN = 1 << 26  # bytes of graphs, samples and a tokenizer


def compare(
    a: CompiledModel | LoadedModel | Path | str,
    b: CompiledModel | LoadedModel | Path | str,
    inputs: Mapping[str, Any] | Path | None = None,
    *,
    prompt: str | None = None,
    prompt_tokens: int | None = None,
    time: bool = False,
) -> ArtifactComparison:
    """What two artifacts, or what moec.compile returned, hold and compute: formats of weights, ops
    and kernels, the distance of outputs and, where both were compiled with `record_routing`,
    choices of experts.

    Both run on `inputs` by name or in a file, on `prompt`, or on random values: of a language model
    `prompt_tokens` token ids. Their states are reset. With `time` they are timed in turn. B is
    described against A; what prevents a comparison of outputs is a note of the result.

    Raises InputError where A does not take the inputs, UsageError, and as `moec.load`.
    """
    if sum(option is not None for option in (inputs, prompt, prompt_tokens)) > 1:
        raise UsageError("inputs, a prompt and its tokens cannot be combined: give one of them")
    with ExitStack() as folders:
        models = [_loaded(each, folders) for each in (a, b)]
        if isinstance(inputs, Path):
            inputs = read_tensors(inputs, models[0].artifact.package.main.inputs)
        calls = [{n: as_array(v) if torch.is_tensor(v) else v for n, v in (inputs or {}).items()}]
        calls = _drawn(models[0], prompt, prompt_tokens) if inputs is None else calls
        result = _with_numbers(contents(*models), models, calls)
        times: Times = {}
        if time and inputs is None and all(m.artifact.package.generation for m in models):
            times = _text_times(models, prompt_tokens)
        elif time and result.inputs:
            times = _call_time(models, calls[0])
        return replace(result, times=times)


def _loaded(model: CompiledModel | LoadedModel | Path | str, folders: ExitStack) -> LoadedModel:
    """A compiled model from a temporary artifact, which `folders` removes."""
    if isinstance(model, CompiledModel):
        package, name = model.ready()[0], model.source.name.replace("/", "-")
        size = sum(array.nbytes for array in package.arrays.values()) + len(package.library)
        path = folders.enter_context(temporary_folder(size + _MARGIN)) / name
        model.save(path)
        model = path
    return model if isinstance(model, LoadedModel) else load(model)


def _text_port(model: LoadedModel) -> Port | None:
    """The token ids of a model that continues text."""
    main, text = model.artifact.package.main, model.artifact.package.generation
    return next((p for p in main.inputs if text and p.name in main.index_ranges), None)


def _drawn(model: LoadedModel, prompt: str | None, tokens: int | None) -> list[Arrays]:
    """A text, or else calls with random floats and ids at the sizes of the artifact's sample, whose
    other inputs they take. Raises InputError where it has none, or takes no text but is to."""
    main, text = model.artifact.package.main, _text_port(model)
    if text is None and (prompt, tokens) != (None, None):
        raise InputError(f"{model.path} continues no text: leave out the prompt and its tokens")
    example = next((dict(sample.inputs) for sample in model.artifact.samples), {})
    ids = None if prompt is None else model.tokenizer.encode(prompt)
    sizes: dict[Any, int] = {}
    for port in main.inputs:
        if port.name in example:
            sizes |= zip(port.shape, example[port.name].shape, strict=True)
        elif port != text:
            raise InputError(f"{model.path} stores no sample of {port.name}: give the inputs")
    if text is not None and (generation := model.artifact.package.generation):
        most = generation.longest or TOKENS
        sizes |= dict.fromkeys(text.shape[:-1], 1)
        sizes[text.shape[-1]] = len(ids) if ids is not None else tokens or min(TOKENS, most)
    draw = np.random.default_rng(0)

    def value(port: Port) -> Any:
        shape = [evaluate(size, sizes) or 0 for size in port.shape]
        low, high = main.index_ranges.get(port.name, ("", ""))
        if port == text and ids is not None:
            return np.reshape(ids, shape)
        if isinstance(low, int) and isinstance(high, int):
            return draw.integers(low, high + 1, shape)
        drawn = port.dtype in FLOATS
        return draw.standard_normal(shape) if drawn else np.resize(example[port.name], shape)

    each = range(DRAWN if text is None else 1)
    return [{p.name: value(p).astype(NUMPY[p.dtype]) for p in main.inputs} for _ in each]


def _with_numbers(
    result: ArtifactComparison, models: Sequence[LoadedModel], calls: Sequence[Arrays]
) -> ArtifactComparison:
    """With outputs and routing, or a note that says why they are not compared."""
    layers = [model.artifact.package.recorded for model in models]
    record = bool(layers[0]) and layers[0] == layers[1]
    results: list[Results] = []
    choices = []
    for model in models:
        results.append({})
        try:
            with model.record_routing() if record else nullcontext() as recorder:
                for inputs in calls:
                    model.reset()
                    for name, array in sorted(model.executor(inputs).items()):
                        parts = array.view(np.float32) if array.dtype.kind == "c" else array
                        rows = torch.tensor(np.atleast_2d(parts).astype(np.float32))
                        results[-1].setdefault(name, []).append(rows)
        except InputError as error:
            if model is models[0]:
                raise
            return replace(result, notes=(f"outputs are not compared: B refuses inputs: {error}",))
        choices += [np.sort(recorder.trace().ids, -1)] if recorder else []  # [T, L, k]
    one, two = ("; ".join(n + show_shape(r[0].shape) for n, r in each.items()) for each in results)
    if one != two:
        return replace(result, notes=(f"outputs are not compared: A has {one}, and B {two}",))
    same = []
    if choices and choices[0].shape == choices[1].shape:
        same = (choices[0] == choices[1]).all(-1).mean(0).tolist()
    shapes = "; ".join(name + show_shape(np.shape(array)) for name, array in calls[0].items())
    return replace(
        result,
        inputs=f"{len(calls)} x {shapes}",
        outputs=tuple(_output_lines(models[0], *results)),
        routing=dict(zip((layer.layer for layer in layers[0]), same, strict=False)),
    )


def _output_lines(model: LoadedModel, a: Results, b: Results) -> Iterator[OutputLine]:
    """The outputs of `model`, whose results are `a`, beside those of another."""
    main, text = model.artifact.package.main, _text_port(model)
    fits = (port.name for port in main.outputs if text and port.shape[:-1] == text.shape)
    scores = next(fits, None)  # a model may return hidden states after them
    for line in moved_lines(list(a), *(zip(*r.values(), strict=True) for r in (a, b))):
        ours, theirs = (torch.cat([t.flatten(0, -2) for t in r[line.output]]) for r in (a, b))
        apart = bool(ours.isnan().any()) or not torch.equal(ours.isfinite(), theirs.isfinite())
        line = replace(line, error=math.inf) if apart else line
        top = ours.topk(min(2, ours.shape[-1])).values
        other = ours.gather(-1, theirs.argmax(-1, keepdim=True))[:, 0]
        margin, gap = float((top[:, 0] - other).max()), float((top[:, 0] - top[:, -1]).median())
        p, q = (t.clamp(min=-1e30).log_softmax(-1) for t in (ours, theirs))
        nats = kl_div(q, p, reduction="batchmean", log_target=True).clamp(min=0)
        kl = nats.item() if line.output == scores else None
        yield OutputLine(**asdict(line), margin=margin, gap=gap, kl=kl)


def _text_times(models: Sequence[LoadedModel], tokens: int | None) -> Times:
    """Prefill of random tokens, and steps of one token, of models that continue text."""
    limits = [g for m in models if (g := m.artifact.package.generation)]
    longest = min(limit.longest or 1 << 30 for limit in limits)
    prompt = min(tokens or TOKENS, max(1, longest - STEPS))
    load = Load(1, prompt, min(STEPS, longest - prompt), min(limit.vocabulary for limit in limits))
    each = [replace(compiled(m.executor), name=n) for m, n in zip(models, "AB", strict=True)]
    a, b = race(each, load, ROUNDS)
    prefill = _quotient(a.prefill, b.prefill)
    return {f"prefill of {prompt}": prefill, "decode step": _quotient(a.decode, b.decode)}


def _call_time(models: Sequence[LoadedModel], inputs: Arrays) -> Times:
    calls = [partial(timeit, partial(m.executor, inputs), setup=m.reset, number=1) for m in models]
    turns = [[call() for call in calls] for _ in range(ROUNDS + 1)][1:]  # the first warms up
    return {"call": _quotient(*zip(*turns, strict=True))}


def _quotient(a: Sequence[float], b: Sequence[float]) -> Mapping[str, float]:
    low, ratio, high = np.quantile(np.divide(b, a), (0.25, 0.5, 0.75)).tolist()
    one, two = (1e3 * float(np.median(seconds)) for seconds in (a, b))
    return {"a": one, "b": two, "ratio": ratio, "low": low, "high": high}


Graphs = Mapping[str, Graph]
Steps = tuple[GraphStep, ...]
COMPLETE = (  # also if equal
    "artifact", "target", "blocks", "functions", "error against eager", "format", "bytes",
)  # fmt: skip


def contents(a: LoadedModel, b: LoadedModel) -> ArtifactComparison:
    """Of two models that did not run. Raises ArtifactError where a graph is malformed."""
    graphs = [
        {n: stored_graph(m.path, n, t) for n, t in m.artifact.graphs.items() if n in (MAIN, DECODE)}
        for m in (a, b)
    ]
    one, two = _properties(a, graphs[0]), _properties(b, graphs[1])
    steps = {name: _steps((a, b), graphs, name) for name in dict.fromkeys((*graphs[0], *graphs[1]))}
    facts = tuple(
        ComparedFact(subject, name, ours.get(name), theirs.get(name))
        for subject in dict.fromkeys((*one, *two))
        for ours, theirs in [(one.get(subject, {}), two.get(subject, {}))]
        for name in dict.fromkeys((*ours, *theirs))
        if subject in COMPLETE or ours.get(name) != theirs.get(name)
    )
    altered = _altered(a, b, weight_formats(graphs[0][MAIN]).get("experts", {}))
    return ArtifactComparison(facts, altered, graphs=steps)


def _steps(models: Sequence[LoadedModel], graphs: Sequence[Graphs], name: str) -> Steps:
    """The graphs of one function, with lines."""
    lined = [
        with_lines(of[name], model.artifact.package.calls.get(name, ()))
        for model, of in zip(models, graphs, strict=True)
        if name in of
    ]
    sides = [side for side, of in zip("AB", graphs, strict=True) if name in of]
    shown = lined if len(lined) < 2 else aligned(*lined)
    return tuple(GraphStep(side, graph) for side, graph in zip(sides, shown, strict=True))


def _properties(model: LoadedModel, graphs: Mapping[str, Graph]) -> dict[str, dict[str, Any]]:
    """Values by subject and name."""
    manifest, package = model.artifact.manifest, model.artifact.package
    report = model.report()
    blocks = report.blocks
    choices = sorted({f"{block.top_k} of {block.experts}" for block in blocks})
    formats, parts = weight_formats(graphs[MAIN]), Counter[str]()
    for weight in stored_weights(manifest.arrays, graphs[MAIN]):
        parts[weight.kind] += weight.bytes
    for name, part in manifest.parts.items():
        parts[f"{name.partition('/')[0]}/"] += part.size
    return {
        "artifact": {"": model.path.name},
        "target": {"": manifest.target_name},
        "blocks": {"": ", ".join([counted(len(blocks), "MoE block"), *choices])},
        "functions": {"": ", ".join(package.functions)},
        "error against eager": {line.output: f"{line.error:.2g}" for line in report.verification},
        "format": {kind: ", ".join(sorted(set(of.values()))) for kind, of in formats.items()},
        "bytes": parts,
        **{f"ops of {n}": Counter(op.name for op in g.ops) for n, g in graphs.items()},
        "kernels": Counter(kernel for _, kernel in package.kernels),
        "sizes": {n: f"{low} to {high or 'any'}" for n, (low, high) in package.main.sizes.items()},
    }


def _altered(a: LoadedModel, b: LoadedModel, stacks: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The arrays of one dtype and shape whose digests differ; of stacks, the experts that do."""
    one, two = a.artifact, b.artifact
    lines: dict[str, tuple[int, ...]] = {}
    for name in sorted(one.manifest.arrays.keys() & two.manifest.arrays.keys()):
        x, y = one.manifest.arrays[name], two.manifest.arrays[name]
        digests = one.manifest.parts[x.part].sha256, two.manifest.parts[y.part].sha256
        if (x.dtype, x.shape) == (y.dtype, y.shape) and digests[0] != digests[1]:
            lines[name] = ()
            if name.removesuffix(".packed").partition("+")[0] in stacks:  # or several in one array
                rows = zip(one.package.arrays[name], two.package.arrays[name], strict=True)
                lines[name] = tuple(
                    e for e, (p, q) in enumerate(rows) if p.tobytes() != q.tobytes()
                )
    return lines


def aligned(a: Graph, b: Graph) -> tuple[Graph, Graph]:
    """Both with the lines of either, and `b` with the names of `a` for the results of ops in the
    same place: passes number values, and one more would make all later ones differ.

    In the same place are ops of one name, module and types in a longest common sequence, and the
    ops of one that as many of the other replace, if their types are equal.
    """
    names: dict[Value, str] = {}
    lines: dict[Op, str] = {}
    one, two = ([(op.origin, op.name, _types(op)) for op in graph.ops] for graph in (a, b))
    for _, i, j, k, end in SequenceMatcher(None, one, two, autojunk=False).get_opcodes():
        if j - i != end - k:
            continue
        for x, y in zip(a.ops[i:j], b.ops[k:end], strict=True):
            if _types(x) == _types(y):
                names |= {y.outputs[n]: value.name for n, value in enumerate(x.outputs)}
                if x.name == y.name:  # lines are those of kernels, and not all ops are in one
                    lines |= dict.fromkeys((x, y), x.line or y.line)
    return _changed(a, {}, lines), _changed(b, names, lines)


def _types(op: Op) -> tuple[str, ...]:
    return tuple(str(value.type) for value in op.outputs)


def _changed(graph: Graph, names: Mapping[Value, str], lines: Mapping[Op, str]) -> Graph:
    """The graph with other names and lines; a name that another value gets has a prime."""
    new = {value: value for value in (*graph.inputs, *graph.params)}
    used = {value.name for value in new}
    shared = set(names.values())
    ops = []
    for op in graph.ops:
        for value in op.outputs:
            name = names.get(value, value.name)
            while name in used or (value not in names and name in shared):
                name += "'"
            used.add(name)
            new[value] = replace(value, name=name)
        read, written = ([new[v] for v in values] for values in (op.inputs, op.outputs))
        line = lines.get(op, op.line)
        ops.append(replace(op, inputs=tuple(read), outputs=tuple(written), line=line))
    outputs = tuple(new[value] for value in graph.outputs)
    return replace(graph, ops=tuple(ops), outputs=outputs, states=())
