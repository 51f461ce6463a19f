"""What ptxas makes of the kernels of MoE blocks, without a GPU: registers, spills, instructions.

    python -m benchmarks.cuda.machine_code              two blocks on six architectures
    python -m benchmarks.cuda.machine_code --families   products of experts of ten families, sm_90a

A line per kernel: its accesses to local memory (LDL, STL), which spilled registers and arrays
indexed by a variable need, and its instructions of wgmma and TMA (HGMMA, UTMALDG). It fails where a
kernel has local memory, or where a product of experts on sm_90a lacks wgmma or TMA. It needs nvcc
or NVRTC, and nvdisasm, of $PATH or NVIDIA's wheels.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tvm import IRModule
from tvm.tirx import PrimFunc

from moec.codegen.backends.cuda.backend import CUDA, cubin, launched
from moec.codegen.cuda.compiler.source import lowered
from moec.codegen.lower import lower
from moec.ir.graph import Module, Program
from moec.ir.text import parse
from moec.target import cuda, nvidia
from moec.target.cuda import CudaTarget

COUNTED = ("LDL", "STL", "HGMMA", "UTMALDG")
PRODUCTS = ("gathered", "grouped")
BOTH, NEWER = "cuda:sm_80,sm_90a", "cuda:sm_90a"
TEN = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"),
    *("gpt_oss", "granitemoe", "phimoe", "jetmoe"),
)
BLOCK = """graph main(x: bf16[T, {d}]; g: bf16[{e}, {h}, {d}], u: bf16[{e}, {h}, {d}],
    w: bf16[{e}, {d}, {h}], {params}) {{
  size T in [0, inf]
{logits}
  s: f32[T, {k}], i: i64[T, {k}] = moe.route(logits{corrected}) <k={k}, {route}>
  order: i32[{k}*T], slots: i32[T, {k}], ends: i32[{e}] = moe.sort(i) <num_experts={e}>
  a: bf16[{k}*T, {h}] = grouped.linear(x, ends, g, u, order) <matrices=2, dtype=bf16, gather={k}> {{
    graph body(left: bf16[R, {h}], right: bf16[R, {h}]) {{
      activated: bf16[R, {h}] = aten.silu.default(left)
      joined: bf16[R, {h}] = aten.mul.Tensor(activated, right)
      return joined
    }}
  }}
  y: f32[{k}*T, {d}] = grouped.linear(a, ends, w) <matrices=1, dtype=f32>
{shared}
  out: bf16[T, {d}] = moe.combine(y, slots, s{addend})
    <k={k}, tokens={{T}}, dtype=bf16, weighted=true{added}>
  return out
}}"""
SHARED = """  first: bf16[T, 512] = aten.linear.default(x, sg)
  second: bf16[T, 512] = aten.linear.default(x, su)
  activated: bf16[T, 512] = aten.silu.default(first)
  joined: bf16[T, 512] = aten.mul.Tensor(activated, second)
  beside: bf16[T, 2048] = aten.linear.default(joined, sd)
