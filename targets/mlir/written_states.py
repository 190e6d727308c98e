"""Functional forms of the operators that write states in place, for the fused text.

The results after the first are the states after the call, in the order of the arguments. Calls that write different
operands are different overloads, named by the additional ones (`cached_attention_functional`, and `.k_scale_v_scale`
over a cache of codes).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from moec.compiler.ops.call import Call, define, signature


def functional(call: Call[Any]) -> Any:
    """The operator `moec::NAME_functional` for a call that writes what `call` writes."""
    return _functional(type(call), tuple(call.written()))


@cache
def _functional(form: type[Call[Any]], written: tuple[str, ...]) -> Any:
    optional = {p.name for p in form.parameters() if p.type.endswith("?")}

    def eager(*args: Any) -> tuple[Tensor, ...]:
        given = form(*args)
        own = replace(given, **{name: state.clone() for name, state in given.written().items()})
        return own.op(*own.arguments()), *own.written().values()

    def fake(*args: Any) -> tuple[Tensor, ...]:
        given = form(*args)
        return given.fake(), *(state.new_empty(state.shape) for state in given.written().values())

    name = form.op._schema.name.partition("::")[2]
    overload = "_".join(n for n in written if n in optional)
    results = ", ".join(["Tensor"] * (1 + len(written)))
    full = f"{name}_functional" + (f".{overload}" if overload else "")
    return define(f"{full}({signature(form, in_place=False)}) -> ({results})", eager, fake)
