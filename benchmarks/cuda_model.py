"""The least time of a MoE layer on a GPU, by the roofline model of codegen/cuda/roofline.py.

    python -m benchmarks.cuda_model --target cuda:sm_90a

Nothing here is measured. The published numbers are of other kernels, on the GPU that is named.
"""

from __future__ import annotations

import argparse

from moec.codegen.cuda.roofline import Layer, layer_seconds, layer_work
from moec.target.cuda import TARGETS, CudaTarget

LAYERS = {
    "olmoe-1b-7b": Layer(64, 8, 2048, 1024),
    "qwen3-30b-a3b": Layer(128, 8, 2048, 768),
    "mixtral-8x7b": Layer(8, 2, 4096, 14336),
    "deepseek-v2-lite": Layer(64, 6, 2048, 1408),
}
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
PUBLISHED = (
    # layer, tokens, microseconds, of what
    ("qwen3-30b-a3b", 1, 109, "vLLM Triton bf16, untuned, A100 PCIe 40 GB (vllm#19049)"),
    ("qwen3-30b-a3b", 16, 611, "vLLM Triton bf16, untuned, A100 PCIe 40 GB (vllm#19049)"),
    ("qwen3-30b-a3b", 96, 943, "vLLM Triton bf16, untuned, A100 PCIe 40 GB (vllm#19049)"),
)


def bound(layer: Layer, tokens: int, target: CudaTarget) -> str:
    """What limits the layer's largest kernel."""
    largest = max(layer_work(layer, tokens), key=lambda work: work.seconds(target))
    compute = largest.flops / target.bf16_peak > largest.bytes / target.bandwidth
    return f"{largest.kernel}, {'tensor cores' if compute else 'bandwidth'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, default="cuda:sm_90a")
    target = TARGETS[parser.parse_args().target]
    print(f"a model for {target.example}, not measured; five launches a layer come on top")
    for name, layer in LAYERS.items():
        for tokens in TOKENS:
            least = layer_seconds(layer, tokens, target) * 1e6
            print(f"{name:18} T = {tokens:5} {least:9.1f} µs  {bound(layer, tokens, target)}")
    print("published:")
    for name, tokens, microseconds, source in PUBLISHED:
        print(f"{name:18} T = {tokens:5} {microseconds:9.1f} µs  {source}")


if __name__ == "__main__":
    main()
