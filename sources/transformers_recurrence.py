"""While a model is exported, its recurrent layers take the tokens of a call one after the other, by `scan`.

transformers computes a prompt in chunks, whose number would be fixed when a graph is captured, and a single token by
another function. Here both are replaced by a scan over the tokens of the model's own function of a single token. What
that function computes is read from the graph (passes/fuse_recurrence.py), never assumed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

# of a module of transformers: what computes a chunk, and what computes one token
DELTA = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
MAMBA2 = ("mamba2_chunk_scan", "mamba2_selective_state_update")


@contextmanager
def token_by_token(model: nn.Module) -> Iterator[None]:
    """Within it, the functions above of the modules that define `model`'s layers are folds over tokens."""
    homes = {sys.modules[type(layer).__module__] for layer in model.modules()}
    kept: list[tuple[Any, str, Any]] = []
    for home in homes:
        for names, fold in ((DELTA, _delta), (MAMBA2, _mamba2)):
            chunk, one = (getattr(home, name, None) for name in names)
            if chunk is None or one is None:
                continue
            made = fold(_plain(one))
            for name, function in zip(names, made, strict=True):
                kept.append((home, name, getattr(home, name)))
                setattr(home, name, function)
    try:
        yield
    finally:
        for home, name, function in reversed(kept):
            setattr(home, name, function)


def _plain(function: Any) -> Callable[..., Any]:
    """Below decorators that look for faster kernels."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function  # type: ignore[no-any-return]


def _delta(one: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        if initial_state is None:  # shapes are learnt
            heads, d, e = value.shape[2], key.shape[3], value.shape[3]
            return torch.zeros_like(value), value.new_zeros((value.shape[0], heads, d, e))

        def step(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            q, k, v, decay, rate = (x.unsqueeze(1) for x in token)
            y, new = one(
                q,
                k,
                v,
                g=decay,
                beta=rate,
                initial_state=state,
                output_final_state=True,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )
            return new, y.squeeze(1)

        state, y = scan(step, initial_state, (query, key, value, g, beta), dim=1)
        return y, state

    return run, run


def _mamba2(one: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def run(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        z: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        if z is not None:
            raise ValueError("its scan multiplies with a gate")
        batch, _, heads, p = hidden_states.shape
        if initial_states is None:  # shapes are learnt
            return torch.zeros_like(hidden_states), hidden_states.new_zeros((batch, heads, p, B.shape[3]))
        if dt_bias is not None:
            dt = dt + dt_bias
        if dt_softplus:
            dt = nn.functional.softplus(dt)
        low, high = dt_limit
        if low > 0.0 or high != float("inf"):  # after softplus, 0 and infinity limit nothing
            dt = torch.clamp(dt, low, high)
        n = B.shape[3]

        def step(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            x, rate, b, c = token
            new = state.clone()
            y = one(
                new,
                x,
                rate[..., None].expand(-1, -1, p),
                A[:, None, None].expand(-1, p, n),
                b,
                c,
                None if D is None else D[:, None].expand(-1, p),
            )
            return new, y

        state, y = scan(step, initial_states, (hidden_states, dt, B, C), dim=1)
        return y, state

    def never(*_: Any, **__: Any) -> Any:
        raise ValueError("its single step is taken where many tokens may come")

    return run, never
