"""System 15, the survey "From Google Gemini to OpenAI Q*" (arXiv 2312.10868), as a matrix of
models.

One axis is the survey's domain of architectures (transformer, recurrent, MoE), the other its domain
of applications (text, image, audio and video, multimodal). Each cell is trained and run. Each
architecture is represented by a small model:

    transformer   one block, whose FFN is dense
    moe           the same block with experts
    recurrent     a gated recurrent unit with experts after its state; one call is one step, and the
                  caller loops over time, so one artifact serves every length

Sequences of token ids, of image rows, and of sound or video frames are rows of one batch, and any
kind may be absent: one artifact serves a row of the matrix.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec

ARCHITECTURES = ("transformer", "recurrent", "moe")
MODALITIES = ("text", "image", "audio-video", "multimodal")


@dataclass(frozen=True)
class Sizes:
    """`row` is the number of elements in an image row, `frame` that in a frame."""

    vocabulary: int = 32
    row: int = 4
    frame: int = 8
    width: int = 16
    heads: int = 2
    hidden: int = 32
    experts: int = 4
    outputs: int = 5


class Entry(nn.Module):
    """ids[A, S], rows[B, S, row], frames[C, S, frame] -> [A + B + C, S, D]"""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.text = nn.Embedding(sizes.vocabulary, sizes.width)
        self.image = nn.Linear(sizes.row, sizes.width)
        self.frame = nn.Linear(sizes.frame, sizes.width)

    def forward(self, ids: Tensor, rows: Tensor, frames: Tensor) -> Tensor:
        return torch.cat([self.text(ids), self.image(rows), self.frame(frames)])


class Dense(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.width, sizes.hidden)
        self.down = nn.Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Sparse(nn.Module):
    """x[T, D] -> [T, D]: the best expert, scaled by its probability."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.width, sizes.experts, bias=False)
        self.experts = nn.ModuleList(Dense(sizes) for _ in range(sizes.experts))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y + (weight * (chosen == number))[:, None] * expert(x)
        return y


class Transformer(nn.Module):
    """The three kinds of sequences -> [N, outputs], one answer per sequence."""

    def __init__(self, sizes: Sizes, ffn: nn.Module) -> None:
        super().__init__()
        d = sizes.width
        self.entry, self.ffn = Entry(sizes), ffn
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.head, self.heads = nn.Linear(d, sizes.outputs), sizes.heads

    def forward(self, ids: Tensor, rows: Tensor, frames: Tensor) -> Tensor:
        x = self.entry(ids, rows, frames)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        x = x + self.ffn(self.norms[1](x).flatten(0, 1)).reshape(x.shape)
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    """One step: ids[A, 1], rows[B, 1, row], frames[C, 1, frame] and the states of each kind [.., D]
    -> answers [A + B + C, outputs], states [A + B + C, D]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        d = sizes.width
        self.entry, self.experts = Entry(sizes), Sparse(sizes)
        self.of_input, self.of_state = nn.Linear(d, 3 * d), nn.Linear(d, 3 * d)
        self.head = nn.Linear(d, sizes.outputs)

    def forward(
        self, ids: Tensor, rows: Tensor, frames: Tensor,
        of_ids: Tensor, of_rows: Tensor, of_frames: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        state = torch.cat([of_ids, of_rows, of_frames])
        reset, update, new = self.of_input(self.entry(ids, rows, frames)[:, 0]).chunk(3, dim=-1)
        reset_by, update_by, new_by = self.of_state(state).chunk(3, dim=-1)
        new = torch.tanh(new + torch.sigmoid(reset + reset_by) * new_by)
        share = torch.sigmoid(update + update_by)
        state = (1 - share) * new + share * state
        state = state + self.experts(state)
        return self.head(state), state


def build(architecture: str, sizes: Sizes) -> nn.Module:
    if architecture == "recurrent":
        return Recurrent(sizes)
    return Transformer(sizes, Dense(sizes) if architecture == "transformer" else Sparse(sizes))


def sequences(modality: str, sizes: Sizes, length: int = 6, count: int = 3) -> tuple[Tensor, ...]:
    """`count` sequences of one modality, or of all three."""
    counts = [count if modality in (name, "multimodal") else 0 for name in MODALITIES[:3]]
    return (
        torch.randint(sizes.vocabulary, (counts[0], length)),
        torch.randn(counts[1], length, sizes.row),
        torch.randn(counts[2], length, sizes.frame),
    )


def step_inputs(modality: str, sizes: Sizes) -> tuple[Tensor, ...]:
    """The inputs of one step of a recurrent model."""
    inputs = sequences(modality, sizes, length=1)
    return (*inputs, *(torch.randn(len(part), sizes.width) for part in inputs))


def read(step: Callable[..., Any], inputs: tuple[Tensor, ...], sizes: Sizes) -> Tensor:
    """The answer of a recurrent model after the last step: the loop over time."""
    counts = [len(part) for part in inputs]
    state = torch.zeros(sum(counts), sizes.width)
    for position in range(inputs[0].shape[1]):
        now = (part[:, position : position + 1] for part in inputs)
        answer, state = step(*now, *state.split(counts))
    return answer


def compiled(model: nn.Module, architecture: str, sizes: Sizes) -> moec.CompiledModel:
    """One artifact for every modality; any of them may be absent."""
    a, b, c, s = (torch.export.Dim(name, min=low, max=256) for name, low in
                  (("A", 0), ("B", 0), ("C", 0), ("S", 2)))  # fmt: skip
    if architecture == "recurrent":
        one = ({0: a}, {0: b}, {0: c})
        return moec.compile(model.eval(), step_inputs("multimodal", sizes), dynamic_shapes=one * 2)
    shapes = ({0: a, 1: s}, {0: b, 1: s}, {0: c, 1: s})
    return moec.compile(model.eval(), sequences("multimodal", sizes), dynamic_shapes=shapes)


def answers(
    model: Callable[..., Any], architecture: str, inputs: tuple[Tensor, ...], sizes: Sizes
) -> Tensor:
    """The answers of a module, or of its compiled model."""
    return read(model, inputs, sizes) if architecture == "recurrent" else model(*inputs)


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The mixture of a cell with BERT base's width, over 256 tokens, for benchmarks/systems."""
    sizes = Sizes(width=768, hidden=3072, experts=8)
    return Sparse(sizes).eval(), (torch.randn(256, sizes.width),)


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    torch.manual_seed(0)
    sizes = Sizes()
    print(f"{'':13}" + "".join(f"{modality:>13}" for modality in MODALITIES))
    for architecture in ARCHITECTURES:
        model = build(architecture, sizes)
        artifact = compiled(model, architecture, sizes)
        line = f"{architecture:13}"
        for modality in MODALITIES:
            inputs = sequences(modality, sizes)
            with torch.no_grad():
                expected = answers(model, architecture, inputs, sizes)
            error = (answers(artifact, architecture, inputs, sizes) - expected).abs().max()
            line += f"{float(error):13.0e}"
        print(f"{line}  {len(artifact.blocks)} MoE block(s)")
    print("greatest difference to eager, by one artifact a line")


if __name__ == "__main__":
    main()
