"""The process that renders chat templates: `python -m moec.assistant.template_worker`, messages on stdin and stdout.

What a template may use is what transformers gives it: jinja2's immutable sandbox with trimmed blocks, `break` and
`continue`, `{% generation %}`, `raise_exception`, `strftime_now`, a `tojson` that escapes no HTML, and namespaces
without underscored names. The process writes no file and is bounded in memory; whoever asks bounds its time.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from moec.compiler.worker import serve


class _Refused(Exception):
    """What a template said by `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}` marks what the model writes, for those who train; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """As jinja2's, without names that begin with an underscore."""

    def __init__(*given: Any, **named: Any) -> None:
        self, *rest = given
        values = dict(*rest, **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


class _Dict:
    """`dict` for templates: what makes a dictionary, and nothing else of the class."""

    def __call__(self, *given: Any, **named: Any) -> dict[Any, Any]:
        return dict(*given, **named)

    def fromkeys(self, *given: Any) -> dict[Any, Any]:
        return dict.fromkeys(*given)


def _refuse(message: object) -> None:
    raise _Refused(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.Environment:
    """What templates are compiled in."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    made.globals["dict"] = _Dict()
    made.globals["namespace"] = _Namespace
    return made


class _Answers:
    """`{"load": true}` compiles the template in its data and answers the variables that it reads; `{"values": ...,
    "limit": characters}` renders it: `{"text": ...}`, `{"refused": why}` or `{"fault": what}`."""

    def __init__(self) -> None:
        self._template: jinja2.Template | None = None

    def __call__(self, message: dict[str, Any], data: bytes) -> Any:
        if "load" in message:
            made, text = environment(), data.decode()
            self._template = made.from_string(text)
            return sorted(jinja2.meta.find_undeclared_variables(made.parse(text)))
        assert self._template is not None
        pieces: list[str] = []
        left = int(message["limit"])
        try:
            for piece in self._template.generate(message["values"]):
                left -= len(piece)
                if left < 0:
                    return {"fault": "it writes without end"}
                pieces.append(piece)
        except _Refused as refused:
            return {"refused": _line(refused)}
        except MemoryError:
            return {"fault": "it takes all memory"}
        except Exception as error:  # jinja's own faults, and whatever an expression of the template raises
            return {"fault": _line(error)}
        return {"text": "".join(pieces)}


def _line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return "".join(c if c.isprintable() else "?" for c in lines[0])[:300]


if __name__ == "__main__":
    if sys.platform.startswith("linux"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    serve(_Answers())
