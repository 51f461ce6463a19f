"""The process in which chat templates run: lines of JSON come in and go out.

A template is a program by the artifact's author. Here it has no file, no network beyond what its
sandbox leaves, and MEMORY bytes; its parent ends the process when its time is over.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from functools import cache
from typing import Any, Never

import jinja2
from jinja2 import nodes, sandbox
from jinja2.ext import Extension
from jinja2.parser import Parser

MEMORY = 512 * 2**20
MALFORMED, REJECTED = "malformed", "rejected"
NESTED = "they, or the tools, are nested too deeply"


class GenerationTag(Extension):
    """{% generation %} and {% endgeneration %} mark, for training, what the model writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@cache
def _template(source: str) -> Any:
    """A template in an environment like that of transformers."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Jinja's, without escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> Never:
    raise ValueError(message)


def render(source: str, variables: dict[str, Any] | None) -> dict[str, str]:
    """The text of a template; or an error, and whether the template is malformed or rejected the
    variables. Without variables it is only parsed."""
    try:
        template = _template(source)
        return {"text": "" if variables is None else template.render(variables)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": MALFORMED, "words": f"line {error.lineno}: {error.message}"}
    except RecursionError:
        return {"error": REJECTED, "words": "it calls itself too often"}
    except MemoryError:
        return {"error": REJECTED, "words": f"it needs more than {MEMORY >> 20} MB"}
    except Exception as error:  # whatever the template's code raises
        words = " ".join(str(error).split()) or type(error).__name__
        return {"error": REJECTED, "words": words}


def main() -> None:
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        try:
            answer = render(*json.loads(line))
        except RecursionError:
            answer = {"error": REJECTED, "words": NESTED}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
