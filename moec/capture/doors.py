"""Opens a model: a module, an export, or the path of a checkpoint, a .pt2 file or a factory.

Each kind becomes a `Source`: a module or an export, with example arguments.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from moec.capture.auto_class import auto_class
from moec.capture.behaviour.door import Declared, Described, ModelExample, capture_described
from moec.capture.capture import capture
from moec.capture.captured import Captured
from moec.capture.earlier_calls.other_inputs import capture_stateless
from moec.capture.earlier_calls.two_runs import earlier_calls
from moec.capture.hub import hub_off, own_config
from moec.capture.pt2 import check_archive
from moec.checkpoint.adapters.merge import merge_adapters
from moec.checkpoint.arrange import ArrangedCodes, arrange
from moec.checkpoint.coverage import check_loading
from moec.checkpoint.gguf.model import configuration
from moec.checkpoint.gguf.rotary import divide_frequencies, frequency_factors
from moec.checkpoint.gguf.tokenizer import tokenizer_files
from moec.checkpoint.gguf.weights import dtype_of, map_gguf
from moec.checkpoint.load import check_config, load_model, memory_for
from moec.checkpoint.table import GGUF, format_of, quantization_of
from moec.checkpoint.tensors import map_folder
from moec.checkpoint.weight import in_few_bits
from moec.errors import CaptureError, MoecError, UsageError
from moec.files import hub_files
from moec.files.adapter import AdapterConfig, read_adapter
from moec.files.checkpoint import CONFIG, GENERATION_CONFIG, TOKENIZER_FILES
from moec.files.gguf import read_header
from moec.interpret.graph_module import GraphModule
from moec.ir.sizes.dims import Bounds
from moec.memory.memory import InMemory
from moec.model_path import kind_of_model
from moec.runtime.text.prompt import FOLDER, template_notes


@dataclass(frozen=True)
class Source:
    """A model with what is needed to call it. `files` are copied into the artifact. `unnamed` is
    True where the caller gave a folder and so named no class; the model's results then have the
    type that the artifact gives them. `notes` are for the report. `codes` reads the weights that
    the model's checkpoint stores in few bits. `memory` is where weights are: those of a large
    checkpoint have values only while `memory.reading()` is open."""

    model: torch.nn.Module | ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    name: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    unnamed: bool = False
    notes: tuple[str, ...] = ()
    codes: Callable[[], ArrangedCodes] | None = None
    memory: InMemory = field(default_factory=InMemory)


def capture_source(
    source: Source,
    dynamic_shapes: Any = None,
    allow_fixed: bool | str | Collection[str] = False,
    declared: Sequence[Declared] = (),
    observed: Sequence[Described] = (),
    constants: str | Collection[str] = (),
) -> Captured:
    """`capture` of a source, with the sizes of the source unless `dynamic_shapes` is given.

    Descriptions in `declared` are proved first; each one in `observed` replaces the modules that it
    was observed of. Raises UsageError where a graph is to be described or to have constants.
    """
    run = partial(
        capture,
        source.model,
        source.args,
        source.kwargs,
        dynamic_shapes=source.dynamic_shapes if dynamic_shapes is None else dynamic_shapes,
        bounds=source.bounds if dynamic_shapes is None else None,
        allow_fixed=allow_fixed,
        constants=constants,
    )
    if not traceable(source):
        if constants:
            raise UsageError(f"{source.name} is a graph already: it has no constant inputs")
        if declared:
            raise UsageError(f"{source.name} is a graph already: nothing is left to describe")
        return run()
    example = example_of(source)
    example.module.eval()
    captured = capture_stateless(
        earlier_calls(example.module, source.args, source.kwargs),
        partial(capture_described, example, run, declared, observed),
    )
    return replace(captured, notes=(*source.notes, *captured.notes))


def traceable(source: Source) -> bool:
    """Whether the modules of the source are Python code, and not a graph or an export."""
    return isinstance(source.model, torch.nn.Module) and not isinstance(source.model, GraphModule)


def example_of(source: Source) -> ModelExample:
    assert isinstance(source.model, torch.nn.Module)
    return ModelExample(source.model, source.args, source.kwargs)


def open_source(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    adapters: Sequence[str | Path] = (),
    memory: int = sys.maxsize,
) -> Source:
    """The source for any model that moec accepts. Arguments given here replace the example inputs
    of a checkpoint or an export; `adapters` are folders, merged into a checkpoint in order. A
    checkpoint whose compilation needs more than `memory` bytes is not read into memory at once.

    Raises UsageError where `model` is of no supported kind, CaptureError where it cannot be loaded.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    configs = tuple(read_adapter(Path(folder)) for folder in adapters)
    if configs and not (
        isinstance(model, str | Path) and kind_of_model(str(model)) in ("checkpoint", "gguf")
    ):
        raise UsageError(
            "adapters are merged into checkpoints and GGUF files: give one of these, or merge them "
            "into the module with PEFT (merge_and_unload)"
        )
    if isinstance(model, torch.nn.Module):
        return _module(model, args, kwargs)
    if isinstance(model, ExportedProgram):
        return Source(model, args, kwargs, name="an exported program")
    if not isinstance(model, str | Path):
        raise UsageError(
            f"a {type(model).__name__} is not a model: give a torch module, an exported program, "
            "the folder of a checkpoint, a .gguf, .pt2 or .onnx file, or file.py:factory"
        )
    text = str(model)
    match kind_of_model(text):
        case "factory":
            if args or kwargs:
                raise UsageError(f"{text}: the factory gives the example inputs: leave yours out")
            file, _, factory = text.rpartition(":")
            return _factory(Path(file), factory)
        case "checkpoint":
            return _checkpoint(Path(text), args, kwargs, configs, memory)
        case "gguf":
            return _gguf(Path(text), args, kwargs, configs, memory)
        case "pt2":
            return replace(_export(Path(text)), args=args, kwargs=kwargs)
        case "onnx":
            return _onnx(Path(text), args, kwargs)
        case "hub":
            raise UsageError(f"{text} does not exist: here, give a path and no id of the hub")


