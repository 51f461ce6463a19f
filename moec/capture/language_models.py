"""Language models from Hugging Face folders and GGUF files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moec.capture.auto_class import auto_class
from moec.capture.hub import hub_off, own_config
from moec.capture.source import Source, described_error, module_source
from moec.errors import CaptureError, MoecError, SetupError
from moec.files import hub_files
from moec.files.adapter import AdapterConfig
from moec.files.checkpoint import CONFIG, GENERATION_CONFIG, TOKENIZER_FILES
from moec.files.gguf import read_header
from moec.files.regular_file import read_regular
from moec.ir.sizes.dims import Bounds
from moec.runtime.text.prompt import FOLDER, text_notes
from moec.sources.checkpoint.adapters.merge import merge_adapters
from moec.sources.checkpoint.arrange import arrange
from moec.sources.checkpoint.gguf.model import configuration
from moec.sources.checkpoint.gguf.rotary import divide_frequencies, frequency_factors
from moec.sources.checkpoint.gguf.tokenizer import tokenizer_files
from moec.sources.checkpoint.gguf.weights import dtype_of, map_gguf
from moec.sources.checkpoint.load import check_config, check_loading, load_model
from moec.sources.checkpoint.table import GGUF, format_of, quantization_of
from moec.sources.checkpoint.tensors import map_folder
from moec.sources.checkpoint.weight import CheckpointWeight, in_few_bits
from moec.sources.memory.memory import InMemory


def checkpoint_source(
    folder: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    adapters: Sequence[AdapterConfig],
    memory: int,
) -> Source:
    """The source of a Hugging Face folder: config.json, safetensors, and a tokenizer if present."""
    # its files were checked when the kind of the path was determined
    config = json.loads(read_regular(folder / CONFIG))
    if importlib.util.find_spec("transformers") is None:
        raise SetupError(
            f"{folder}: reading a checkpoint needs transformers: pip install 'moec[hf]'"
        )
    check_config(folder / CONFIG, config)
    seq2seq = bool(config.get("is_encoder_decoder"))
    loader = auto_class(folder, config, kwargs)
    try:
        tensors = map_folder(folder)
        format = format_of(config, tuple(tensors))
        weights = format.read(quantization_of(config) or {}, tensors)
        maps = tensors.maps.values()
        with hub_off():
            loaded = load_model(loader.auto, _configuration(folder), weights, maps, memory)
        model, loading, placed = loaded
        _add_generation_config(folder, model)
        example = args, kwargs or ({} if args else example_tokens(model, seq2seq))
    except MoecError:
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise CaptureError(
                f"{folder} cannot be loaded: {folder / CONFIG} makes tensors that are larger than "
                "this machine's memory"
            ) from error
        raise CaptureError(f"{folder} cannot be loaded: {described_error(error)}") from error
    check_loading(str(folder), loading, images=bool(loader.notes))
    names = (name for name in TOKENIZER_FILES if (folder / name).is_file())
    files = {f"{FOLDER}{name}": read_regular(folder / name) for name in names}
    source = _with_adapters(model, weights, placed, adapters, example, files)
    notes = (*hub_files.notes(folder), *source.notes, *loader.notes, *text_notes(files))
    return replace(source, name=hub_files.short_name(folder), notes=notes)


def gguf_source(
    path: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    adapters: Sequence[AdapterConfig],
    memory: int,
) -> Source:
    """The source of a GGUF file, with its tokenizer and chat template."""
    for package, extra in (("transformers", "hf"), ("gguf", "gguf")):
        if importlib.util.find_spec(package) is None:
            raise SetupError(f"{path}: reading GGUF needs {package}: pip install 'moec[{extra}]'")
    import transformers

    header = read_header(path)
    try:
        fields = configuration(header)
        tensors = map_gguf(header)
        weights = GGUF.read(fields, tensors)
        maps = tensors.maps.values()
        config = transformers.AutoConfig.for_model(**fields, dtype=dtype_of(header))
        with hub_off():
            auto = transformers.AutoModelForCausalLM
            model, loading, placed = load_model(auto, config, weights, maps, memory)
        if (factors := frequency_factors(tensors)) is not None:
            divide_frequencies(model, factors)
        read = tokenizer_files(header.fields).items()
        files = {f"{FOLDER}{name}": content for name, content in read}
    except MoecError as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:
        raise CaptureError(f"{path} cannot be loaded: {described_error(error)}") from error
    check_loading(str(path), loading, images=False)
    example = args, kwargs or ({} if args else example_tokens(model, seq2seq=False))
    source = _with_adapters(model, weights, placed, adapters, example, files)
    notes = (*hub_files.notes(path), *source.notes, *text_notes(files))
    return replace(source, name=path.name, notes=notes)


def _with_adapters(
    model: Any,
    weights: Mapping[str, CheckpointWeight],
    memory: InMemory,
    adapters: Sequence[AdapterConfig],
    example: tuple[tuple[Any, ...], dict[str, Any]],
    files: Mapping[str, bytes],
) -> Source:
    """The source of a loaded language model, with adapters merged into it and notes about them."""
    merged = merge_adapters(model, weights, adapters, memory)
    model.eval()
    return replace(
        module_source(model, *example),
        bounds=_limits(model.config),
        files=files,
        unnamed=True,
        notes=merged.notes,
        codes=partial(arrange, model, weights, merged.names, memory)
        if any(map(in_few_bits, weights.values()))
        else None,
        memory=memory,
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
