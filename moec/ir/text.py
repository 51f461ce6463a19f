"""Graphs as text, and back: `print_graph(parse(text)) == text` for text that moec printed.

    graph main(x: f32[T, 16]; w: f32[4, 16]) {
      size T in [0, 512]
      y: f32[T, 4] = aten.linear.default(x, w) @ mlp.gate
      return y
    }

Attributes follow the inputs as <name=value>; `$1` is input number 1, {2*T} a size. A body is
a graph in braces after the op. `state a -> b` means that buffer a holds b after the call. The
name of a value that is no identifier is quoted: "0.weight".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping

import sympy

from moec.dtypes import DTYPES
from moec.errors import IRError
from moec.ir.graph import Attr, DType, Graph, Op, Ref, State, TensorType, Value
from moec.ir.sizes.dims import Bounds, parse_dim, show_bounds, show_dim

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>"(?:[^"\\]|\\.)*") | (?P<size>\{[^{}\n]*[^{}\s][^{}\n]*\}(?=[\s,>)]))
    | (?P<number>-?(?:\d+\.?\d*(?:e[+-]?\d+)?|inf\b|nan\b)) | (?P<ref>\$\d+)
    | (?P<arrow>->) | (?P<name>[A-Za-z_][\w.]*) | (?P<mark>[()\[\]{}<>=:;,@])
    )""",
    re.VERBOSE,
)
_SHAPE = re.compile(r"\[([^\[\]]*)\]")


def print_graph(graph: Graph) -> str:
    return "\n".join(_lines(graph)) + "\n"


def _lines(graph: Graph) -> Iterator[str]:
    inputs = ", ".join(map(_typed, graph.inputs))
    params = ", ".join(map(_typed, graph.params))
    yield f"graph {graph.name}({inputs}{'; ' + params if params else ''}) {{"
    for name, bounds in graph.bounds.items():
        size = name if name.isidentifier() else f"{{{name}}}"
        yield f"  size {size} in {show_bounds(bounds)}"
    for op in graph.ops:
        outputs = ", ".join(map(_typed, op.outputs))
        line = f"  {outputs} = {op.name}({', '.join(_quote(v.name) for v in op.inputs)})"
        if op.attrs:
            line += f" <{', '.join(f'{k}={show_attr(v)}' for k, v in op.attrs.items())}>"
        if op.origin:
            line += f" @ {_quote(op.origin)}"
        if op.body is None:
            yield line
            continue
        yield line + " {"
        yield from ("    " + inner for inner in _lines(op.body))
        yield "  }"
    for state in graph.states:
        yield f"  state {_quote(state.before.name)} -> {_quote(state.after.name)}"
    yield f"  return {', '.join(_quote(v.name) for v in graph.outputs)}"
    yield "}"


def _typed(value: Value) -> str:
    return f"{_quote(value.name)}: {value.type}"


def _quote(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z_][\w.]*", text) else json.dumps(text)


def show_attr(value: Attr) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case float():
            return repr(value)
        case str():
            return json.dumps(value)
        case Ref(index):
            return f"${index}"
        case DType(name):
            return name
        case tuple():
            return f"({', '.join(map(show_attr, value))})"
        case sympy.Expr():
            return "{" + show_dim(value) + "}"
        case _:
            return str(value)


