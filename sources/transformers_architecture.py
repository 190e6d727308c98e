"""The `Architecture` of a transformers model: its parameters' names and shapes, from the config, without its weights.

The module is built with fake parameters, as for compiling (transformers_model.py), and each parameter gets a
role from what it is: three dimensions are a stack of experts, two with as many rows as experts beside one are a router.
A table that is also the head is an embedding, as in the graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from moec.compiler.architecture import Architecture, Cache, Experts, Latent, Mixer, Weight
from moec.compiler.errors import UserError
from moec.compiler.states import Replaced, State
from moec.sources.transformers_config import read_config
from moec.sources.transformers_model import kept_by_layers, shapes_of

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")


EXPORTED = "model"  # the attribute of the wrapper that is exported, which begins every name of a graph


def architecture_of_transformers(folder: Path, name: str, context: int | None = None) -> Architecture:
    """The account of `folder`/config.json. MissingExtra without transformers; UserError for shapes it cannot read.

    `context`: positions of the KV cache, default those of the config.
    """
    return architecture_of_config(read_config(folder), folder, name, context)


def architecture_of_config(config: Any, folder: Path, name: str, context: int | None = None) -> Architecture:
    """As `architecture_of_transformers`, for a config that was read already; `folder` names it in messages."""
    model, length = shapes_of(config, folder, context)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, width = (_required(text, key, folder) for key in ("num_hidden_layers", "hidden_size"))
    heads = _required(text, "num_attention_heads", folder)
    experts, chosen = _first(text, _COUNTS), _first(text, _CHOSEN)
    weights = list(_weights(model, experts, chosen))
    stacks = [w for w in weights if w.role == "expert" and w.columns > 1]
    if bool(stacks) != bool(experts):
        raise UserError(
            f"the config speaks of {experts or 'no'} experts, the module holds {len(stacks)} stacks of experts",
            place=str(folder),
            remedy="this family's mixture is not one the planner can read",
        )
    attends, fixed = _kept(model, text, layers, length)
    down = min(stacks, key=lambda w: w.rows * w.columns) if stacks else None
    mixers = dict(_mixers(model, {s.layer for s in fixed if _is_recurrent(s)}, width)) if fixed else {}
    within = tuple(f"{EXPORTED}.{name}." for name in mixers)
    return Architecture(
        name=name,
        layers=layers,
        d_model=width,
        heads=heads,
        vocab_size=int(text.vocab_size),
        context=length,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        weights=tuple(weights),
        caches=tuple(c for n, c in enumerate(_caches(text, layers, heads, width)) if n in attends),
        fixed=fixed,
        mixers=tuple(mixers.values()),
        experts=None
        if down is None
        else Experts(
            sum(1 for w in weights if w.role == "router" and w.columns > 1 and w.rows == experts) or layers,
            int(experts or 0),
            int(chosen or 1),
            down.rows if down.columns == width else down.columns,
            max((w.columns for w in weights if w.role == "shared" and w.rows == width), default=0),  # the way down
        ),
        ffn_width=max((w.rows for w in weights if w.role == "ffn" and not w.name.startswith(within)), default=0),
        own=False,
    )


def _kept(model: nn.Module, text: Any, layers: int, length: int) -> tuple[set[int], tuple[State, ...]]:
    """The layers that keep keys and values, and the states of fixed size of the others."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds = get_layer_types_and_kwargs(text)[0]
    if not set(kinds) & {"conv", "linear_attention", "hybrid", "hybrid_sliding", "dummy"}:
        return set(range(layers)), ()
    held = kept_by_layers(model, length)
    attends = {int(name.removeprefix("cache_k_")) for name in held if name.startswith("cache_k_")}
    fixed = {n: s for n, s in held.items() if not n.startswith(("cache_k_", "cache_v_"))}
    return attends, tuple(State(n, s, Replaced(), layer=n.split("_")[2]) for n, s in fixed.items())


def _is_recurrent(state: State) -> bool:
    return len(state.shape) == 4  # [1, heads, d, e]; a convolution's is [1, channels, taps - 1]


