"""Attention over a KV cache as a function, for the fused text: the compiler's own operators write in place.

The results after the first are the caches as they are after the call, in the order of the arguments.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moec.compiler.ops import cached_attention, cached_attention_q8
from moec.compiler.ops.define import define


def _functional(op: Any, caches: tuple[int, ...]) -> tuple[Any, Any]:
    """(eager, fake) of the form of `op` that returns its caches."""

    def eager(*args: Any) -> tuple[Tensor, ...]:
        own = [a.clone() if i in caches else a for i, a in enumerate(args)]
        return op(*own), *(own[i] for i in caches)

    def fake(*args: Any) -> tuple[Tensor, ...]:
        q, v = args[0], args[2]
        y = q.new_empty((q.shape[0], q.shape[1], q.shape[2] * v.shape[3]))
        return y, *(args[i].new_empty(args[i].shape) for i in caches)

    return eager, fake


functional_attention = define(
    "cached_attention_functional(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor start_pos, "
    "float scale, int window) -> (Tensor, Tensor, Tensor)",
    *_functional(cached_attention, (3, 4)),
)
functional_attention_q8 = define(
    "cached_attention_q8_functional(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_scale, "
    "Tensor v_scale, Tensor start_pos, float scale, int window) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    *_functional(cached_attention_q8, (3, 4, 5, 6)),
)

FUNCTIONAL: dict[Any, Any] = {cached_attention: functional_attention, cached_attention_q8: functional_attention_q8}
