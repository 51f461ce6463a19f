"""Train a small MoE language model on the source text of Python's standard library.

    python examples/tiny_moe/train.py --minutes 14 --threads 2

Every machine with Python has this text, so nothing is downloaded. The result is a Hugging Face
checkpoint folder, small enough for the repository, in which all experts are used. It is the test
fixture wherever trained weights are needed instead of random ones.

The learning rate depends on the time, not on the number of steps: on every machine, the run ends on
time with a fully decayed rate. Two runs with the same seed therefore read the same batches in the
same order, but may stop at different steps.
"""

from __future__ import annotations

import hashlib
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
END = "<|endoftext|>"
TESTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TABLES = {"encodings", "pydoc_data"}  # an eighth of the bytes, with hardly any code
HELD_OUT = 24  # one file in this many is held out
BALANCE = 0.02  # weight of the load-balancing loss
PROMPT = "def read_lines(path):\n"


@dataclass(frozen=True)
class Text:
    """Token ids i32[N] of both splits, every file followed by the end token."""

    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int


@dataclass(frozen=True)
class Quality:
    """The results of a model on the held-out split."""

    loss: float  # nats per token
    bits_per_byte: float
    share: torch.Tensor  # f64[L, E]: each expert's share of the routed rows of a layer


def standard_library() -> tuple[list[str], list[str]]:
    """The library's source files, split by a hash of their names: training, held out."""
    root = Path(sysconfig.get_path("stdlib"))
    splits: tuple[list[str], list[str]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if (TESTS | TABLES).intersection(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few sample files are in other encodings on purpose
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        splits[int.from_bytes(digest[:4], "big") % HELD_OUT == 0].append(text)
    if not all(splits):
        raise click.ClickException(f"no Python source text under {root}")
    return splits


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level pair encoding: every byte has a token, so decoding restores any text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    for text in texts[:50]:
        if tokenizer.decode(tokenizer.encode(text).ids) != text:
            raise click.ClickException("the tokenizer does not give a text back as it was")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    end = tokenizer.token_to_id(END)
    pieces = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces])


def configuration(vocab_size: int, end: int) -> Qwen3MoeConfig:
    """3.5 million parameters, 1.1 million of them active for a token; 7 MB in bfloat16."""
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=256,
        intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05,
        router_aux_loss_coef=BALANCE,
        output_router_logits=False,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


def batches(ids: np.ndarray, batch: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """An endless sequence of i64[batch, length] windows; each pass over the text shifts and
    reshuffles."""
    rng = np.random.default_rng(seed)
    while True:
        shift = int(rng.integers(length))
        starts = rng.permutation(np.arange(shift, len(ids) - length, length))
        for first in range(0, len(starts) - batch + 1, batch):
            rows = [ids[start : start + length] for start in starts[first : first + batch]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))


def optimizer(model: Qwen3MoeForCausalLM, rate: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def rate_at(done: float) -> float:
    """The share of the peak rate after a share `done` of the time: short warm-up, then cosine to 3
    %."""
    warm = 0.03
    if done < warm:
        return max(done, 1e-4) / warm
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warm) / (1 - warm))))


def cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The mean loss, in nats, of predicting every token but the first."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    )