def parse(text: str) -> Graph:
    """Parse a graph. Raises IRError with the line of the first error."""
    reader = _Reader(text)
    try:
        graph = reader.graph()
        reader.end()
    except (ValueError, RecursionError) as error:  # numbers and strings, and how deep they nest
        raise reader.fail(f"a graph ({error})") from error
    return graph


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.kind, self.token = "", ""
        self.next()

    def fail(self, expected: str) -> IRError:
        line = self.text.count("\n", 0, self.at) + 1
        token = self.token or "the end"
        return IRError(f"line {line}: expected {expected}, found {token!r}")

    def next(self) -> str:
        """Advance to the next token; returns the current one."""
        left = self.token
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            if self.text[self.at :].strip():
                self.token = self.text[self.at :].strip()[:1]
                raise self.fail("a token")
            self.kind, self.token = "end", ""
            return left
        self.start = match.start(match.lastgroup or 0)
        self.kind, self.token = match.lastgroup or "", match.group(match.lastgroup or 0)
        self.at = match.end()
        return left

    def take(self, token: str) -> None:
        if self.token != token:
            raise self.fail(repr(token))
        self.next()

    def skip(self, token: str) -> bool:
        if self.token == token and self.kind != "string":
            self.next()
            return True
        return False

    def name(self) -> str:
        if self.kind != "name":
            raise self.fail("a name")
        return self.next()

    def value_name(self) -> str:
        """The name of a value, quoted if it is no identifier: "0.weight"."""
        return str(json.loads(self.next())) if self.kind == "string" else self.name()

    def end(self) -> None:
        if self.kind != "end":
            raise self.fail("the end")

    def type(self) -> TensorType:
        dtype = self.name()
        match = _SHAPE.match(self.text, self.start)
        if dtype not in DTYPES or self.token != "[" or match is None:
            raise self.fail("a type such as f32[T, 16]")
        self.at = match.end()
        self.next()
        shape = tuple(parse_dim(part.strip()) for part in _split(match.group(1)))
        return TensorType(dtype, shape)

    def typed(self) -> Value:
        name = self.value_name()
        self.take(":")
        return Value(name, self.type())

    def typed_list(self, *stops: str) -> tuple[Value, ...]:
        values: list[Value] = []
        while self.token not in stops:
            values.append(self.typed())
            if not self.skip(","):
                break
        return tuple(values)

    def graph(self) -> Graph:
        self.take("graph")
        name = self.name()
        self.take("(")
        inputs = self.typed_list(";", ")")
        params = self.typed_list(")") if self.skip(";") else ()
        self.take(")")
        self.take("{")
        scope = {value.name: value for value in (*inputs, *params)}
        bounds: dict[str, Bounds] = {}
        ops: list[Op] = []
        states: list[State] = []
        while True:
            if self.kind == "string":
                ops.append(self.op(self.value_name(), scope))
                continue
            word = self.name()
            if word == "return" and self.token != ":":
                outputs = self.used_list(scope)
                self.take("}")
                return Graph(inputs, params, tuple(ops), outputs, tuple(states), bounds, name)
            if word == "size" and self.token != ":":
                size = self.bounded_size()
                self.take("in")
                bounds[size] = self.bounds()
            elif word == "state" and self.token != ":":
                before = self.used(scope)
                self.take("->")
                states.append(State(before, self.used(scope)))
            else:
                ops.append(self.op(word, scope))

    def used(self, scope: Mapping[str, Value]) -> Value:
        name = str(json.loads(self.token)) if self.kind == "string" else self.token
        if name not in scope:
            raise self.fail("a value that is defined above")
        self.next()
        return scope[name]

    def used_list(self, scope: Mapping[str, Value]) -> tuple[Value, ...]:
        values: list[Value] = []
        while self.kind in ("name", "string"):
            values.append(self.used(scope))
            if not self.skip(","):
                break
        return tuple(values)

    def bounded_size(self) -> str:
        """A named size, or an expression of some in braces."""
        return show_dim(parse_dim(self.next()[1:-1])) if self.kind == "size" else self.name()

    def bounds(self) -> Bounds:
        self.take("[")
        low = int(self.next())
        self.take(",")
        high = self.next()
        self.take("]")
        return Bounds(low, None if high == "inf" else int(high))

    def op(self, first: str, scope: dict[str, Value]) -> Op:
        self.take(":")
        outputs = [Value(first, self.type())]
        while self.skip(","):
            outputs.append(self.typed())
        self.take("=")
        name = self.name()
        self.take("(")
        inputs = self.used_list(scope)
        self.take(")")
        attrs: dict[str, Attr] = {}
        if self.skip("<"):
            while not self.skip(">"):
                key = self.name()
                self.take("=")
                attrs[key] = self.attr()
                self.skip(",")
        origin = ""
        if self.skip("@"):
            token = self.token
            origin = json.loads(token) if self.kind == "string" else token
            self.next()
        body = None
        if self.skip("{"):
            body = self.graph()
            self.take("}")
        scope |= {value.name: value for value in outputs}
        return Op(name, inputs, tuple(outputs), attrs, body, origin)

    def attr(self) -> Attr:
        kind, token = self.kind, self.token
        self.next()
        if token == "(" and kind == "mark":
            items: list[Attr] = []
            while not self.skip(")"):
                items.append(self.attr())
                self.skip(",")
            return tuple(items)
        if kind == "string":
            return str(json.loads(token))
        if kind == "ref":
            return Ref(int(token[1:]))
        if kind == "size":
            return parse_dim(token[1:-1])
        if kind == "number" or token in ("inf", "nan"):
            number = float(token)
            return number if re.search(r"[.einfa]", token) or math.isinf(number) else int(token)
        words: dict[str, Attr] = {"none": None, "true": True, "false": False}
        if token in words:
            return words[token]
        if token in DTYPES:
            return DType(token)
        raise self.fail("the value of an attribute")


def _split(text: str) -> list[str]:
    """The parts between the commas outside parentheses."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += character
    return [*parts, part] if part.strip() else parts
