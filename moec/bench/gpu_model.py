"""A roofline model of the time of a MoE layer on a GPU. Nothing in it was measured by moec.

    expected = max(bytes / (bandwidth * 0.75), FLOPs / peak of mma.sync) + its launches    a kernel
    limit    = max(bytes / bandwidth, FLOPs / peak of tensor cores)

The shares are assumptions, based on published measurements of such kernels: 75 % of a GPU's
bandwidth; with mma.sync 60 % of the peak, and on GPUs whose peak needs wgmma or tcgen05 as many
FLOPs per SM as on an H100, about 350 TFLOP/s in total; with wgmma half of the peak.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from moec.codegen.cuda.roofline import (
    AttentionShape,
    LayerShape,
    Work,
    attention_work,
    layer_seconds,
    layer_work,
)
from moec.target.cuda import TARGETS, CudaTarget

LAYERS = {
    "olmoe-1b-7b": LayerShape(64, 8, 2048, 1024),
    "granite-1b-a400m": LayerShape(32, 8, 1024, 512),
    "qwen3-30b-a3b": LayerShape(128, 8, 2048, 768),
    "mixtral-8x7b": LayerShape(8, 2, 4096, 14336),
    "deepseek-v2-lite": LayerShape(64, 6, 2048, 1408),
}
HEADS = {
    "olmoe-1b-7b": AttentionShape(2048, 16, 16, 128),
    "granite-1b-a400m": AttentionShape(1024, 16, 8, 64),
    "qwen3-30b-a3b": AttentionShape(2048, 32, 4, 128),
    "mixtral-8x7b": AttentionShape(4096, 32, 8, 128),
}
"""Without deepseek-v2-lite, whose latent attention has other products."""
PHASES = (
    *((texts, 1, past) for texts in (1, 16) for past in (1024, 16384)),
    *((1, new, 0) for new in (64, 1024, 4096)),
)
"""Texts, new tokens of each, and tokens of each in the cache: decode, then prefill."""
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)

_BANDWIDTH, _PEAK, _PER_SM, _WGMMA = 0.75, 0.6, 350e12 / 132, 0.5
_PHASE = "texts x new after past"
LAUNCH = 3e-6
"""Seconds from the end of a kernel to the start of the next, outside of a CUDA graph."""


@dataclass(frozen=True)
class Published:
    """A published time of a complete layer; `gpu` is the target it was measured on, None where the
    source does not name it."""

    layer: str
    tokens: int
    seconds: float
    what: str
    source: str
    gpu: CudaTarget | None = None

    @property
    def share(self) -> float | None:
        """The share of the limit; None where the GPU is not known."""
        if self.gpu is None:
            return None
        return layer_seconds(LAYERS[self.layer], self.tokens, self.gpu) / self.seconds


_A100_40 = replace(TARGETS["cuda:sm_80"], example="A100 PCIe 40 GB", bandwidth=1.555e12)
_UNTUNED, _FP8 = "vLLM Triton bf16, untuned", "vLLM Triton fp8"
PUBLISHED = (
    *(
        Published("qwen3-30b-a3b", tokens, us * 1e-6, _UNTUNED, "vllm#19049", _A100_40)
        for tokens, us in ((1, 109), (16, 611), (96, 943))
    ),
    *(
        Published("qwen3-30b-a3b", tokens, us * 1e-6, f"{_FP8}, GPU not named", "vllm#24700")
        for tokens, us in ((1, 40), (8, 119), (64, 237), (128, 248), (512, 286))
    ),
    *(
        Published("qwen3-30b-a3b", tokens, us * 1e-6, f"{_FP8}, L40S", "vllm#53710")
        for tokens, us in ((4, 190), (128, 870), (8192, 3196))
    ),
)
OTHER_RATES = (
    ("DeepGEMM fp8 grouped, 4 x 8192 rows, N 4096, K 7168, H800", "1381 TFLOP/s", "DeepGEMM#74"),
    ("static batching, bf16, share of the peak, H800", "91 %", "arXiv 2501.16103"),
    ("FlashInfer CuTe-DSL bf16 over its CUTLASS, H200", "1.16 x", "FlashInfer design doc"),
)


@dataclass(frozen=True)
class Expected:
    """One kernel: expected seconds, their limit, and what limits them (`bound`)."""

    kernel: str
    expected: float
    limit: float
    bound: str


def expected(layer: LayerShape, tokens: int, target: CudaTarget) -> tuple[Expected, ...]:
    """The kernels of a layer in their order."""
    return expected_of(layer_work(layer, tokens), target)


def expected_of(kernels: Iterable[Work], target: CudaTarget) -> tuple[Expected, ...]:
    return tuple(_expected(work, target) for work in kernels)


def _expected(work: Work, target: CudaTarget) -> Expected:
    moving = work.bytes / (target.bandwidth * _BANDWIDTH)
    by_wgmma = work.is_product and "wgmma" in target.tensor_cores
    computing = work.flops / (_WGMMA * target.bf16_peak if by_wgmma else mma_peak(target))
    bound = "tensor cores" if computing > moving else "bandwidth"
    least = max(moving, computing)
    return Expected(work.kernel, least + work.launches * LAUNCH, work.seconds(target), bound)


def mma_peak(target: CudaTarget) -> float:
    """FLOP/s that products by mma.sync are expected to reach."""
    newer = set(target.tensor_cores) - {"mma"}
    return min(_PEAK * target.bf16_peak, _PER_SM * target.sms if newer else target.bf16_peak)


def lines(target: CudaTarget) -> Iterator[str]:
    """The table as text."""
    yield f"A model of {target.example} ({target.name}), of 16-bit experts: nothing was measured."
    yield "Each number is the expected time in microseconds, and its share of the roofline."
    names = [work.kernel for work in layer_work(LAYERS["olmoe-1b-7b"], 1)]
    yield _row("layer", "T", [*names, "layer"], "bound by")
    for name, layer in LAYERS.items():
        for tokens in TOKENS:
            yield _row_of(name, str(tokens), expected(layer, tokens, target))
    yield ""
    yield "Attention with its products, of texts x new tokens after tokens in the cache:"
    names = [work.kernel for work in attention_work(HEADS["olmoe-1b-7b"], 1, 1, 0)]
    yield _row("layer", _PHASE, [*names, "all"], "bound by")
    for name, shape in HEADS.items():
        for texts, new, past in PHASES:
            phase = f"{texts} x {new} after {past}".rjust(len(_PHASE))
            kernels = expected_of(attention_work(shape, texts, new, past, target.sms), target)
            yield _row_of(name, phase, kernels)
    yield ""
    yield "Published times of complete layers, measured by others on the GPU that is named:"
    for entry in PUBLISHED:
        share = "" if entry.share is None else f", {entry.share:.0%} of the limit"
        gpu = f", {entry.gpu.example}" if entry.gpu else ""
        yield (
            f"{entry.layer:18} T = {entry.tokens:5} {entry.seconds * 1e6:7.0f} us{share}: "
            f"{entry.what}{gpu} ({entry.source})"
        )
    for what, rate, source in OTHER_RATES:
        yield f"{what}: {rate} ({source})"


def _row_of(name: str, tokens: str, kernels: Sequence[Expected]) -> str:
    total, limit = sum(k.expected for k in kernels), sum(k.limit for k in kernels)
    largest = max(kernels, key=lambda k: k.expected)
    cells = [*(_cell(k.expected, k.limit) for k in kernels), _cell(total, limit)]
    return _row(name, tokens, cells, f"{largest.kernel}, {largest.bound}")


def _cell(seconds: float, limit: float) -> str:
    return f"{seconds * 1e6:.1f} {limit / seconds:.0%}"


def _row(name: str, tokens: str, cells: Iterable[str], bound: str) -> str:
    return f"{name:18}{tokens:>5}" + "".join(f"{cell:>14}" for cell in cells) + f"   {bound}"