"""
MIXTRAL = {
    **{"d": 4096, "h": 14336, "e": 8, "k": 2},
    "params": "r: bf16[8, 4096]",
    "logits": "  logits: bf16[T, 8] = aten.linear.default(x, r)",
    "route": "renormalize=true",
    **dict.fromkeys(("corrected", "shared", "addend", "added"), ""),
}
DEEPSEEK = {
    **{"d": 2048, "h": 512, "e": 64, "k": 8},
    "params": "r: f32[64, 2048], c: f32[64], sg: bf16[512, 2048], su: bf16[512, 2048], "
    "sd: bf16[2048, 512]",
    "logits": "  wide: f32[T, 2048] = aten._to_copy.default(x) <dtype=f32>\n"
    "  logits: f32[T, 64] = aten.linear.default(wide, r)",
    "corrected": ", c",
    "route": 'score="sigmoid", renormalize=true, epsilon=1e-20, scale=2.5, groups=8, '
    'top_groups=4, group_score="top2sum"',
    **{"shared": SHARED, "addend": ", beside", "added": ", added=true"},
}
BLOCKS: dict[str, Mapping[str, object]] = {"mixtral": MIXTRAL, "deepseek": DEEPSEEK}


def block(name: str) -> Module:
    """A block of BLOCKS, without weights."""
    return Module.of(Program(parse(BLOCK.format(**BLOCKS[name])), {}))


def family(name: str) -> Module:
    """The programs of a small model in bf16."""
    import torch

    import moec
    from tests.models.families import FAMILIES

    of = FAMILIES[name].one_layer()
    model, inputs = of.build(torch.bfloat16), of.inputs(2, 9)
    options = {"target": BOTH, "verify": False, "build": False}
    return moec.compile(model, kwargs=inputs, **options).module


def products(module: IRModule, target: CudaTarget) -> str:
    """The CUDA C of the products of experts alone."""
    named = {v.name_hint: f for v, f in module.functions.items() if isinstance(f, PrimFunc)}
    return lowered(*(f for n, f in named.items() if n.startswith(PRODUCTS)), target=target).source


def instructions(content: bytes) -> dict[str, Counter[str]]:
    """How often each of COUNTED is in the machine code of each kernel of a cubin."""
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        (path := Path(folder, "kernels.cubin")).write_bytes(content)
        text = subprocess.run(
            [_disassembler(), "-c", str(path)], capture_output=True, text=True, check=True
        ).stdout
    _, *parts = re.split(r"^//-+ \.text\.(\w+) +-+$", text, flags=re.M)
    words = re.compile(rf"\b({'|'.join(COUNTED)})\b")
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {name: Counter(words.findall(code)) for name, code in pairs}


def _disassembler() -> str:
    path = ":".join(f"{folder}/bin" for folder in nvidia.wheels())
    program = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=path)
    if program is None:
        raise SystemExit("there is no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return program


def faults(counts: Mapping[str, Counter[str]], spills: int, target: CudaTarget) -> Iterator[str]:
    """What a person should know of the machine code of a target, as sentences."""
    if spills:
        yield f"{spills} bytes of registers are spilled"
    for name, count in counts.items():
        if local := count["LDL"] + count["STL"]:
            yield f"{name} accesses local memory in {local} instructions"
    if "wgmma" in target.tensor_cores:
        for product in PRODUCTS:
            of = [count for name, count in counts.items() if name.startswith(product)]
            if of and not any(count["HGMMA"] and count["UTMALDG"] for count in of):
                yield f"{product} does not use wgmma and TMA"


def check(name: str, source: str, target: CudaTarget) -> bool:
    """Prints a line per kernel; whether there are no faults."""
    compiled = cubin(source, target)
    counts = instructions(compiled.content)
    print(
        f"{name} on {target.arch}: {compiled.registers} registers, {compiled.spills} bytes spilled"
    )
    for kernel, count in counts.items():
        print(f"  {kernel:24}" + "".join(f"{word:>10} {count[word]:3}" for word in COUNTED))
    sentences = list(faults(counts, compiled.spills, target))
    for sentence in sentences:
        print(f"  FAULT: {sentence}")
    return not sentences


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--families", action="store_true", help="products of ten families")
    parser.add_argument("--only", default="", help="blocks or families, with commas between them")
    parser.add_argument("--targets", default=",".join(t.arch for t in cuda.TARGETS.values()))
    options = parser.parse_args(words)
    names = options.only.split(",") if options.only else TEN if options.families else [*BLOCKS]
    right = []
    for name in names:
        if options.families:
            target = cuda.parse(NEWER)
            module = lower(family(name), cuda.parse(BOTH), CUDA).modules[NEWER]
            right.append(check(name, products(module, target), target))
            continue
        for arch in options.targets.split(","):
            target = cuda.parse(f"{cuda.KIND}:{arch}")
            module = lower(block(name), target, CUDA).modules[target.name]
            right.append(check(name, launched(module, target).kernels.source, target))
    if not all(right):
        raise SystemExit(f"{right.count(False)} of {len(right)} have faults")


if __name__ == "__main__":
    main()
