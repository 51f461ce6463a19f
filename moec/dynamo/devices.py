"""The target of a graph: the device of its tensors, unless `options` name one of the same kind."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import fx

from moec.arguments import target_of
from moec.dynamo.graph.regions import Region
from moec.dynamo.options import Options
from moec.errors import NoMatch
from moec.runtime.device.device import CPU, CUDA
from moec.target import cuda


def example_of(node: fx.Node) -> torch.Tensor | None:
    """Dynamo's example of the node's first result, mostly a fake tensor."""
    example = node.meta.get("example_value")
    first = example[0] if isinstance(example, tuple) else example
    return first if isinstance(first, torch.Tensor) else None


def devices_of(nodes: Collection[fx.Node]) -> set[str]:
    """The devices of the nodes' results, by torch's names."""
    examples = (example_of(node) for node in nodes)
    return {str(example.device) for example in examples if example is not None}


def on_devices(options: Options, devices: Collection[str]) -> tuple[Options, str]:
    """The options with the target for tensors on these devices, and the device.

    Raises NoMatch for several devices, for one that no kernel is for, and for a target of another
    kind in the options; TargetError for a GPU that does not exist, or is too old.
    """
    if len(devices) > 1:
        names = " and ".join(sorted(devices))
        raise NoMatch(f"its tensors are on {names}: those of a block must be on one device")
    device = next(iter(devices), CPU)
    kind, _, index = device.partition(":")
    if kind not in (CPU, CUDA):
        raise NoMatch(
            f"its tensors are on {device}, and there are kernels for CPUs and NVIDIA GPUs"
        )
    target = options.target
    if target is None:
        target = target_of(CPU, run=True) if kind == CPU else cuda.of_gpu(int(index or 0))
    elif target.kind != kind:
        raise NoMatch(
            f"its tensors are on {device}, and the target {target.name!r} of the options is for "
            "another device: leave it out"
        )
    return replace(options, target=target), device


def check_one_device(region: Region) -> None:
    """Raises NoMatch where the tensors of a region are on two devices."""
    values = (node.meta.get("val") for node in (*region.inputs, *region.params))
    devices = {str(value.device) for value in values if isinstance(value, torch.Tensor)}
    if len(devices) > 1:
        raise NoMatch(f"its tensors are on {' and '.join(sorted(devices))}: it runs on one device")
