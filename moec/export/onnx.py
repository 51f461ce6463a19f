"""Writes a compiled model as an ONNX file, which is run and compared before it is published."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import torch

from moec.codegen.onnx import file
from moec.codegen.onnx.lower import MOE_FORMS, OnnxGraph, block_of, lower
from moec.codegen.onnx.profiles import Profile, check_dtypes, opset_of, profile_of
from moec.errors import SetupError, TargetError, UsageError, VerificationError
from moec.export import kv_cache
from moec.export.checkpoint import Transformed
from moec.ir.formats.notation import WIDE_ROWS, parse_parts
from moec.ir.graph import Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.ops.experts.dispatch import SORTS
from moec.oracle.tolerance import computed_dtypes
from moec.passes.core.runner import run
from moec.pipeline import quantising
from moec.report.data import MovedLine
from moec.report.quantisation import quantised_lines, with_exact_rows
from moec.verify import check as checking
from moec.verify.cases import references

if TYPE_CHECKING:
    from onnx import ModelProto


UNASKED = (
    f"{WIDE_ROWS} cannot be written in standard operators: ONNX Runtime rounds the rows of such a "
    'file to 8 bits, unless session.qdq_matmulnbits_accuracy_level is "1" in its options'
)


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    `forms` has by block "rows" (sorted rows, one product per expert and projection) or "op"
    (com.microsoft.MoE, or QMoE for quantised experts). `errors` has the error of each output
    against eager, and `parity` by block the share of tokens that chose the same experts; both are
    empty where the file was not run, and `notes` have the reason. If `quant` is a format, both
    compare with the quantised weights in float32, and `moved` has the distance of each output from
    that of the unquantised model. `caches` is the number of layers with past
    keys and values as inputs and present ones as outputs; 0 for a file without a cache.
    """

    path: str
    ep: str
    opset: int
    nodes: int
    moe_nodes: int
    bytes: int
    forms: Mapping[str, str]
    errors: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 0.0
    parity: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    quant: str = ""
    moved: tuple[MovedLine, ...] = ()
    caches: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(
    model: Transformed,
    path: Path | str,
    ep: str = "cpu",
    quant: str | None = None,
    opset: int | None = None,
    *,
    moe: str = "auto",
    cache: bool | None = None,
    tolerance: float | None = None,
    verify: bool = True,
    progress: Callable[[str], None] = lambda phase: None,
) -> Exported:
    """See `moec.model.compiled.CompiledModel.export_onnx`."""
    profile, number, path = profile_of(ep), opset_of(opset), _path(path)
    if moe not in MOE_FORMS:
        raise UsageError(f"moe is {moe!r}: choose {', '.join(MOE_FORMS)}")
    if moe == "op" and not profile.contrib:
        raise UsageError(
            f'com.microsoft.MoE is no standard operator: with ep="{ep}" leave out moe="op"'
        )
    pass_result = model.pass_results[-1]
    if pass_result.stage is not Stage.GROUPED:
        raise UsageError(f"the passes stopped after {pass_result.name}: compile without stop_after")
    _check_example(model, verify)
    if quant is not None:
        model = _quantised(model, quant)
    format = model.quantised[0].format if model.quantised else ""
    unasked: tuple[str, ...] = ()
    if format:
        unasked = (UNASKED,) if WIDE_ROWS in format and not profile.contrib else ()
        model = _with_exact_rows(model, profile)
        pass_result = model.pass_results[-1]
    check_dtypes(pass_result.program.graph, profile)
    progress("lower")
    content = kv_cache.content(model, cache)
    lowered = lower(content.program.graph, profile, number, moe)
    about = {
        "ep": ep,
        "version": version("moec"),
        "torch": torch.__version__,
        "model": model.name,
        "passes": list(dict.fromkeys(s.name for s in model.pass_results[1:])),
        "moe": lowered.forms,
        "sizes": {n: [b.low, b.high] for n, b in lowered.graph.bounds.items()},
        "caches": content.caches,
    }
    with tempfile.TemporaryDirectory(prefix=".moec-", dir=path.parent) as folder:
        # Under its final name, because the model contains the name of its data file.
        draft = Path(folder) / path.name
        progress("write")
        written = file.write(lowered, content.program.weights, draft, about)
        progress("check")
        onnx.checker.check_model(str(draft), full_check=True)
        exported = Exported(
            str(path), ep, number, **asdict(written), forms=lowered.forms, quant=format,
            caches=content.caches, notes=(*content.notes, *unasked),
        )  # fmt: skip
        if verify:
            progress("run")
            exported = _compared(
                model, content, lowered, profile, draft, about, exported, tolerance
            )
        _publish(draft, path)
    return exported


