"""Descriptions of NVIDIA GPUs, from which CUDA kernels are generated.

    cuda:sm_80    A100        mma.sync, cp.async
    cuda:sm_86    A40         as sm_80, less shared memory
    cuda:sm_89    L40S        as sm_86, with fp8
    cuda:sm_90a   H100, H200  as sm_80, with wgmma and TMA
    cuda:sm_100a  B200        as sm_80, with tcgen05 and TMA
    cuda:sm_120   RTX 5090    as sm_89, with TMA
    cuda          this machine's GPU

Several, as in cuda:sm_80,sm_90a, are one target: the kernels of each, and those that the newest
would have without the instructions of its chip alone, as PTX for later GPUs. With +tf32 at the end,
as in cuda:sm_80+tf32, products of float32 for many rows use tensor cores, which round each factor
to 11 bits (TF32).

Limits of a block are those of the CUDA C++ Programming Guide (Compute Capabilities). SM counts are
from the data sheet of the GPU named as `example`. They determine the sizes of kernels, never
results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.errors import TargetError, TargetNameError
from moec.target import cpu, nvidia

KIND = "cuda"
TF32 = "+tf32"
HOST = cpu.TARGETS["generic"]
"""The CPU target of the code that launches kernels."""


@dataclass(frozen=True)
class CudaTarget:
    """One GPU architecture from the view of kernels, or several, whose sizes are the least."""

    name: str
    example: str
    tensor_cores: tuple[str, ...]  # families of instructions, by their names in PTX
    shared_memory: int  # bytes available to one block
    sms: int
    registers: int = 65536  # 32-bit, of one SM
    tf32: bool = False
    kind: str = KIND

    @property
    def archs(self) -> tuple[str, ...]:
        """The architectures for which code is compiled, in nvcc's notation."""
        return tuple(self.name.removesuffix(TF32).partition(":")[2].split(","))

    @property
    def arch(self) -> str:
        """The oldest architecture."""
        return self.archs[0]

    @property
    def capability(self) -> tuple[int, int]:
        return nvidia.capability_of(self.arch)

    @property
    def needs(self) -> cpu.CpuNeeds:
        """The CPU that the launching code needs."""
        return HOST.needs

    @property
    def parts(self) -> tuple[CudaTarget, ...]:
        """The targets for which code is generated one by one: each architecture alone, and last the
        one whose code is PTX too. Of a chip whose instructions later ones lack (sm_90a), that is
        one without them (sm_90), which has no cubin."""
        alone: tuple[CudaTarget, ...] = (self,)
        end = TF32 if self.tf32 else ""
        if len(self.archs) > 1:
            names = (f"{KIND}:{arch}" for arch in self.archs)
            alone = tuple(replace(TARGETS[n], name=n + end, tf32=self.tf32) for n in names)
        newest = alone[-1]
        if not newest.arch.endswith("a"):
            return alone
        name = f"{KIND}:{newest.arch.removesuffix('a')}{end}"
        return (*alone, replace(newest, name=name, tensor_cores=newest.tensor_cores[:1]))

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability runs one of its cubins, or its PTX."""
        later = capability >= nvidia.capability_of(self.archs[-1])
        return later or any(nvidia.runs(arch, capability) for arch in self.archs)

    def tvm(self) -> dict[str, object]:
        """The argument of `tvm.target.Target` that compiles for this GPU."""
        limit = self.shared_memory
        return {"kind": "cuda", "arch": self.arch, "max_shared_memory_per_block": limit}


_SMALL, _A100, _LARGE = 99 * 1024, 163 * 1024, 227 * 1024

TARGETS: dict[str, CudaTarget] = {
    t.name: t
    for t in (
        CudaTarget("cuda:sm_80", "A100 SXM 80 GB", ("mma",), _A100, 108),
        CudaTarget("cuda:sm_86", "A40", ("mma",), _SMALL, 84),
        CudaTarget("cuda:sm_89", "L40S", ("mma",), _SMALL, 142),
        CudaTarget("cuda:sm_90a", "H100 SXM", ("mma", "wgmma"), _LARGE, 132),
        CudaTarget("cuda:sm_100a", "B200", ("mma", "tcgen05"), _LARGE, 148),
        CudaTarget("cuda:sm_120", "RTX 5090", ("mma",), _SMALL, 170),
    )
}


def parse(name: str) -> CudaTarget:
    """The target of that name: one of TARGETS, "cuda:sm_80,sm_90a" for several of them, or "cuda"
    for this machine's first GPU; each also with "+tf32".

    Raises TargetError for another name, and for "cuda" where there is no GPU.
    """
    if name.endswith(TF32):
        target = parse(name.removesuffix(TF32))
        return replace(target, name=target.name + TF32, tf32=True)
    if name in TARGETS:
        return TARGETS[name]
    if name == KIND:
        return of_gpu(0)
    several = [f"{KIND}:{arch}" for arch in name.partition(":")[2].split(",")]
    if len(set(several)) > 1 and TARGETS.keys() >= set(several):
        return _common_target([TARGETS[one] for one in dict.fromkeys(several)])
    names = ", ".join([KIND, *TARGETS])
    raise TargetNameError(f"unknown target {name!r}; the known GPUs are {names}")


def _common_target(targets: list[CudaTarget]) -> CudaTarget:
    """The target of all of these; sizes are those of the oldest."""
    targets = sorted(targets, key=lambda target: target.capability)
    first = targets[0]
    shared = [c for c in first.tensor_cores if all(c in t.tensor_cores for t in targets)]
    return replace(
        first,
        name=f"{KIND}:{','.join(t.arch for t in targets)}",
        example=" and ".join(t.example for t in targets),
        tensor_cores=tuple(shared),
        shared_memory=min(t.shared_memory for t in targets),
    )


def of_gpu(index: int) -> CudaTarget:
    """The target of this machine's GPU of that index. Raises TargetError where there is none, and
    for a GPU that no target is for."""
    driver = nvidia.driver()
    if driver is None or not driver.gpus:
        reason = nvidia.NO_DRIVER if driver is None else "the NVIDIA driver finds no GPU"
        raise TargetError(
            f"target {KIND!r} means this machine's GPU, and {reason}: name the GPU to compile "
            f"for, such as {next(iter(TARGETS))!r}"
        )
    if index >= len(driver.gpus):
        raise TargetError(f"there is no GPU {index}: this machine has {len(driver.gpus)}")
    gpu = driver.gpus[index]
    usable = [t for t in TARGETS.values() if t.runs_on(gpu.capability)]
    if not usable:
        raise TargetError(
            f"target {KIND!r}: {gpu.name} has compute capability {gpu.digits}, and moec generates "
            f"code for {', '.join(TARGETS)}"
        )
    return max(usable, key=lambda t: t.capability)
