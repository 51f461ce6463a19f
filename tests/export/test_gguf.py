"""GGUF files come back as the model that they were written of: weights, codes, configuration and
tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from moec.capture.doors import open_source
from moec.errors import CaptureError
from moec.export.gguf import export_gguf
from moec.export.gguf_tokenizer import tokenizer_fields
from moec.files.gguf import read_header
from moec.ir.formats.integer import dequantise
from moec.runtime.text.prompt import FOLDER, load_tokenizer
from moec.runtime.text.sampling import Sampling
from moec.sources.checkpoint.gguf.tokenizer import tokenizer_files
from tests.sources.checkpoint.families import COMMON

gguf = pytest.importorskip("gguf")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen2_moe": EXPERTS | {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 128},
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 96, "head_dim": 32, "norm_topk_prob": True},
    "olmoe": EXPERTS | {"num_key_value_heads": 4},
}


def saved(folder, family, **changes):
    """A checkpoint of the family, none of whose weights are equal, without a tokenizer."""
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = AutoConfig.for_model(family, **COMMON | FAMILIES[family] | tokens | changes)
    built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    built.save_pretrained(folder)
    return built


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_16_bits(family, tmp_path):
    """Equal weights under equal names, and a configuration that computes the same."""
    built = saved(tmp_path / "source", family)
    export_gguf(tmp_path / "source", tmp_path / "out.gguf")
    read = open_source(tmp_path / "out.gguf").model
    expected = built.state_dict()
    state = read.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        logits = read.float()(tokens).logits
        # the file has rms_norm_eps and rope_theta in float32
        torch.testing.assert_close(logits, built.float()(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_codes(family, kind, tmp_path):
    """The values of a file's codes are those that llama.cpp's own rounding gives."""
    built = saved(tmp_path / "source", family)
    result = export_gguf(tmp_path / "source", tmp_path / "out.gguf", kind)
    assert (
        result.types
        == {
            "mixtral": {"F32": 7, **({"Q8_0": 16} if kind == "q8_0" else {"Q8_0": 2, "Q4_0": 14})},
            "qwen2_moe": {
                "F32": 15,
                **({"Q8_0": 22} if kind == "q8_0" else {"Q8_0": 2, "Q4_0": 20}),
            },
        }[family]
    )
    stored = open_source(tmp_path / "out.gguf").codes().stored
    state = built.state_dict()
    assert {"embed_tokens", "gate_up_proj", "down_proj", "k_proj"} <= {
        part for name in stored for part in name.split(".")
    }
    for name, weight in stored.items():
        outer = name in ("model.embed_tokens.weight", "lm_head.weight")
        number = gguf.GGMLQuantizationType["Q8_0" if outer else kind.upper()]
        data = gguf.quants.quantize(state[name].float().numpy(), number)
        expected = torch.from_numpy(gguf.quants.dequantize(data, number))
        parts = weight.parts
        values = dequantise(weight.format.kind, parts.codes, parts.scales)
        assert torch.equal(values.flatten(), expected.flatten()), name


WRONG = [
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False, and llama.cpp would"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is"),
    ("mixtral", {"sliding_window": 16}, "sliding_window is 16, and llama.cpp would"),
    ("llama", {"attention_bias": True}, "biases of q and k are not written for llama"),
    ("olmoe", {"tie_word_embeddings": True}, "llama.cpp reads olmoe only with a head"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "rope_parameters is",
    ),
]


@pytest.mark.parametrize(("family", "changes", "words"), WRONG)
def test_what_a_file_cannot_say_is_refused(family, changes, words, tmp_path):
    saved(tmp_path / "source", family, **changes)
    with pytest.raises(CaptureError, match=words):
        export_gguf(tmp_path / "source", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_weights_of_another_model_are_refused(tmp_path):
    saved(tmp_path / "source", "qwen2")
    path = tmp_path / "source/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 64}))
    words = r"gate_proj.weight is \[96, 64\], and config.json makes it \[64, 64\]"
    with pytest.raises(CaptureError, match=words):
        export_gguf(tmp_path / "source", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_other_architectures_are_refused(tmp_path):
    saved(tmp_path / "source", "qwen2")
    path = tmp_path / "source/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt_oss"}))
    with pytest.raises(
        CaptureError, match=r"GGUF files are written of llama, .*, not of 'gpt_oss'"
    ):
        export_gguf(tmp_path / "source", tmp_path / "out.gguf")


TEXTS = (
    "Once upon a time,  it's 12345 o'clock!\n\n  ALL CAPS",
    "naïve café 你好 🙂 x_1 != y[2]\tend ",
)
AFTER_SPECIAL = "a <s> b"
"""llama.cpp and old tokenizers of SentencePiece add a space after <s>; transformers' reader does
not."""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(kind):
    """A tokenizer that was trained on this file; "piece" is BPE with bytes, as of SentencePiece."""
    piece = kind == "piece"
    unknown = "<unk>" if piece else None
    tokenizer = Tokenizer(models.BPE(unk_token=unknown, byte_fallback=piece, fuse_unk=piece))
    special = ["<unk>", "<s>", "</s>"]
    if piece:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.ByteFallback()
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    elif kind == "split":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [] if piece else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    # words for "piece", because training does not split texts without a pre-tokenizer
    text = Path(__file__).read_text()
    tokenizer.train_from_iterator(text.split() if piece else [text], trainer)
    stored = json.loads(tokenizer.to_str())
    if piece:  # bytes are ordinary pieces
        stored["added_tokens"] = [t for t in stored["added_tokens"] if t["id"] < 3]
    return json.dumps(stored).encode()


@pytest.mark.parametrize(("kind", "pre"), [("gpt2", "gpt-2"), ("split", "llama3"), ("piece", None)])
def test_tokens(kind, pre):
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ 1 }}"}
    files = {
        "tokenizer.json": trained(kind),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    fields = tokenizer_fields(files, "llama", 720, (2, 1))
    assert fields["tokenizer.ggml.model"] == ("llama" if kind == "piece" else "gpt2")
    assert fields["tokenizer.ggml.pre"] == (pre or "default")
    assert fields["tokenizer.chat_template"] == "{{ 1 }}"
    numbers = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")]
    assert numbers == [1, 2, 1]
    assert not fields["tokenizer.ggml.add_bos_token"]
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    count = Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab_size()
    assert len(tokens) == len(types) == 720
    assert tokens[count:] == [f"[PAD{i}]" for i in range(count, 720)]
    assert types[1:3] + types[count:] == [3, 3] + [5] * (720 - count)
    read, source = (
        load_tokenizer({f"{FOLDER}{name}": content for name, content in each.items()})
        for each in (
            tokenizer_files({"general.architecture": "llama", **fields, **SAMPLING}),
            files,
        )
    )
    assert (read.sampling, source.sampling) == (Sampling(0.95, top_k=20), Sampling())
    for text in TEXTS if kind == "piece" else (*TEXTS, AFTER_SPECIAL):
        assert read.encode(text, special=False) == source.encode(text, special=False)


SAMPLING = {"general.sampling.temp": 0.949999988079071, "general.sampling.top_k": 20}


def changed(content, **changes):
    return json.dumps(json.loads(content) | changes).encode()


def test_other_tokenizers_are_refused():
    content = trained("gpt2")
    split = {"type": "Whitespace"}
    with pytest.raises(CaptureError, match=r"\(BPE, split by Whitespace\) is of a kind that moec"):
        tokenizer_fields(
            {"tokenizer.json": changed(content, pre_tokenizer=split)}, "llama", 720, ()
        )
    with pytest.raises(CaptureError, match="has 700 tokens, and the model embeds only 96"):
        tokenizer_fields({"tokenizer.json": content}, "llama", 96, ())


def test_a_file_with_its_tokenizer(tiny_moe, tmp_path):
    result = export_gguf(tiny_moe, tmp_path / "out.gguf")
    assert (result.architecture, result.tokens) == ("qwen3moe", 1024)
    fields = read_header(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["qwen3moe.attention.value_length"] == 32
    assert open_source(tmp_path / "out.gguf").files["tokenizer/tokenizer.json"]
