"""Tests once, on a small module, whether the hooks work with the installed torch."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch.export import Dim, ExportedProgram

from moec.capture.calls.call import ModuleCall
from moec.capture.speculate.trace import trace
from moec.capture.user_code.probe import SpeculationProbe
from moec.torch_private import TESTED, MissingTorchName, symbolic_config


@cache
def hooks_fit() -> bool:
    """Whether the probe module is captured correctly. Warns, once, where it is not."""
    misfit = describe_unknown_torch()
    if misfit:
        warnings.warn(misfit, stacklevel=2)
    return not misfit


def describe_unknown_torch() -> str:
    """One sentence for users about a torch with other private parts; empty where they fit."""
    reason = describe_misfit()
    return reason and (
        f"moec does not know torch {torch.__version__} ({reason}): modules that read data into "
        f"Python are captured only where torch.export takes them (tested: torch {TESTED})"
    )


def describe_misfit() -> str:
    """What went wrong; empty where nothing did."""
    x = torch.randn(5, 3)

    def export(module: torch.nn.Module) -> ExportedProgram:
        options = symbolic_config.patch(backed_size_oblivious=True, use_duck_shape=False)
        with torch.no_grad(), options, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                module, (x,), dynamic_shapes=(({0: Dim.AUTO},),), strict=False
            )

    try:
        traced = trace(ModuleCall(SpeculationProbe(), (x,), {}), export, {})
        met = list(traced.assumed.branches.values())
        results = traced.exported.module(check_guards=False)(x)
    except MissingTorchName as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__} where a small module is traced"
    if met != [False]:
        return "a branch on data is not seen"
    return (
        ""
        if torch.equal(results[0], SpeculationProbe()(x))
        else "a small module gives something else"
    )
