"""`genai_config.json`: what onnxruntime-genai must know to run the model, in its own words.

Written where its convention holds: a float cache of one shape in all layers, and a token that ends a text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.fx import Node

from moec.compiler.ops import CachedAttention
from moec.compiler.ops.call import shape_of
from moec.targets.onnx.attention import MASK
from moec.targets.onnx.context import Context
from moec.targets.onnx.facts import PAST, PRESENT

GENAI_FILE = "genai_config.json"


def write_genai_config(c: Context, attention: Node, model_file: str, folder: Path) -> bool:
    """Write the file and return True, or return False where the convention does not hold. `attention`: any of them."""
    info = c.program.info
    shapes = {tuple(layer[part]) for layer in c.caches for part in ("key", "value")}
    if c.coded or len(shapes) != 1 or not info.eos_ids:
        return False
    _, kv_heads, width = shapes.pop()
    heads = int(shape_of(CachedAttention[Node].of(attention).q)[2])
    decoder = {
        "filename": model_file,
        "head_size": width,
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_hidden_layers": len(c.caches),
        "num_key_value_heads": kv_heads,
        "session_options": {"provider_options": []},
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": MASK,
            "past_key_names": f"{PAST}.%d.key",
            "past_value_names": f"{PAST}.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{PRESENT}.%d.key",
            "present_value_names": f"{PRESENT}.%d.value",
        },
    }
    config: dict[str, Any] = {
        "model": {
            "type": "llama",  # its name for a plain decoder
            "bos_token_id": info.bos_id if info.bos_id is not None else info.eos_ids[0],
            "eos_token_id": list(info.eos_ids),
            "pad_token_id": info.eos_ids[0],
            "context_length": info.context,
            "vocab_size": info.vocab_size,
            "decoder": decoder,
        },
        # the cache grows by concatenation: past and present cannot be one buffer
        "search": {"do_sample": False, "max_length": info.context, "past_present_share_buffer": False},
    }
    (folder / GENAI_FILE).write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    return True