def _quantised(model: Transformed, text: str) -> Transformed:
    """The model with weights rounded to nearest, as `moec.compile(quant=...)` without `calib`."""
    if model.quantised:
        raise UsageError(
            f"{model.name} was compiled with quant={model.quantised[0].format!r}: "
            "export it without quant"
        )
    last = model.pass_results[-1]
    added = run(last.program, quantising(parse_parts(text)), stage=last.stage)[1:]
    pass_results = (*model.pass_results, *added)
    return replace(model, pass_results=pass_results, quantised=quantised_lines(pass_results))


def _with_exact_rows(model: Transformed, profile: Profile) -> Transformed:
    """The model as the reference for a file with quantised weights: rows are not rounded, because
    the runtime that opens the file decides how to round them."""
    if profile.name == "cuda":
        raise TargetError(
            'quant: QMoE and MatMulNBits were not tried in CUDA kernels: with ep="cuda" leave out '
            'quant, or choose ep="cpu" or "portable"'
        )
    pass_result = model.pass_results[-1]
    exact = replace(
        pass_result, program=with_exact_rows(pass_result.program, keep_row_bits=profile.contrib)
    )
    return replace(model, pass_results=(*model.pass_results[:-1], exact))


def _path(path: Path | str) -> Path:
    if not isinstance(path, Path | str):
        raise UsageError(f"{path!r} is not the path of a file: give text or a Path")
    path = Path(path)
    if path.suffix != ".onnx":
        raise UsageError(f"{path}: give the file a name that ends in .onnx")
    if path.is_dir():
        raise SetupError(f"{path} is a folder")
    if not path.parent.is_dir():
        raise SetupError(f"{path}: the folder {path.parent} does not exist")
    return path


def _check_example(model: Transformed, verify: bool) -> None:
    captured = model.captured
    if verify and not captured.example and captured.program.graph.inputs:
        raise UsageError(
            f"{model.name} holds no example inputs to compare with: give args, or verify=False"
        )


def _compared(
    model: Transformed,
    content: kv_cache.Content,
    lowered: OnnxGraph,
    profile: Profile,
    draft: Path,
    about: Mapping[str, Any],
    exported: Exported,
    tolerance: float | None,
) -> Exported:
    """The result after running the file on the CPU and comparing it with eager, for any `ep` whose
    operators have CPU kernels.

    Raises VerificationError where a number differs.
    """
    if "bf16" in computed_dtypes(lowered.graph):
        note = (
            "the file was checked but not run: ONNX Runtime's CPU kernels do not compute in "
            "bfloat16"
        )
        return replace(exported, notes=(*exported.notes, note))
    captured, pass_results, program = model.captured, model.pass_results, content.program
    try:
        opened, pieces = runner(open_session(draft)), None
        if content.caches:
            captured, pass_results = kv_cache.logits_alone(captured, pass_results)
            pieces = (
                program.graph.outputs[0].name,
                partial(kv_cache.feed_in_chunks, program, opened),
            )
            opened = kv_cache.at_once(program, opened)
        checked = checking.check(captured, opened, pass_results, tolerance, pieces, empty=False)
    except VerificationError as error:
        raise VerificationError(f"no file was written: in ONNX Runtime {error}") from error
    parity: dict[str, float] = {}
    if lowered.choices:
        traced = runner(open_session(draft, file.debug(lowered, draft, about)))
        cases = [case for case, _ in references(captured, empty=False)[0]]
        if content.caches:
            cases = kv_cache.cases(program, [ids for (ids,) in cases])
        parity = routing_parity(lowered, program, traced, cases)
    notes = exported.notes + checked.notes
    if profile.name == "cuda":
        notes += ("written for CUDA and checked on the CPU: no CUDA kernel was run",)
    return replace(
        exported,
        errors=checked.errors,
        tolerance=checked.tolerance,
        parity=parity,
        notes=notes,
        moved=checked.moved,
    )


