"""Checks the arguments of `moec.compile`, before anything that takes time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec.capture.source import Source
from moec.dtypes import MODEL_DTYPES, SHORT_NAMES
from moec.errors import UsageError
from moec.passes.approximate.choices.choose_experts import ChooseExperts, passes_of
from moec.passes.approximate.choices.model_choices import ModelChoices, read_choices
from moec.passes.approximate.training.recover_routers import RecoverRouters
from moec.passes.calibration.budget import Budget, parse_budget
from moec.passes.calibration.files import check as check_calibration
from moec.passes.calibration.session import Approximate
from moec.passes.quantise.codes import QuantisingPass
from moec.passes.quantise.fixed_formats import FixedFormats
from moec.pipeline import PassSpec
from moec.target.cpu import NULL, CpuTarget
from moec.target.cuda import TF32, CudaTarget
from moec.target.named import AnyTarget, missing_features, parse, parse_both
from moec.torch_private import pytree

DTYPES = {name: getattr(torch, name) for name in MODEL_DTYPES}


def example_inputs(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the named example inputs; a single tensor counts as a tuple of one.

    Raises UsageError for anything but a tuple or list, a mapping by name, and torch tensors.
    """
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not isinstance(args, tuple | list):
        raise UsageError(
            f"args is a {type(args).__name__}: give the example inputs as a tuple, or by name "
            "in kwargs"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise UsageError(
            f"kwargs is a {type(kwargs).__name__}: give the example inputs by name, in a dict"
        )
    named = dict(kwargs or {})
    for leaf in pytree.tree_leaves((tuple(args), named)):
        if isinstance(leaf, np.ndarray):
            raise UsageError(
                "an example input is a numpy array: give torch tensors (torch.from_numpy); the "
                "compiled model takes either"
            )
        if isinstance(leaf, torch.Tensor) and leaf.layout is not torch.strided:
            raise UsageError(
                f"an example input has the layout {leaf.layout}: moec takes dense tensors "
                "(tensor.to_dense())"
            )
    return tuple(args), named


def text(name: str, value: Any) -> str:
    """`value`, if it is text. Raises UsageError otherwise."""
    if not isinstance(value, str):
        raise UsageError(f'{name} is a {type(value).__name__}: give text such as "+a,-b"')
    return value


def changes(value: Any) -> Any:
    """Changes of the passes: text, or a list of texts and passes. Raises UsageError otherwise."""
    return list(value) if isinstance(value, list | tuple) else text("passes", value)


QUICK, FULL, LAYERS, WHOLE = "quick", "full", "layers", "whole"
"""Ways to verify: graph and weights alone, or all questions; where weights stay in files, they are
read once for all inputs (LAYERS, as in FULL), or for each."""


def verification(verify: Any) -> tuple[bool | float, str]:
    """Whether to verify, or the greatest error allowed; and the way, by default FULL.

    Raises UsageError for anything but "off", a way, True, False and a number that is not negative.
    """
    if verify in ("off", QUICK, FULL, LAYERS, WHOLE):
        return verify != "off", verify
    limit = tolerance(verify)
    return (bool(verify) if limit is None else limit), FULL


def tolerance(verify: Any) -> float | None:
    """The greatest error that `verify` allows; None where the dtype decides.

    Raises UsageError for anything but True, False and a number that is not negative.
    """
    if isinstance(verify, bool):
        return None
    if not isinstance(verify, int | float) or not verify >= 0:
        raise UsageError(
            f'verify is {verify!r}: give "off", "quick", "full" or the greatest error allowed, '
            "such as 1e-4"
        )
    return float(verify)


def both_targets(target: Any) -> tuple[Any, CudaTarget | None]:
    """The target, and the GPU target beside it (cpu,cuda:sm_80), or None. Raises TargetError."""
    return parse_both(target) if isinstance(target, str) else (target, None)


def target_of(target: Any, *, run: bool) -> AnyTarget:
    """The target by name. `run` is True if its code will run here, for example for verification.

    Raises TargetError for an unknown name, UsageError where this machine cannot run the code.
    """
    if not isinstance(target, str | CpuTarget | CudaTarget):
        raise UsageError(f"target is a {type(target).__name__}: give the name of a target")
    parsed = parse(target) if isinstance(target, str) else target
    if run and parsed.kind == NULL:
        raise UsageError(
            f"the target {NULL!r} generates no code, so there is nothing to verify: switch "
            "verification off (verify=False, --verify off)"
        )
    absent = missing_features(parsed)
    if run and absent:
        raise UsageError(
            f"this machine lacks {', '.join(absent)}, so the result for {parsed.name} cannot be "
            'verified here: verify its graph and weights alone (verify="quick", --verify quick)'
        )
    return parsed


def allowed_budget(
    requested: Sequence[PassSpec], chosen: Sequence[PassSpec], calib: Any, budget: str, strict: bool
) -> Budget:
    """The budget. Raises UsageError where passes lack what they need, or where an option is given
    that no pass uses."""
    for pass_ in chosen:
        if calib is None and isinstance(pass_, FixedFormats) and pass_.calibrated:
            raise UsageError(
                "the choices have codes that GPTQ chooses on data: give that of moec optimize with "
                "--calib (calib=... in Python), or write codes: nearest"
            )
        if calib is None and isinstance(pass_, ChooseExperts) and pass_.needs_data:
            raise UsageError(
                "the choices have constants, means of experts' results on data: give that of moec "
                "optimize with --calib (calib=... in Python)"
            )
        if calib is None and isinstance(pass_, RecoverRouters):
            raise UsageError(
                "the choices have routers that are trained on data: give that of moec optimize "
                "with --calib (calib=... in Python), or write recover: 0"
            )
        if isinstance(pass_, Approximate) and calib is None:
            raise UsageError(
                f"{pass_.name} needs calibration data: give --calib FILE (calib=... in Python)"
            )
    if strict and not budget:
        raise UsageError("--strict fails when the budget is exceeded: give --budget too")
    changes = any(isinstance(pass_, Approximate) for pass_ in requested)
    if budget and not changes:
        raise UsageError(
            "--budget limits passes that change the model, and no such pass was requested; see "
            "moec list passes"
        )
    quantises = any(isinstance(pass_, QuantisingPass | ChooseExperts) for pass_ in requested)
    if calib is not None and not changes and not quantises:
        raise UsageError(
            "--calib is for passes that change the model and for --quant, and neither was "
            "requested; see moec list passes"
        )
    if calib is not None:
        check_calibration(calib)
    return parse_budget(budget)


def with_choices(choices: Any, passes: Any, quant: str | None) -> tuple[Any, str | None]:
    """The changes of the passes, and the format of weights, with `choices`: those of moec optimize,
    or the path of their file. Raises UsageError."""
    if choices is None:
        return changes(passes), quant
    if quant is not None:
        raise UsageError("choices have the formats of weights: leave quant out")
    if isinstance(choices, str | Path):
        choices = read_choices(Path(choices))
    if not isinstance(choices, ModelChoices):
        raise UsageError(f"choices is a {type(choices).__name__}: give the path of their file")
    others = changes(passes)
    others = [others] if isinstance(others, str) else others
    return [*others, *passes_of(choices)], "none"


def check_tf32(target: AnyTarget, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises UsageError for a target with TF32 where no weight is float32."""
    if not isinstance(target, CudaTarget) or not target.tf32:
        return
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if torch.float32 not in dtypes:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UsageError(
            f"target {target.name!r}: TF32 is for products of float32, and the weights of this "
            f"model are {names or 'no floats'}: leave {TF32} out"
        )


def cast(source: Source, dtype: Any) -> Source:
    """The source with its weights (in place) and its float inputs converted to `dtype`.

    Raises UsageError for a dtype in which models are not computed.
    """
    if dtype is None:
        return source
    torch_dtype = DTYPES.get(SHORT_NAMES.get(dtype, dtype)) if isinstance(dtype, str) else dtype
    if torch_dtype is None or torch_dtype not in DTYPES.values():
        raise UsageError(f"dtype {dtype}: models are {', '.join(DTYPES)}")
    if not isinstance(source.model, torch.nn.Module):
        raise UsageError(
            "the weights of an exported program cannot be converted: convert the "
            "module, and export it again"
        )

    def converted(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(torch_dtype) if floating else value

    args, kwargs = pytree.tree_map(converted, (source.args, dict(source.kwargs)))
    for parameter in source.model.parameters():
        if parameter.is_floating_point():
            parameter.data = source.memory.cast(parameter.data, torch_dtype)
    return replace(source, model=source.model.to(torch_dtype), args=args, kwargs=kwargs)
