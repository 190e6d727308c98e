"""Operators of the `moec` namespace as typed calls: the fields of a class are the signature, and it is written once.

A subclass of `Call` lists operands and attributes in order. Registering it makes the operator's schema from the fields,
and its methods `eager` (the reference that every kernel is compared with) and `fake` (shapes only) the implementation.

    LinearQ.of(node).codes                       a call in a graph: operands are nodes
    LinearQ.of(node).map(value_of).eager()       the same call with values: operands are tensors
    edit.emit(LinearQ(x=x, codes=codes, ...))    a new node, built by name
    find_call(node)                              whichever call of ours `node` is, or None
"""

from __future__ import annotations

import dataclasses
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

NAMESPACE = "moec"

V = TypeVar("V")  # what stands for an operand: a torch.fx.Node, a Tensor
U = TypeVar("U")
C = TypeVar("C", bound="Call[Any]")

_WRITTEN = "written"
Written = Annotated[V, _WRITTEN]  # an operand that the operator writes in place: a state

_ATTRIBUTES = {int: "int", float: "float", bool: "bool", str: "str"}
_calls: dict[Any, type[Call[Any]]] = {}


@dataclass(frozen=True)
class Parameter:
    """One argument of a signature. `operand`: a tensor; `written`: the operator changes it in place."""

    name: str
    type: str  # as a torch schema spells it, without a mark for writing
    operand: bool
    written: bool
    default: str | None = None  # as a torch schema spells it


@dataclass(frozen=True)
class Call(ABC, Generic[V]):
    """One call of an operator, its arguments by name; a tensor operand is a V, an absent optional one None."""

    op: ClassVar[Any]  # the OpOverload, set by `register`

    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]:
        """The signature, in the order of the schema."""
        hints = get_type_hints(cls, include_extras=True)
        return tuple(
            dataclasses.replace(_parameter(f.name, hints[f.name]), default=_default(f)) for f in dataclasses.fields(cls)
        )

    @classmethod
    def find(cls: type[C], node: Any) -> C | None:
        """The call that a graph's node makes, if it is one of this class (or of a subclass); None otherwise."""
        found = _calls.get(getattr(node, "target", None)) if getattr(node, "op", "") == "call_function" else None
        if found is None or not issubclass(found, cls):
            return None
        return found(*node.args, **node.kwargs)

    @classmethod
    def of(cls: type[C], node: Any) -> C:
        """The call that `node` makes, which must be one of this class."""
        found = cls.find(node)
        if found is None:
            raise AssertionError(f"{node} ({getattr(node, 'target', None)}) is no {cls.__name__}")
        return found

    def arguments(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema, as the operator takes them, without defaults at the end."""
        fields = dataclasses.fields(self)
        while fields and fields[-1].default is not dataclasses.MISSING and self._holds_default(fields[-1]):
            fields = fields[:-1]
        return tuple(getattr(self, f.name) for f in fields)

    def _holds_default(self, field: dataclasses.Field[Any]) -> bool:
        return bool(getattr(self, field.name) == field.default)

    def operands(self) -> Iterator[tuple[Parameter, V]]:
        """The operands that are there."""
        for p in self.parameters():
            if p.operand and getattr(self, p.name) is not None:
                yield p, getattr(self, p.name)

    def written(self) -> dict[str, V]:
        """The operands that the operator changes in place, by parameter."""
        return {p.name: value for p, value in self.operands() if p.written}

    def map(self, value_of: Callable[[V], Any]) -> Any:
        """The same call with `value_of(operand)` in the place of each operand."""
        return dataclasses.replace(self, **{p.name: value_of(value) for p, value in self.operands()})

    @abstractmethod
    def eager(self) -> Any:
        """The result, of tensors."""

    @abstractmethod
    def fake(self) -> Any:
        """Shapes only. ValueError for operands that no kernel may be given."""


def find_call(node: Any) -> Call[Any] | None:
    """The typed call that a graph's node makes, if it calls one of our operators."""
    return Call.find(node)


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is dataclasses.MISSING:
        return None
    return f'"{field.default}"' if isinstance(field.default, str) else str(field.default)


def _parameter(name: str, hint: Any) -> Parameter:
    optional = ""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (h for h in get_args(hint) if h is not type(None))
        optional = "?"
    written = get_origin(hint) is Annotated and _WRITTEN in hint.__metadata__
    if written:
        hint = get_args(hint)[0]
    if isinstance(hint, TypeVar):
        return Parameter(name, f"Tensor{optional}", operand=True, written=written)
    if get_origin(hint) is not None and issubclass(get_origin(hint), Sequence):
        return Parameter(name, f"{_ATTRIBUTES[get_args(hint)[0]]}[]", operand=False, written=False)
    return Parameter(name, f"{_ATTRIBUTES[hint]}{optional}", operand=False, written=False)


def signature(call: type[Call[Any]], *, in_place: bool = True) -> str:
    """The arguments as a torch schema spells them. `in_place` False: nothing is marked as written."""
    texts = []
    alias = iter("abcdefghijklmnop")
    for p in call.parameters():
        kind = p.type.replace("Tensor", f"Tensor({next(alias)}!)", 1) if p.written and in_place else p.type
        texts.append(f"{kind} {p.name}" + ("" if p.default is None else f"={p.default}"))
    return ", ".join(texts)


def register(name: str, call: type[Call[Any]]) -> Any:
    """Define `moec::name` with the signature, the reference and the shapes of `call`; its OpOverload."""

    def eager(*args: Any, **kwargs: Any) -> Tensor:
        return call(*args, **kwargs).eager()  # type: ignore[no-any-return]

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        return call(*args, **kwargs).fake()  # type: ignore[no-any-return]

    call.op = define(f"{name}({signature(call)}) -> Tensor", eager, fake)
    _calls[call.op] = call
    return call.op


def define(schema: str, eager: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `schema` (`name(args) -> result` or `name.overload(..)`) with its implementations; its OpOverload."""
    full, rest = schema.split("(", 1)
    name, _, overload = full.strip().partition(".")
    qualified = f"{NAMESPACE}::{full.strip()}"
    torch.library.define(qualified, "(" + rest, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "CompositeExplicitAutograd")(eager)
    torch.library.register_fake(qualified)(fake)
    return getattr(getattr(torch.ops.moec, name), overload or "default")


def require(condition: bool, op: str, message: str) -> None:
    """Raise ValueError naming the operator. Only for conditions on static sizes: a symbolic one would add a guard."""
    if not condition:
        raise ValueError(f"moec::{op}: {message}")


def shape_of(operand: Any) -> tuple[Any, ...]:
    """The shape of an operand: of a tensor, or of the value that a node stands for."""
    value = operand if isinstance(operand, Tensor) else operand.meta["val"]
    return tuple(value.shape)
