"""`moec.describe`: a user's description of what the modules of a class compute."""

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
    """Describe what modules of the class `kind` compute, for `moec.compile(descriptions=[...])`.

        moec.describe(MyMoE, router="gate", experts="experts", top_k=2, renormalise=True)

    `router` is a submodule (several: applied one after the other) or a weight [C, D]; `experts` is
    a list of submodules, or stacked parameters together with a `body`; `score` is one of softmax,
    sigmoid, none, relu, softplus, sqrtsoftplus or sparsemixer. Further fields: `renormalise`,
    `eps`, `scale`, `temperature`, `correction`, `groups`, `threshold` with `threshold_on`,
    `capacity` (a mapping: factor, least, per, round_up, dropped), `shared`, `source` and `weighs`.
    Instead of these, `forward(module, *args, **kwargs)` may be a function in plain PyTorch.

    Each module of the class is compared with its description on random inputs; where they differ,
    the compilation raises CaptureError with the input. Raises UsageError for an invalid
    description.
    """
    if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UsageError(f"{kind!r} is no class of modules: give the class, or its name")
    if forward is not None:
        if not callable(forward):
            raise UsageError(f"forward is {forward!r}: give a function of a module and its inputs")
        if description:
            raise UsageError("a description is a forward, or names and numbers: not both")
        return Declared(kind, forward)
    missing = [name for name in ("router", "experts", "top_k") if name not in description]
    if missing:
        raise UsageError(f"the description lacks {', '.join(missing)}")
    return Declared(kind, as_hints(**description))


def read_descriptions(path: Path) -> tuple[Declared, ...]:
    """The descriptions in a YAML file: a mapping from class names to the arguments of `describe`.

    Raises UsageError for a file that cannot be read or does not have this form.
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