def _mixers(model: nn.Module, recurrent: set[str], width: int) -> Iterator[tuple[str, Mixer]]:
    """Name and kind of every module that has a convolution: alone, or in front of a recurrence."""
    for name, module in model.named_modules():
        convolution = next((m for m in module.children() if isinstance(m, nn.Conv1d)), None)
        layer = next((part for part in name.split(".") if part.isdigit()), None)
        if convolution is None or layer is None:
            continue
        kind = "short_conv"
        if layer in recurrent:
            kind = "gated_delta" if "Delta" in type(module).__name__ else "selective_scan"
        linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear) and m.in_features == width}
        made = sum(m.out_features for n, m in linears.items() if not n.startswith("out"))
        yield name, Mixer(kind, made, convolution.out_channels)


def _required(config: Any, key: str, folder: Path) -> int:
    found = getattr(config, key, None)
    if not isinstance(found, int) or found < 1:
        raise UserError(
            f"config.json gives no {key}", place=str(folder), remedy="the planner needs a decoder's usual keys"
        )
    return found


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    return next((int(v) for n in names if isinstance(v := getattr(config, n, None), int) and v > 0), None)


def _weights(model: nn.Module, experts: int | None, chosen: int | None) -> Iterator[Weight]:
    """Every parameter once, by its name in the exported graph; linears are [out, in], stacks of experts [E, a, b]."""
    names = {id(p): f"{EXPORTED}.{name}" for name, p in model.named_parameters(remove_duplicate=False)}
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    attention = tuple(f"{EXPORTED}.{n}." for n, m in model.named_modules() if "Attention" in type(m).__name__)
    for parameter in model.parameters():
        name = names[id(parameter)]
        shape = tuple(parameter.shape)
        role = "embedding" if id(parameter) in tables else _role(name, shape, experts, name.startswith(attention))
        if role == "expert" and len(shape) == 3:
            yield Weight(role, name, shape[0], shape[1], shape[2], used=min(chosen or shape[0], shape[0]))
        elif len(shape) == 2 and shape[0] == experts and name.endswith("bias"):  # one of each expert
            yield Weight("expert", name, shape[0], shape[1], 1, used=min(chosen or shape[0], shape[0]))
        elif len(shape) == 2 and role != "expert":
            yield Weight(role, name, 1, shape[0], shape[1], used=0 if role == "embedding" else None)
        else:
            yield Weight("norm" if role != "router" else role, name, 1, parameter.numel(), 1)
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored and experts and tuple(buffer.shape) == (experts,):  # the bias that balances selection
            yield Weight("router", f"{EXPORTED}.{name}", 1, experts, 1, counted=False)


def _role(name: str, shape: tuple[int, ...], experts: int | None, attends: bool) -> str:
    parts = name.split(".")
    if len(shape) == 3:
        return "expert" if shape[1] > 1 else "norm"  # [C, 1, K]: the taps of each channel
    if "lm_head" in parts:
        return "head"
    if experts and len(shape) == 2 and shape[0] == experts and re.search(r"(gate|router)\.(weight|\w+)$", name):
        return "router"
    if re.search(r"shared_expert_gate\b", name):
        return "router"  # one row, which is never quantized
    if re.search(r"shared_expert", name):
        return "shared"
    if len(shape) != 2:
        return "norm"
    return "attention" if attends else "ffn"


def _caches(config: Any, layers: int, heads: int, width: int) -> Iterator[Cache]:
    """Keys and values as the exported program caches them: of latent attention (DeepSeek), those of every head. A
    target that caches latents says so (`Footprint.cached`)."""
    if getattr(config, "kv_lora_rank", None):
        rope, nope, value = (int(getattr(config, k)) for k in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        for layer in range(layers):
            latent = Latent(int(config.kv_lora_rank), rope)
            yield Cache(heads, nope + rope, value, _window(config, layer), latent)
        return
    kv = int(getattr(config, "num_key_value_heads", None) or heads)
    head = int(getattr(config, "head_dim", None) or width // heads)
    yield from (Cache(kv, head, head, _window(config, layer)) for layer in range(layers))


def _window(config: Any, layer: int) -> int:
    """Positions that a layer attends to, 0 for all: by its type, or one window for all layers."""
    size = getattr(config, "sliding_window", None)
    if not isinstance(size, int) or size < 1 or getattr(config, "use_sliding_window", True) is False:
        return 0
    kinds = getattr(config, "layer_types", None)
    return size if kinds is None or kinds[layer] == "sliding_attention" else 0
