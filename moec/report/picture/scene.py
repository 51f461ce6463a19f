"""Builds the scene of a graph: nested parts in the order of the flow, repeats collapsed.

A part is a module of the source. It is drawn opened if it contains an MoE block or a list of
layers, and as a card otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from moec.ir.graph import Graph, Op, Value
from moec.report.data import WHOLE, Block, DeclinedLine
from moec.report.picture.repeats import ENTRY, Scene, ScenePart, collapse
from moec.report.report import inside, port


@dataclass
class _Module:
    """A module, during the construction of the tree. Children are ordered by their first op."""

    path: str
    children: dict[str, _Module] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    params: list[Value] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    def all_ops(self) -> Iterable[Op]:
        yield from self.ops
        for child in self.children.values():
            yield from child.all_ops()

    def all_params(self) -> Iterable[Value]:
        yield from self.params
        for child in self.children.values():
            yield from child.all_params()

    def at(self, path: str) -> _Module:
        module = self
        for name in path.split(".") if path else ():
            below = f"{module.path}.{name}" if module.path else name
            module = module.children.setdefault(name, _Module(below))
        return module


def scene(
    title: str,
    graph: Graph,
    blocks: Sequence[Block] = (),
    declined: Sequence[DeclinedLine] = (),
) -> Scene:
    """The scene of `graph`; the module of an op is its `origin`."""
    graph = unfused(graph)
    root = _Module("")
    for op in graph.ops:
        root.at(_module_path(op.origin)).ops.append(op)
    for param in graph.params:
        _home(root, param, graph).params.append(param)
    reader = _SceneReader(graph, tuple(blocks), tuple(declined))
    top = reader.opened(root)
    if any(block.name == WHOLE for block in blocks):
        card = reader.closed(root)
        top = replace(card, kind="frame", blocks=(), parts=(replace(card, label="model"),))
    states = {state.before for state in graph.states}
    return Scene(
        title,
        tuple(port(v) for v in graph.inputs if v not in states),
        tuple(port(v) for v in graph.outputs),
        replace(top, label=title),
    )


def _module_path(origin: str) -> str:
    """An origin without the suffix that it may have: 'layers.0.mlp (3 ops)'."""
    return origin.split(" ")[0].split("(")[0].strip(".")


def _path(block: Block) -> str:
    return "" if block.name == WHOLE else block.name


def _home(root: _Module, param: Value, graph: Graph) -> _Module:
    """The module in which a weight is shown: by its name, else the one that reads it."""
    module = root
    for name in param.name.split(".")[:-1]:
        if name not in module.children:
            break
        module = module.children[name]
    if module is root and (readers := graph.readers.get(param)):
        return root.at(_module_path(readers[0].origin))
    return module


def numel(value: Value) -> int:
    total = 1
    for dim in value.shape:
        total *= dim if isinstance(dim, int) else 1
    return total


@dataclass(frozen=True)
class _SceneReader:
    graph: Graph
    blocks: tuple[Block, ...]
    declined: tuple[DeclinedLine, ...]

    def blocks_of(self, module: _Module) -> tuple[Block, ...]:
        """The MoE blocks of a module that is a block, or that holds only a block and its router."""
        blocks = tuple(b for b in self.blocks if inside(_path(b), module.path))
        paths = {_path(b) for b in blocks}
        if len(paths) != 1 or not module.path:
            return ()
        (path,) = paths
        if path == module.path:
            return blocks
        kinds = {_kind(c) for c in module.children.values() if not inside(path, c.path)}
        return () if kinds & {"attention", "norm"} else blocks

    def opens(self, module: _Module) -> bool:
        """Whether the inside is drawn: it contains a block, a declined candidate, or layers."""
        if not module.path:
            return bool(module.children)
        if self.blocks_of(module) or not module.children:
            return False
        if any(_module_path(d.where) == module.path for d in self.declined):
            return False
        names = [*(_path(b) for b in self.blocks), *(_module_path(d.where) for d in self.declined)]
        if any(inside(n, module.path) for n in names):
            return True
        layer = module.name.isdigit() and len(module.children) > 1
        return layer or is_list(module) or any(map(is_list, module.children.values()))

    def part(self, module: _Module) -> ScenePart:
        return self.opened(module) if self.opens(module) else self.closed(module)

    def closed(self, module: _Module) -> ScenePart:
        params = list(module.all_params())
        blocks = self.blocks_of(module) or tuple(b for b in self.blocks if not module.path)
        total = sum(map(numel, params))
        return ScenePart(
            module.path,
            module.name,
            "moe" if blocks else _kind(module),
            total,
            dict(Counter(op.name for op in module.all_ops())),
            tuple((p.name, str(p.type)) for p in params),
            tied=() if params else _weights_read(self.graph, module),
            blocks=blocks,
            declined=tuple(d for d in self.declined if inside(_module_path(d.where), module.path)),
        )

    def opened(self, module: _Module) -> ScenePart:
        """Children in order, with the additions between them as parts, repeats collapsed."""
        children = [c for c in _without_wrappers(module, self) if not is_position(c)]
        parts, edges = _flow(self.graph, module, children, [self.part(c) for c in children])
        parts, edges = collapse(parts, edges)
        parameters = sum(map(numel, module.params))
        return ScenePart(
            module.path,
            module.name,
            "frame",
            parameters + sum(p.parameters * p.times for p in parts),
            dict(Counter(op.name for op in module.all_ops())),
            declined=tuple(d for d in self.declined if _module_path(d.where) == module.path),
            parts=tuple(parts),
            edges=edges,
        )


def _weights_read(graph: Graph, module: _Module) -> tuple[str, ...]:
    read = (value for op in module.all_ops() for value in op.inputs if value in graph.params)
    return tuple(dict.fromkeys(value.name for value in read))


def is_list(module: _Module) -> bool:
    """Whether it is a ModuleList of layers: no ops or params, children with numbers."""
    return (
        bool(module.children) and not module.ops and all(name.isdigit() for name in module.children)
    )


def _without_wrappers(module: _Module, reader: _SceneReader) -> Iterable[_Module]:
    """Children in the order of their first op; modules that only wrap others are left out."""
    order = {id(op): i for i, op in enumerate(reader.graph.ops)}

    def first(child: _Module) -> int:
        return min((order[id(op)] for op in child.all_ops()), default=len(order))

    stacks = [c for c in module.children.values() if any(map(is_list, c.children.values()))]
    for child in sorted(module.children.values(), key=first):
        wraps = stacks == [child] and not child.name.isdigit()
        if is_list(child) or (wraps and reader.opens(child)):
            yield from _without_wrappers(child, reader)
        elif not is_silent(child):
            yield child


def is_silent(module: _Module) -> bool:
    """Whether it computes nothing: dropout in evaluation, a container without ops."""
    passing = all(
        op.name in ("aten.alias.default", "aten.clone.default") for op in module.all_ops()
    )
    return passing and not any(True for _ in module.all_params())


def is_position(module: _Module) -> bool:
    """Whether it is a rotary embedding, which all layers read and the main flow does not pass."""
    return "rotary" in module.name.lower() and not module.children


MOVES = ("aten.reshape.default", "aten.alias.default", "aten.clone.default")


def _flow(
    graph: Graph, module: _Module, children: Sequence[_Module], parts: Sequence[ScenePart]
) -> tuple[list[ScenePart], tuple[tuple[int, int], ...]]:
    """The parts with additions between them, and the connections that skip parts.

    All other ops of the module itself (views, casts) are passed through.
    """
    owner = {op: i for i, child in enumerate(children) for op in child.all_ops()}
    own_ops = {op for op in module.all_ops()}
    flow: list[ScenePart] = []
    index_of: dict[int, int] = {}
    ends: dict[int, int] = {}  # by child: the part that computes its results
    sources: dict[Value, int] = {}
    edges: list[tuple[int, int]] = []
    for op in graph.ops:
        if op not in own_ops:
            continue
        if op in owner:
            at = owner[op]
            if at not in index_of:
                index_of[at] = ends[at] = len(flow)
                flow.append(parts[at])
            if (addend := folded_addend(op)) is not None:
                source = sources.get(addend, ENTRY)
                if source != index_of[at]:  # a residual that is added inside the combine
                    ends[at] = len(flow)
                    flow.append(ScenePart(f"{module.path}.{op.outputs[0].name}", "+", "sum"))
                    edges += [(source, ends[at])] if source < ends[at] - 1 else []
            moves = op.name in MOVES and any(value in sources for value in op.inputs[:1])
            sources |= dict.fromkeys(op.outputs, sources[op.inputs[0]] if moves else ends[at])
            continue
        origins = [sources.get(v, ENTRY) for v in op.inputs if v not in graph.params]
        if folded_addend(op) is not None:
            origins = [max(origins[:-1], default=ENTRY), origins[-1]]
        if (is_sum(op) or folded_addend(op)) and len(set(origins)) == 2:
            here = len(flow)
            flow.append(
                ScenePart(f"{module.path}.{op.outputs[0].name}", "+", "sum", ops={op.name: 1})
            )
            edges += [(s, here) for s in sorted(set(origins)) if s < here - 1]
            sources |= dict.fromkeys(op.outputs, here)
        else:
            sources |= dict.fromkeys(op.outputs, max(origins, default=ENTRY))
    for i, part in enumerate(parts):
        if i not in index_of:
            flow.append(part)
    return flow, tuple(edges)


def folded_addend(op: Op) -> Value | None:
    """The addend of a combine; None without one."""
    return op.inputs[-1] if op.name == "moe.combine" and op.attrs.get("added") else None


def is_sum(op: Op) -> bool:
    """Whether it adds two tensors of the same shape: a residual connection."""
    return (
        op.name == "aten.add.Tensor"
        and len(op.inputs) == 2
        and op.inputs[0].shape == op.inputs[1].shape
        and len(op.inputs[0].shape) >= 2
    )


def _kind(module: _Module) -> str:
    """The kind of a module that is no MoE block, from its ops and its name."""
    names = Counter(op.name for op in module.all_ops())
    name = module.name.lower()
    linears = sum(
        names[n] for n in ("aten.linear.default", "aten.addmm.default", "aten.mm.default")
    )
    if "norm" in name:
        return "norm"
    if any("attention" in n for n in names) or "attn" in name or "attention" in name:
        return "attention"
    if names["aten.embedding.default"]:
        return "embedding"
    if not linears and any("norm" in n or "rsqrt" in n for n in names):
        return "norm"
    if linears > 1:
        return "mlp"
    return "linear" if linears else "other"


# ---- the graph with fused additions and norms back in their modules ------------------


_NORMS = {"rms": "nn.rms_norm", "layer": "aten.layer_norm.default"}


def unfused(graph: Graph) -> Graph:
    """The graph with an addition and a norm for each nn.add_norm. The norm is in the module of its
    weight. The result cannot be evaluated: its ops lack attributes."""
    return replace(graph, ops=tuple(part for op in graph.ops for part in _parts(op)))


def _parts(op: Op) -> Iterator[Op]:
    if op.name != "nn.add_norm" or len(op.inputs) < 2 or len(op.outputs) != 2:
        yield op
        return
    (x, residual, *weights), (total, normalised) = op.inputs, op.outputs
    yield Op("aten.add.Tensor", (x, residual), (total,), origin=op.origin)
    origin = weights[0].name.rpartition(".")[0] if weights else op.origin
    name = _NORMS.get(str(op.attrs.get("kind")), op.name)
    yield Op(name, (total, *weights), (normalised,), origin=origin or op.origin)
