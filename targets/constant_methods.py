"""The constant methods of a `.pte`: what ExecuTorch's LLM runners and our applications ask a program about its model.

Names are those of ExecuTorch's `extension/llm/runner/constants.h`.
"""

from __future__ import annotations

from typing import Any

from moec.compiler.program import ModelInfo


def constant_methods(info: ModelInfo) -> dict[str, Any]:
    """Name -> value, the same for every target that writes a `.pte`.

    `get_max_seq_len` is the most tokens of one call, `get_max_context_len` the positions of the KV cache (the runner
    splits a prompt by the first and ends a generation by the second). `enable_dynamic_shape`: `forward` takes any
    number of tokens up to the most; where it is missing the runner feeds a prompt token by token. No BOS is -1.
    """
    return {
        "get_vocab_size": info.vocab_size,
        "get_max_seq_len": info.max_tokens,
        "get_max_context_len": info.context,
        "enable_dynamic_shape": True,
        "use_kv_cache": True,
        "get_bos_id": -1 if info.bos_id is None else info.bos_id,
        "get_eos_ids": list(info.eos_ids),
    }