def _module(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Source:
    """The source of a module. A Hugging Face model is called without a cache unless the caller
    asked for one, since the cache would add dozens of output tensors."""
    name = type(model).__name__
    if isinstance(model, GraphModule) and not args and not kwargs:
        return Source(model, *model.example, name=name)
    if not args and not kwargs and inspect.signature(model.forward).parameters:
        raise UsageError(f"{name} needs example inputs: moec.compile(model, (input, ...))")
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "use_cache", None) and hasattr(model, "set_experts_implementation"):
        kwargs = {"use_cache": False} | kwargs
    return Source(model, args, kwargs, name=name)


def _export(path: Path) -> Source:
    check_archive(path)
    try:
        return Source(torch.export.load(str(path)), name=path.name)
    except Exception as error:
        raise CaptureError(
            f"{path} cannot be read as a torch.export program: {error}; save it again with "
            "torch.export.save, with this version of torch"
        ) from error


def _onnx(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Source:
    """The source of an ONNX file. Its inputs are given by name; named sizes vary."""
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{path}: reading ONNX needs {package}: pip install 'moec[onnx]'")
    from moec.onnx_source import open_onnx

    model = open_onnx(path)
    inputs = kwargs | dict(zip(model.inputs, args, strict=False)) or dict(model.inputs)
    shapes = {name: dict.fromkeys(axes, torch.export.Dim.AUTO) for name, axes in model.axes.items()}
    return Source(model.module, (), inputs, shapes, name=path.name, notes=model.notes)


def _factory(path: Path, name: str) -> Source:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CaptureError(f"{path} fails as it is loaded: {_shown(error)}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise UsageError(f"{path} has no function {name}")
    try:
        returned = factory()
    except Exception as error:
        raise CaptureError(f"{path}:{name}() fails: {_shown(error)}") from error
    if not (
        isinstance(returned, tuple)
        and len(returned) in (2, 3)
        and isinstance(returned[0], torch.nn.Module)
        and isinstance(returned[1], tuple | dict)
    ):
        raise UsageError(
            f"{path}:{name}() must return (module, arguments) or (module, arguments, "
            "dynamic_shapes), with the arguments in a tuple or a dict"
        )
    model, arguments, *shapes = returned
    args = arguments if isinstance(arguments, tuple) else ()
    kwargs = arguments if isinstance(arguments, dict) else {}
    source = _module(model, args, dict(kwargs))
    return Source(
        source.model, source.args, source.kwargs, shapes[0] if shapes else None, name=name
    )


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _checkpoint(
    folder: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    adapters: Sequence[AdapterConfig],
    memory: int,
) -> Source:
    """The source of a Hugging Face folder: config.json, safetensors, and a tokenizer if present."""
    # its files were checked when the kind of the path was determined
    config = json.loads((folder / CONFIG).read_bytes())
    if importlib.util.find_spec("transformers") is None:
        raise UsageError(
            f"{folder}: reading a checkpoint needs transformers: pip install 'moec[hf]'"
        )
    check_config(folder / CONFIG, config)
    seq2seq = bool(config.get("is_encoder_decoder"))
    loader = auto_class(folder, config, kwargs)
    tensors = map_folder(folder)
    format = format_of(config, tuple(tensors))
    weights = format.read(quantization_of(config) or {}, tensors)
    placed = memory_for(weights, tensors.maps.values(), memory)
    try:
        with hub_off():
            model, loading = load_model(loader.auto, _configuration(folder), weights, placed)
        _add_generation_config(folder, model)
    except MoecError:
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise CaptureError(
                f"{folder} cannot be loaded: {folder / CONFIG} makes tensors that are larger than "
                "this machine's memory"
            ) from error
        raise CaptureError(f"{folder} cannot be loaded: {_shown(error)}") from error
    check_loading(str(folder), loading, images=bool(loader.notes))
    merged = merge_adapters(model, weights, adapters, placed)
    model.eval()
    names = (name for name in TOKENIZER_FILES if (folder / name).is_file())
    files = {f"{FOLDER}{name}": (folder / name).read_bytes() for name in names}
    if not args and not kwargs:
        kwargs = example_tokens(model, seq2seq)
    source = _module(model, args, kwargs)
    return replace(
        source,
        bounds=_limits(model.config),
        name=hub_files.short_name(folder),
        files=files,
        unnamed=True,
        notes=(*hub_files.notes(folder), *merged.notes, *loader.notes, *template_notes(files)),
        codes=partial(arrange, model, weights, merged.names, placed)
        if any(map(in_few_bits, weights.values()))
        else None,
        memory=placed,
    )


def _gguf(
    path: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    adapters: Sequence[AdapterConfig],
    memory: int,
) -> Source:
    """The source of a GGUF file, with its tokenizer and chat template."""
    for package, extra in (("transformers", "hf"), ("gguf", "gguf")):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{path}: reading GGUF needs {package}: pip install 'moec[{extra}]'")
    import transformers

    header = read_header(path)
    try:
        fields = configuration(header)
        tensors = map_gguf(header)
        weights = GGUF.read(fields, tensors)
        placed = memory_for(weights, tensors.maps.values(), memory)
        config = transformers.AutoConfig.for_model(**fields, dtype=dtype_of(header))
        with hub_off():
            model, loading = load_model(transformers.AutoModelForCausalLM, config, weights, placed)
        if (factors := frequency_factors(tensors)) is not None:
            divide_frequencies(model, factors)
        read = tokenizer_files(header.fields).items()
        files = {f"{FOLDER}{name}": content for name, content in read}
    except MoecError as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:
        raise CaptureError(f"{path} cannot be loaded: {_shown(error)}") from error
    check_loading(str(path), loading, images=False)
    merged = merge_adapters(model, weights, adapters, placed)
    model.eval()
    if not args and not kwargs:
        kwargs = example_tokens(model, seq2seq=False)
    return replace(
        _module(model, args, kwargs),
        bounds=_limits(model.config),
        name=path.name,
        files=files,
        unnamed=True,
        notes=(*hub_files.notes(path), *merged.notes, *template_notes(files)),
        codes=partial(arrange, model, weights, merged.names, placed)
        if any(map(in_few_bits, weights.values()))
        else None,
        memory=placed,
    )


def _configuration(folder: Path) -> Any:
    """The configuration of a folder, without what says how weights are stored: moec reads them."""
    config = own_config(folder)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def _add_generation_config(folder: Path, model: Any) -> None:
    import transformers

    if (folder / GENERATION_CONFIG).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)


def example_tokens(model: Any, seq2seq: bool) -> dict[str, Any]:
    """Example arguments of a language model: token ids [2, 7], without a cache."""
    count = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)

    def tokens() -> torch.Tensor:
        return torch.randint(count, (2, 7), generator=generator)

    if not seq2seq:
        return {"input_ids": tokens(), "use_cache": False}
    ones = torch.ones(2, 7, dtype=torch.int64)
    return {
        "input_ids": tokens(),
        "attention_mask": ones,
        "decoder_input_ids": tokens(),
        "decoder_attention_mask": ones.clone(),
        "use_cache": False,
    }


def stop_tokens(model: Any) -> tuple[int, ...]:
    """The ids of the tokens that end a text, from the configuration of a Hugging Face model."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        token_ids = getattr(config, "eos_token_id", None)
        if token_ids is not None:
            return (token_ids,) if isinstance(token_ids, int) else tuple(map(int, token_ids))
    return ()


def _limits(config: Any) -> dict[str, Bounds]:
    """The sequence length S is limited to the model's max_position_embeddings, where it has one."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    return {"S": Bounds(1, longest)} if isinstance(longest, int) else {}