def _publish(draft: Path, path: Path) -> None:
    """Publishes the data first: a model without its data is worse than data without a model."""
    data = draft.with_name(f"{draft.name}.data")
    target = path.with_name(data.name)
    if data.exists():
        data.replace(target)
    else:
        target.unlink(missing_ok=True)
    draft.replace(path)


# ---- the share of tokens that chose the same experts in the file as in eager ---------


Run = Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]]


def routing_parity(
    lowered: OnnxGraph, program: Program, run: Run, cases: Sequence[Sequence[torch.Tensor]]
) -> dict[str, float]:
    """The parity by block, over all tokens of all cases. `run` returns the ids of experts by the
    names in `lowered.choices`; they are compared with the graph in eager PyTorch. The order among a
    token's experts is ignored."""
    graph = program.graph
    ids = tuple(dict.fromkeys(value for value, _ in lowered.choices))
    names = dict(lowered.choices)
    traced = replace(graph, outputs=ids, states=())
    same = dict.fromkeys(ids, 0)
    tokens = dict.fromkeys(ids, 0)
    for case in cases:
        feeds = {v.name: tensor for v, tensor in zip(graph.inputs, case, strict=True)}
        choices = run(feeds)
        for value, expected in zip(ids, evaluate(traced, case, program.weights), strict=True):
            actual = choices[names[value]]
            equal = (actual.sort(-1).values == expected.sort(-1).values).all(-1)
            same[value] += int(equal.sum())
            tokens[value] += equal.numel()
    shares: dict[str, float] = {}
    for value in ids:
        sort = next(op for op in graph.readers[value] if op.name in SORTS)
        block = block_of(graph, sort)
        share = same[value] / tokens[value] if tokens[value] else 1.0
        shares[block] = min(share, shares.get(block, 1.0))
    return shares


Results = Mapping[str, torch.Tensor]


def open_session(path: Path, model: ModelProto | None = None) -> Any:
    """A session on the CPU for the file, or for `model`, whose weights are next to the file.

    Raises VerificationError where ONNX Runtime rejects it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    source: Any = str(path)
    if model is not None:
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, str(path.parent))
        source = model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise VerificationError(f"ONNX Runtime rejects the file: {_one_line(error)}") from error


def runner(session: Any) -> Callable[[Mapping[str, Any]], Results]:
    """A function that takes inputs by name, ignoring those that the file does not have.

    Raises VerificationError where ONNX Runtime fails.
    """
    inputs = {port.name for port in session.get_inputs()}
    outputs = [port.name for port in session.get_outputs()]

    def run(values: Mapping[str, Any]) -> Results:
        feeds = {k: np.ascontiguousarray(_array(v)) for k, v in values.items() if k in inputs}
        try:
            results = session.run(None, feeds)
        except Exception as error:
            shapes = ", ".join(f"{name} {feed.shape}" for name, feed in feeds.items())
            raise VerificationError(f"the file fails for {shapes}: {_one_line(error)}") from error
        return {
            name: torch.from_numpy(np.asarray(r)) for name, r in zip(outputs, results, strict=True)
        }

    return run


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _array(value: Any) -> Any:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value
