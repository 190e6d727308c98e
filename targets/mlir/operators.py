"""Attention over a KV cache as a function, for the fused text: the compiler's own operators write in place.

The results after the first are the caches as they are after the call, in the order of the arguments.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from moec.compiler.ops import AttentionCall, CachedAttention, CachedAttentionQ8, Call
from moec.compiler.ops.call import define, signature


def _functional(call: type[AttentionCall[Any]]) -> Any:
    """The form of an operator that returns its caches: `moec::NAME_functional`."""
    written = [p.name for p in call.parameters() if p.written]

    def eager(*args: Any) -> tuple[Tensor, ...]:
        given = call(*args)
        own = replace(given, **{name: cache.clone() for name, cache in given.written().items()})
        return own.op(*own.arguments()), *own.written().values()

    def fake(*args: Any) -> tuple[Tensor, ...]:
        given = call(*args)
        return given.result(), *(cache.new_empty(cache.shape) for cache in given.written().values())

    name = call.op._schema.name.partition("::")[2]
    results = ", ".join(["Tensor"] * (1 + len(written)))
    return define(f"{name}_functional({signature(call, in_place=False)}) -> ({results})", eager, fake)


FUNCTIONAL: dict[type[Call[Any]], Any] = {call: _functional(call) for call in (CachedAttention, CachedAttentionQ8)}
