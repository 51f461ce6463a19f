"""One artifact for CPUs and GPUs, made on a machine without a GPU.

On a CPU it runs like any other artifact, without CUDA. On a machine with an NVIDIA GPU, the same
file runs with device="cuda" (`moec run FILE --device cuda`); without a GPU, that fails with a
one-sentence error. nvcc or NVRTC makes the machine code; without both, `CUDA_TEXT` stops at the
CUDA C.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import moec
from moec.codegen.backends.cuda.backend import CUDA, CUDA_TEXT
from moec.target import nvidia

D, H, EXPERTS, TOP = 64, 32, 8, 2


class Layer(nn.Module):
    """x [T, D] -> [T, D]: a softmax router over experts with SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * H, D) / D**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, D, H) / H**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP, -1)
        gate, up = torch.einsum("td,tkhd->tkh", x, self.up[ids]).chunk(2, -1)
        rows = torch.einsum("tkh,tkdh->tkd", nn.functional.silu(gate) * up, self.down[ids])
        return (rows * weights[..., None]).sum(1)


def main() -> None:
    torch.manual_seed(0)
    layer, x = Layer().requires_grad_(False), torch.randn(5, D)
    backend = CUDA if nvidia.nvcc() or nvidia.nvrtc() else CUDA_TEXT
    compiled = moec.compile(layer, (x,), target="cpu,cuda:sm_80", backend=backend)
    assert compiled.for_gpu is not None
    assert compiled.for_gpu.gpu is not None
    for kernel in compiled.for_gpu.gpu.launches["sm_80"]:
        print("kernel:", kernel.name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.moec"
        compiled.save(path)
        result = moec.load(path)(x)
        print("on the CPU, from eager:", float((result - layer(x)).abs().max()))
        try:
            on_gpu = moec.load(path, device="cuda")
        except moec.MoecError as error:
            print("on a GPU:", error)
        else:
            print("on a GPU, from eager:", float((on_gpu(x.cuda()).cpu() - layer(x)).abs().max()))


if __name__ == "__main__":
    main()
