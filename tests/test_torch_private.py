"""Private names of torch: each exists in the installed torch, its absence is told, and no other
file has one."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

import moec.torch_private
from moec.torch_private import PRIVATE, MissingTorchName, place
from tests.test_repository import LINKED, ROOT, sources


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(double)


def size_of_an_export() -> Any:
    sizes = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(nn.ReLU(), (torch.ones(3),), dynamic_shapes=sizes)
    return next(node.meta["val"].shape[0].node for node in exported.graph.nodes)


def node_of_dynamo() -> Any:
    nodes: list[fx.Node] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        nodes.extend(node for node in module.graph.nodes if node.op == "placeholder")
        return module.forward

    torch.compile(double, backend=backend)(torch.ones(3))
    torch._dynamo.reset()
    return nodes[0]


EXAMPLES: dict[str, Callable[[], Any]] = {
    "python_function": scripted,
    "expr_of": size_of_an_export,
    "dynamo_source_of": node_of_dynamo,
    "schema_of": lambda: torch.ops.aten.add.Tensor,
    "overload_name_of": lambda: torch.ops.aten.add.Tensor,
    "version_of": lambda: torch.ones(3),
    "address_of": lambda: torch.ones(3).untyped_storage(),
    **dict.fromkeys(
        (
            *("parameters_of", "buffers_of", "passing_buffers_of", "children_of"),
            *("hooks_of", "pre_hooks_of"),
        ),
        lambda: nn.Linear(1, 1),
    ),
}
"""For each attribute of objects, an object that has it."""


@pytest.mark.parametrize("name", PRIVATE)
def test_the_installed_torch_has_the_name(name: str) -> None:
    value = getattr(moec.torch_private, name)
    assert value is not None
    if PRIVATE[name].read:
        assert value(EXAMPLES[name]()) is not None


@pytest.mark.parametrize("name", PRIVATE)
def test_the_absence_of_the_name_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    private = PRIVATE[name]
    words = rf"torch \S+ has no {private.path}, without which moec cannot .*: install torch 2\."
    if private.read:
        with pytest.raises(MissingTorchName, match=words):
            getattr(moec.torch_private, name)(object())
        return

    def absent(path: str) -> Any:
        raise AttributeError(path)

    monkeypatch.setattr("pkgutil.resolve_name", absent)
    with pytest.raises(MissingTorchName, match=words):
        getattr(moec.torch_private, name)
    with pytest.raises(MissingTorchName, match=words):
        place(name)


def test_each_attribute_of_objects_has_an_example() -> None:
    assert EXAMPLES.keys() == {name for name, private in PRIVATE.items() if private.read}


def is_private(path: str) -> bool:
    """Whether a dotted path in torch has a private part; fx.experimental is private as a whole."""
    return any(
        (part.startswith("_") and not part.endswith("__")) or part == "experimental"
        for part in path.split(".")
    )


def private_paths(tree: ast.AST) -> Iterator[str]:
    """The private names of torch that a file imports, or reads as an attribute of what it
    imports."""
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            imported |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names = [a for a in node.names if a.name.split(".")[0] == "torch"]
            imported |= {a.asname or "torch": a.name if a.asname else "torch" for a in names}
            yield from (a.name for a in names if is_private(a.name))
    yield from filter(is_private, imported.values())
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in imported:
            path = ".".join([imported[node.id], *reversed(parts)])
            if is_private(path):
                yield path


READ = {private.attribute for private in PRIVATE.values() if private.read}


def test_private_names_of_torch_stand_in_one_file() -> None:
    uses = []
    for path in sources("moec", *LINKED):
        relative = path.relative_to(ROOT)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        uses += [f"{relative}: {name}" for name in private_paths(tree)]
        uses += [
            f"{relative}: {node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in READ - {"_expr"}
        ]
    assert uses == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch._check(True)",
        "import torch._dynamo",
        "from torch.utils import _pytree",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "from torch.fx import proxy\nproxy._thing.other",
    ],
)
def test_private_names_are_seen(code: str) -> None:
    assert list(private_paths(ast.parse(code)))


def test_public_names_are_not_seen() -> None:
    code = "import torch\nfrom torch.fx import Node\ntorch.nn.Linear.__init__\nNode.meta"
    assert not list(private_paths(ast.parse(code)))
