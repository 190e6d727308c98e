"""A mixture's checkpoint as transformers reads it: the same numbers in a folder of `Glm4MoeForCausalLM`.

Of the models of transformers that one computes what `sources/decoder` computes: sigmoid scores, a selection bias,
weights of the chosen experts normalised and scaled, a shared expert, grouped-query attention. Three things are written
in another way, none of which changes a result:

- pairs (2i, 2i+1) of interleaved rotary embeddings become pairs (i, i + d/2): the rows of q and k are reordered;
- its norm of q and k has gains and stands before the rotation: with gains of 1 the two commute;
- its shared expert is a whole number of experts wide: it is filled up with neurons of zeros.

The names are those of the hub, an expert at a time. D d_model, W expert width, E experts, d head_dim.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.checkpoints.config_json import config_from_json, is_own, read_json, scaling_to_json
from moec.checkpoints.folder import CONFIG, require_checkpoint
from moec.checkpoints.safetensors_file import TYPES, SafetensorsWriter
from moec.checkpoints.store import PACKED_ROLES, WeightStore, open_store
from moec.compiler.errors import CheckpointError
from moec.compiler.replacing import replacing
from moec.compiler.source import TOKENIZER, TOKENIZER_CONFIG
from moec.compiler.tokenizer import TextTokenizer
from moec.sources.decoder.config import DecoderConfig, MoeConfig
from moec.sources.decoder.layout import WeightInfo, weight_layout

MODEL_TYPE = "glm4_moe"

_Part = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Exported:
    """The folder, and a line for each thing that a reader of it should know."""

    out: Path
    notes: tuple[str, ...]


def export_transformers_form(folder: Path, out: Path) -> Exported:
    """Write `out`: the mixture of the checkpoint `folder` as transformers reads it, one safetensors file.

    Weights keep their types; INT4 codes become the floats that they stand for. CheckpointError, before anything is
    written, for a folder that is no checkpoint of a mixture of moec's, and for what Glm4Moe cannot hold.
    """
    config, store = _open(folder)
    moe = config.moe
    assert moe is not None
    files = dict(store.companions())
    if TOKENIZER in files and TOKENIZER_CONFIG not in files:
        files[TOKENIZER_CONFIG] = _tokenizer_config(files[TOKENIZER], config, folder)
    layout = list(_layout(config, moe, store))
    with replacing(out, kind="a checkpoint") as part:
        (part / CONFIG).write_text(json.dumps(_config(config, moe), indent=2) + "\n", encoding="utf-8")
        for name, content in files.items():
            (part / name).write_bytes(content)
        with SafetensorsWriter(part / "model.safetensors", layout) as writer:
            types = {name: dtype for name, dtype, _ in layout}
            for info in weight_layout(config).values():
                for name, value in _values(info, store[info.name].load(), config, moe):
                    writer.write(name, [value.to(types[name])])
            for name, value in _added(config, moe):
                writer.write(name, [value])
    return Exported(out, tuple(_notes(moe, store)))


def _open(folder: Path) -> tuple[DecoderConfig, WeightStore]:
    require_checkpoint(folder)
    raw = read_json(folder / CONFIG)
    if not is_own(raw):
        raise CheckpointError(
            f"is a {str(raw['model_type'])[:40]!r} of transformers already", place=str(folder), remedy="use it as it is"
        )
    config = config_from_json(raw, folder / CONFIG)
    fault = _fault(config)
    if fault is not None:
        raise CheckpointError(f"{fault}: {MODEL_TYPE} of transformers cannot hold it", place=str(folder))
    return config, open_store(folder, config)


def _fault(config: DecoderConfig) -> str | None:
    if config.moe is None:
        return "the model is dense"
    if config.moe.experts < 2:
        return "it has one expert"
    if config.attention_window is not None:
        return f"attention sees a window of {config.attention_window.size} tokens"
    return None


def _shared_experts(moe: MoeConfig) -> int:
    """How many experts wide the shared expert is written, at least 1."""
    return max(1, -(-moe.shared_width // moe.expert_width))


def _config(config: DecoderConfig, moe: MoeConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope.theta, "partial_rotary_factor": 1.0}
    scaling = config.rope.scaling
    if scaling is not None:
        rope |= scaling_to_json(scaling)
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": MODEL_TYPE,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "use_qk_norm": config.qk_norm,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_parameters": rope,
        "rope_theta": config.rope.theta,  # where readers of older files look
        "partial_rotary_factor": 1.0,
        "intermediate_size": moe.shared_width or moe.expert_width,  # of dense layers, which there are none of
        "first_k_dense_replace": 0,
        "moe_intermediate_size": moe.expert_width,
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": _shared_experts(moe),
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.scale,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        # the router decides in float32, and rounded to bfloat16 it would choose other experts
        "dtype": "float32",
    }


def _layout(config: DecoderConfig, moe: MoeConfig, store: WeightStore) -> Iterator[_Part]:
    """What the file holds, in order, by the shapes alone."""
    for info in weight_layout(config).values():
        packed = store.packed and info.role in PACKED_ROLES
        dtype = torch.float32 if packed else TYPES[store.entries[info.name].dtype]
        for name, value in _values(info, torch.empty(info.shape, device="meta"), config, moe):
            yield name, dtype, tuple(value.shape)
    for name, value in _added(config, moe):
        yield name, value.dtype, tuple(value.shape)


def _values(info: WeightInfo, value: Tensor, config: DecoderConfig, moe: MoeConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hold a weight of the layout, and their names."""
    block, _, part = info.name.partition(".feed_forward.")
    if not part:
        rotated = config.rope.interleaved and info.name.endswith((".q_proj.weight", ".k_proj.weight"))
        yield info.name, _halves(value, config.head_dim) if rotated else value
        return
    mlp = f"{block}.mlp"
    if part == "router.weight":
        yield f"{mlp}.gate.weight", value
    elif part == "expert_bias":
        yield f"{mlp}.gate.e_score_correction_bias", value
    elif part == "experts.gate_up_proj":
        for e, gate_up_DW in enumerate(value.unbind(0)):
            gate_DW, up_DW = gate_up_DW.chunk(2, dim=1)
            yield f"{mlp}.experts.{e}.gate_proj.weight", gate_DW.T
            yield f"{mlp}.experts.{e}.up_proj.weight", up_DW.T
    elif part == "experts.down_proj":
        for e, down_WD in enumerate(value.unbind(0)):
            yield f"{mlp}.experts.{e}.down_proj.weight", down_WD.T
    else:
        name = part.removeprefix("shared_expert.")
        yield f"{mlp}.shared_experts.{name}", _filled(value, 1 if name.startswith("down") else 0, moe)


