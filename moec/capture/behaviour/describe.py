"""`moec.describe`: what a user says of the modules of a class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from moec.capture.behaviour.door import Declared
from moec.capture.behaviour.forward import Forward
from moec.capture.behaviour.hints import as_hints
from moec.errors import UsageError
from moec.files.os_errors import reason


def describe(
    kind: type[nn.Module] | str, *, forward: Forward | None = None, **description: Any
) -> Declared:
    """What modules of the class `kind` do, for `moec.compile(descriptions=[...])`.

        moec.describe(MyMoE, router="gate", experts="experts", top_k=2, renormalise=True)

    `router` is a submodule (several: one after the other) or a weight [C, D]; `experts` a list
    of submodules, or stacked parameters with a `body`; `score` softmax, sigmoid, none, relu,
    softplus, sqrtsoftplus or sparsemixer. Further: `renormalise`, `eps`, `scale`, `temperature`,
    `correction`, `groups`, `threshold` with `threshold_on`, `capacity` (a mapping: factor, least,
    per, round_up, dropped), `shared`, `source` and `weighs`. Or `forward(module, *args,
    **kwargs)`, in plain PyTorch. With neither, modules of the class are recognised by their
    behaviour even where they can be traced.

    Each module of the class is run beside what is described on random inputs, and the compilation
    raises CaptureError, with the input that shows it, where they differ. Raises UsageError for
    what is no description.
    """
    if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UsageError(f"{kind!r} is no class of modules: give the class, or its name")
    if forward is not None:
        if not callable(forward):
            raise UsageError(f"forward is {forward!r}: give a function of a module and its inputs")
        if description:
            raise UsageError("a description is a forward, or names and numbers: not both")
        return Declared(kind, forward=forward)
    if not description:
        return Declared(kind)
    missing = [name for name in ("router", "experts", "top_k") if name not in description]
    if missing:
        raise UsageError(f"the description lacks {', '.join(missing)}")
    return Declared(kind, as_hints(**description))


def read_descriptions(path: Path) -> tuple[Declared, ...]:
    """The descriptions of a YAML file: a mapping from names of classes to what `describe` takes.

    Raises UsageError for a file that cannot be read or is not of that form.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"{path}: write a class's name and, indented, what its modules do")
    descriptions = []
    for name, description in content.items():
        if not isinstance(description, Mapping | None):
            raise UsageError(f"{path}: {name}: write what it does as name: value")
        try:
            descriptions.append(describe(str(name), **dict(description or {})))
        except (UsageError, TypeError) as error:
            raise UsageError(f"{path}: {name}: {error}") from None
    return tuple(descriptions)
