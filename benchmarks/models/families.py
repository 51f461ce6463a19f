"""Every MoE model type of the installed transformers, small and with random weights, compiled.

    python -m benchmarks.models.families [TYPE ..] [--seconds 300] [--record FILE]

Each type is compiled and verified in float32 in a process of its own, from token ids alone, also
where it takes images or sounds. A language model then continues a prompt of 7 tokens by 40; the
text is compared with transformers' own greedy text.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeTalkerModel

import moec
from benchmarks.models.small_config import small_config
from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.errors import InputError, MoecError
from moec.ir.interpret.stable_topk import FirstOfEquals

MODELS = Path(transformers.__file__).parent / "models"
EXPERTS = re.compile(r"^class \w*(Experts|MoE|Moe|TopKRouter|TopkRouter)\w*\(nn", re.MULTILINE)
CLASSES = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)
OTHERS = ("vision", "audio", "sam", "code_predictor", "ocr2_encoder")
"""Parts of composite models that have no experts."""
TOKENS = range(9, 150)
"""Ids of text: smaller and greater ones mark images in some small configs."""


def moe_types() -> Iterator[str]:
    """The types whose file of transformers defines experts or a router of tokens."""
    folders = {
        path.parent.name
        for path in MODELS.glob("*/modeling_*.py")
        if EXPERTS.search(path.read_text(encoding="utf-8"))
    }
    for name in CONFIG_MAPPING:
        folder = CONFIG_MAPPING[name].__module__.split(".")[2]
        if folder in folders and not any(other in name for other in OTHERS):
            yield name


def model_class(name: str, of: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """The class that has the type's own config: of those that the auto classes have for it, or of
    its file, a whole model before one of its parts. Raises ValueError where there is none."""
    entries = [each[name] for each in CLASSES if name in each]
    chosen = [getattr(transformers, each if isinstance(each, str) else each[0]) for each in entries]
    module = importlib.import_module(of.__module__.replace("configuration_", "modeling_"))
    models = [each for each in vars(module).values() if isinstance(each, type)]
    models = [each for each in models if "forward" in vars(each)]
    order = ("ForConditionalGeneration", "TextModel", "Model", "")
    models.sort(key=lambda each: len(each.__name__))
    models.sort(key=lambda each: [each.__name__.endswith(end) for end in order].index(True))
    for each in (*chosen, *models):
        if getattr(each, "config_class", None) is of:
            model: type[PreTrainedModel] = each
            return model
    raise ValueError("transformers has no model class with a forward for it")


def build(name: str) -> PreTrainedModel:
    """A small model of that type, whose norms and biases are random too, and its experts where
    transformers leaves their memory as it was."""
    config = small_config(CONFIG_MAPPING[name])
    torch.manual_seed(0)
    model = model_class(name, type(config))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
            elif not parameter.isfinite().all() or not (parameter.abs() > 1e-30).any():
                parameter.normal_(std=0.02)
    return model.eval()


def cpu_seconds() -> float:
    each = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in each)


def text_of(compiled: moec.CompiledModel, model: PreTrainedModel) -> str:
    """Whether 40 tokens, or those before an end token, are those of transformers, or are where its
    top-k takes the first of equal values, as moec does."""
    ids = torch.randint(TOKENS.start, TOKENS.stop, (1, 7))
    try:
        ours = np.asarray(compiled.generate(ids.numpy(), max_new_tokens=40)).ravel()[7:]
    except InputError:
        return "no logits"
    generate = partial(model.generate, ids, max_new_tokens=40, do_sample=False)
    for verdict, of_equals in (("equal", nullcontext()), ("equal but for ties", FirstOfEquals())):
        with of_equals:
            right = generate(eos_token_id=None, pad_token_id=0)[0, 7 : 7 + len(ours)]
        if ours.tolist() == right.tolist():
            return verdict
    return "differs"


def inputs_of(model: PreTrainedModel) -> dict[str, Any]:
    """Two texts of 7 tokens, or what the model takes in their place."""
    ids = torch.randint(TOKENS.start, TOKENS.stop, (2, 7))
    if model.main_input_name == "pixel_values":  # the experts are chosen by data set
        height, width = model.config.image_size
        return {"pixel_values": torch.randn(2, 3, height, width), "dataset_index": ids[:, 0] % 2}
    if isinstance(model, Qwen3OmniMoeTalkerModel):  # it has no embedding of texts
        return {"inputs_embeds": torch.randn(2, 7, model.config.hidden_size), "use_cache": False}
    if isinstance(model, DiffusionGemmaForBlockDiffusion):  # a step of denoising 5 tokens
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :5]}
    if not getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": ids, "use_cache": False}
    masks = ("attention_mask", "decoder_attention_mask")
    ones = {name: torch.ones(2, 7, dtype=torch.int64) for name in masks}
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1), "use_cache": False, **ones}


def compile_type(name: str) -> dict[str, Cell]:
    """The row of a type."""
    row: dict[str, Cell] = {"type": name, "compiles": "no", "routers": "", "text": "", "note": ""}
    try:
        model = build(name)
    except Exception as error:  # whatever transformers raises for a config that it has no use for
        return {**row, "note": f"not tried: {str(error).splitlines()[0]}"}
    row["class"] = type(model).__name__
    start = cpu_seconds()
    try:
        compiled = moec.compile(model, (), inputs_of(model))
    except MoecError as error:
        first = " ".join(str(error).splitlines()[:2])
        return {**row, "CPU s": round(cpu_seconds() - start, 1), "note": first}
    row["CPU s"] = round(cpu_seconds() - start, 1)
    routers = Counter(block.router for block in compiled.blocks)
    row["routers"] = "; ".join(f"{count} x {router}" for router, count in routers.items())
    checked = compiled.checked
    if checked is not None and checked.notes:
        row["note"] = checked.notes[0]
    return {**row, "compiles": "yes", "text": text_of(compiled, model)}


def measured(name: str, seconds: float) -> dict[str, Cell]:
    """The row of a type, made in another process."""
    words = [sys.executable, "-m", "benchmarks.models.families", "--one", name]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"type": name, "compiles": "no", "note": f"not done after {seconds:.0f} s"}
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        return {"type": name, "compiles": "no", "note": f"the process ended: {last[:200]}"}
    row: dict[str, Cell] = json.loads(last)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=300.0, help="the most for one type")
    add_record_options(parser, "not named")
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        print(json.dumps(compile_type(options.one)))
        return
    rows = []
    for name in options.types or moe_types():
        rows.append(measured(name, options.seconds))
        print(json.dumps(rows[-1]), flush=True)
    conditions = f"transformers {transformers.__version__}; one thread"
    record_if_asked(options, "families", "float32", rows, conditions)


if __name__ == "__main__":
    main()