def _halves(value: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k whose rotated pairs are neighbours, as those whose pairs are half a head apart."""
    heads = value.unflatten(0, (-1, head_dim // 2, 2))
    return heads.transpose(1, 2).flatten(0, 2)


def _filled(value: Tensor, axis: int, moe: MoeConfig) -> Tensor:
    """A weight of the shared expert with neurons of zeros, along `axis`, up to a whole number of experts."""
    missing = _shared_experts(moe) * moe.expert_width - value.shape[axis]
    if not missing:
        return value
    shape = [missing if n == axis else size for n, size in enumerate(value.shape)]
    return torch.cat((value, value.new_zeros(shape)), dim=axis)


def _added(config: DecoderConfig, moe: MoeConfig) -> Iterator[tuple[str, Tensor]]:
    """Tensors that Glm4Moe has and the mixture does not need, float32."""
    for n in range(config.layers):
        layer = f"model.layers.{n}"
        if config.qk_norm:
            for norm in ("q_norm", "k_norm"):
                yield f"{layer}.self_attn.{norm}.weight", torch.ones(config.head_dim)
        if not moe.selection_bias:
            yield f"{layer}.mlp.gate.e_score_correction_bias", torch.zeros(moe.experts)
        if not moe.shared_width:
            shape = (moe.expert_width, config.d_model)
            for name in ("gate_proj", "up_proj"):
                yield f"{layer}.mlp.shared_experts.{name}.weight", torch.zeros(shape)
            yield f"{layer}.mlp.shared_experts.down_proj.weight", torch.zeros(shape[::-1])


def _notes(moe: MoeConfig, store: WeightStore) -> Iterator[str]:
    filled = _shared_experts(moe) * moe.expert_width - moe.shared_width
    if filled:
        yield f"the shared expert is filled up with {filled} neurons of zeros, {MODEL_TYPE} needs whole experts"
    if store.packed:
        yield "INT4 codes are written as the floats that they stand for"
    yield from store.notes


def _tokenizer_config(content: bytes, config: DecoderConfig, folder: Path) -> bytes:
    """What transformers must know beside tokenizer.json: the tokens that begin and end a text."""
    tokenizer = TextTokenizer(content, str(folder / TOKENIZER))
    try:
        ids = {"bos_token": config.bos_id, "eos_token": config.eos_ids[0] if config.eos_ids else None}
        named = {key: tokenizer.token(id_) for key, id_ in ids.items() if id_ is not None}
    finally:
        tokenizer.close()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context}
    return (json.dumps(settings | {k: t for k, t in named.items() if t is not None}, indent=2) + "\n").encode()