def imbalance(config: Qwen3MoeConfig, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum over layers of E * sum_e share_e * probability_e, which is 1 if experts share evenly.

    The loss in transformers sums the layers before it multiplies, so an expert that is idle in one
    layer is compensated by a busy one with the same index in another. This loss is per layer, as in
    Switch Transformer (Fedus et al., 2021, equations 4 to 6).
    """
    total = torch.zeros(())
    for logits in router_logits:
        probability = logits.float().softmax(-1)
        chosen = probability.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=config.num_experts) / len(chosen)
        total = total + config.num_experts * (share * probability.mean(0)).sum()
    return total


@torch.no_grad()
def quality(model: Qwen3MoeForCausalLM, text: Text, length: int, windows: int) -> Quality:
    """The mean loss over evenly spaced held-out windows, and the distribution of their tokens over
    experts."""
    model.eval()
    count = min(windows, (len(text.held_out) - 1) // length)
    starts = np.linspace(0, len(text.held_out) - length, count).astype(int)
    rows = np.stack([text.held_out[start : start + length] for start in starts]).astype(np.int64)
    config = model.config
    used = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.float64)
    total = 0.0
    for part in torch.from_numpy(rows).split(16):
        out = model(part, output_router_logits=True, use_cache=False)
        total += cross_entropy(out.logits, part).item() * len(part)
        for layer, scores in enumerate(out.router_logits):
            chosen = scores.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
            used[layer] += torch.bincount(chosen, minlength=config.num_experts)
    model.train()
    loss = total / count
    bytes_per_token = text.held_out_bytes / len(text.held_out)
    return Quality(loss, loss / math.log(2) / bytes_per_token, used / used.sum(1, keepdim=True))


def train(
    model: Qwen3MoeForCausalLM,
    text: Text,
    *,
    seconds: float,
    batch: int,
    length: int,
    rate: float,
    seed: int,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[int, float]:
    """Trains in place until the time is over. Returns the steps and the tokens per second."""
    adam = optimizer(model, rate)
    stream = batches(text.train, batch, length, seed)
    start = shown = clock()
    step, recent = 0, 0.0
    while (now := clock()) - start < seconds:
        for group in adam.param_groups:
            group["lr"] = rate * rate_at((now - start) / seconds)
        ids = next(stream)
        out = model(ids, output_router_logits=True, use_cache=False)
        loss = cross_entropy(out.logits, ids)
        (loss + BALANCE * imbalance(model.config, out.router_logits)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if not math.isfinite(loss.item()):
            raise click.ClickException(f"the loss became {loss.item()} at {step=}: lower --rate")
        step += 1
        recent = loss.item() if step == 1 else 0.95 * recent + 0.05 * loss.item()
        if now - shown > 15:
            shown = now
            speed = step * batch * length / (now - start)
            click.echo(
                f"{now - start:5.0f} s  step {step:5d}  loss {recent:.3f}  {speed:6.0f} tokens/s"
            )
    return step, step * batch * length / (clock() - start)


def save(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    end = tokenizer.token_to_id(END)
    model.to(torch.bfloat16).save_pretrained(out)
    GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(out)


def report(text: Text, out: Path, length: int) -> None:
    """Reloads the saved model, as its users will, and reports its quality."""
    model = Qwen3MoeForCausalLM.from_pretrained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    result = quality(model, text, length, windows=512)
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    click.echo(f"\nsaved {out} ({size:.2f} MB, bfloat16)")
    click.echo(
        f"held out: loss {result.loss:.4f} nats a token, perplexity {math.exp(result.loss):.2f}, "
        f"{result.bits_per_byte:.3f} bits a byte"
    )
    click.echo(
        "share of routed rows for each expert (an even share is "
        f"{1 / model.config.num_experts:.3f}):"
    )
    for layer, share in enumerate(result.share):
        click.echo(f"  layer {layer}  " + " ".join(f"{value:.3f}" for value in share))
    model.eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=100, do_sample=False)
    click.echo("\ngreedy sample:\n" + tokenizer.decode(ids[0]))


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--minutes", default=14.0, show_default=True, help="Training time.")
@click.option("--threads", default=2, show_default=True, help="Threads for torch.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights and batch order.")
@click.option("--vocab", default=1024, show_default=True, help="Tokens in the vocabulary.")
@click.option("--batch", default=8, show_default=True, help="Windows in a step.")
@click.option("--length", default=256, show_default=True, help="Tokens in a window.")
@click.option("--rate", default=3e-3, show_default=True, help="Peak learning rate.")
@click.option(
    "--experts",
    type=click.Choice(["eager", "grouped_mm", "batched_mm"]),
    default="eager",
    show_default=True,
    help="How transformers runs the experts; changes the speed only.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=HERE / "checkpoint",
    show_default=True,
    help="Folder of the checkpoint.",
)
def main(
    minutes: float,
    threads: int,
    seed: int,
    vocab: int,
    batch: int,
    length: int,
    rate: float,
    experts: str,
    out: Path,
) -> None:
    begun = time.monotonic()
    logging.disable_progress_bar()  # bars of a single step each
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    train_texts, held_out_texts = standard_library()
    tokenizer = train_tokenizer(train_texts, vocab)
    text = Text(
        encode(tokenizer, train_texts),
        encode(tokenizer, held_out_texts),
        sum(len(piece.encode()) for piece in held_out_texts),
    )
    click.echo(
        f"Python {sys.version.split()[0]} library: {len(train_texts)} files, "
        f"{len(text.train):,} tokens to train on; {len(held_out_texts)} files, "
        f"{len(text.held_out):,} tokens held out"
    )
    model = Qwen3MoeForCausalLM(configuration(vocab, tokenizer.token_to_id(END)))
    model.set_experts_implementation(experts)
    click.echo(f"{model.num_parameters():,} parameters; {minutes:g} minutes on {threads} threads")
    steps, speed = train(
        model, text, seconds=60 * minutes, batch=batch, length=length, rate=rate, seed=seed
    )
    click.echo(f"{steps} steps, {steps * batch * length:,} tokens, {speed:.0f} tokens/s")
    save(model, tokenizer, out)
    report(text, out, length)
    click.echo(f"\n{(time.monotonic() - begun) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
