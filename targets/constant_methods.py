"""The constant methods of a `.pte`: what ExecuTorch's LLM runners and our applications ask a program about its model.

Names are those of ExecuTorch's `extension/llm/runner/constants.h`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moec.compiler.program import ModelInfo
from moec.compiler.states import State


def constant_methods(info: ModelInfo, states: Iterable[State]) -> dict[str, Any]:
    """Name -> value, the same for every target that writes a `.pte`.

    `get_max_seq_len` is the most tokens of one call, `get_max_context_len` the positions of the KV cache (the runner
    splits a prompt by the first and ends a generation by the second). `enable_dynamic_shape`: `forward` takes any
    number of tokens up to the most; where it is missing the runner feeds a prompt token by token. No BOS is -1.
    `get_states_appended`, ours: 1 where the first rows along axis 1 of every state are those of the first positions,
    so that a session may go back and copies what it needs; 2 where it may go back and rows lie elsewhere; else 0.
    """
    return {
        "get_vocab_size": info.vocab_size,
        "get_max_seq_len": info.max_tokens,
        "get_max_context_len": info.context,
        "enable_dynamic_shape": True,
        "use_kv_cache": True,
        "get_bos_id": -1 if info.bos_id is None else info.bos_id,
        "get_eos_ids": list(info.eos_ids),
        "get_states_appended": _appended(list(states)),
    }


def _appended(states: Sequence[State]) -> int:
    if all(state.rows_are_positions for state in states):
        return 1
    return 2 if all(state.rewinds for state in states) else 0
