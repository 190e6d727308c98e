"""The base of every section of a spec: frozen, strict, and with all faults of a section reported at once.

Pydantic stops before a model's own validators when a field is wrong. Here the cross-field checks (`faults`) run on the
raw mapping, so that a misspelt key does not hide a `top_k` above the number of experts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class Fault(NamedTuple):
    """One thing wrong below a section: `loc` is relative to the section."""

    loc: tuple[str | int, ...]
    message: str
    kind: str = "moec"


class Section(BaseModel):
    """A mapping of a spec. Unknown keys are faults with a suggestion; no value is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        """Checks between fields, on the raw values (any of which may be missing or of a wrong type)."""
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_faults(cls, raw: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        found: list[Fault] = []
        value: Self | None = None
        try:
            value = handler(raw)
        except ValidationError as error:
            found += [cls._translate(detail) for detail in error.errors(include_url=False)]
        if isinstance(raw, Mapping) and all(isinstance(key, str) for key in raw):
            cross = {fault.loc: fault for fault in reversed(list(cls.faults(raw)))}  # the first of each place
            found = [fault for fault in found if fault.loc not in cross] + list(reversed(cross.values()))
        if not found:
            assert value is not None
            return value
        raise collected(cls.__name__, found)

    @classmethod
    def _translate(cls, detail: Any) -> Fault:
        loc = tuple(detail["loc"])
        kind = detail["type"]
        if "text" in (detail.get("ctx") or {}):  # a section below has put it into words
            return Fault(loc, detail["msg"], kind)
        if kind == "extra_forbidden" and len(loc) == 1:
            return Fault(loc, "unknown key" + suggestion(str(loc[0]), cls.keys()), "unknown_key")
        return Fault(loc, describe(kind, detail), kind)

    @classmethod
    def keys(cls) -> list[str]:
        """The keys that the section accepts."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def value(cls, raw: Mapping[str, Any], key: str, *types: type) -> Any:
        """`raw[key]` or the default of the field if it is one of `types` (bool is no int here); otherwise None."""
        found = raw.get(key, cls.model_fields[key].get_default(call_default_factory=True, validated_data={}))
        if isinstance(found, bool) and bool not in types:
            return None
        return found if isinstance(found, types) else None


def collected(title: str, found: Iterable[Fault]) -> ValidationError:
    """All of `found` as one ValidationError; raised inside a validator, its locations are kept by pydantic."""
    details = [
        InitErrorDetails(
            # the braces of a message are not a template: it is passed as the value of one
            type=PydanticCustomError(fault.kind, "{text}", {"text": fault.message}),
            loc=fault.loc,
            input=None,
        )
        for fault in found
    ]
    return ValidationError.from_exception_data(title, details)


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of what is known, or nothing when there is nothing."""
    choices = list(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known here: {', '.join(choices)}" if choices else ""


_KINDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def shown(value: Any) -> str:
    """A value of a spec as its author would write it, cut to a readable length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a huge integer"
    return text if len(text) <= 60 else text[:57] + "..."


def describe(kind: str, detail: Any) -> str:
    """One pydantic error in the words of a spec."""
    given = shown(detail.get("input"))
    context = detail.get("ctx") or {}
    if kind == "missing":
        return "this key is required"
    if kind in _KINDS:
        return f"expected {_KINDS[kind]}, got {given}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = context[name]
        return f"must be {words} {int(bound) if bound == int(bound) else bound}, got {given}"
    if kind == "literal_error":
        return f"expected {context['expected']}, got {given}"
    if kind == "multiple_of":
        return f"must be a multiple of {context['multiple_of']}, got {given}"
    if kind in ("too_short", "too_long"):
        return detail["msg"].removeprefix("Value should have ").removeprefix("List should have ")
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "value_error":
        return str(context.get("error", detail["msg"]))
    return str(detail["msg"])
