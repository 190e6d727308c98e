"""A dense checkpoint as one of our decoders: MobileLLM's layout, or a Llama of the transformers library.

A Llama is the decoder of `sources/decoder` under other names (`mlp` for `feed_forward`), so it can be trained, taught
from and upcycled here without a conversion of its files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from moec.checkpoints import open_store
from moec.checkpoints.config_json import config_from_json, is_own, read_json
from moec.checkpoints.folder import CONFIG, require_checkpoint
from moec.compiler.errors import CheckpointError
from moec.compiler.program import LazyWeight
from moec.compiler.source import Checkpoint
from moec.sources.decoder.config import DecoderConfig, RopeConfig, RopeScaling
from moec.sources.decoder.layout import weight_layout

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
KINDS = ("llama", "mistral")  # of transformers, that compute what our dense decoder computes
_NOT_OURS = "moec's own decoders cannot hold it"


@dataclass(frozen=True)
class DenseDecoder:
    """A dense decoder and its weights by the names of `sources/decoder`; nothing is read before `weights`.

    own: whether the files are in the layout of moec's checkpoints, and not in that of transformers.
    """

    config: DecoderConfig
    store: Checkpoint
    own: bool

    def weight(self, name: str) -> LazyWeight:
        """A weight of the layout, float32 when loaded."""
        info = weight_layout(self.config)[name]
        return self.store.weight(self.stored_name(name), info.shape)

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls a weight."""
        return name if self.own else name.replace(".feed_forward.", ".mlp.")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by name, float32, in the order of the layout."""
        for name in weight_layout(self.config):
            yield name, self.weight(name).load()


def open_dense_decoder(folder: Path) -> DenseDecoder:
    """The dense decoder in `folder`. CheckpointError, with the reason, for a model that is not one."""
    require_checkpoint(folder)
    raw = read_json(folder / CONFIG)
    if is_own(raw):
        config = config_from_json(raw, folder / CONFIG)
        if config.moe is not None:
            raise CheckpointError("is a mixture of experts already", place=str(folder), remedy="name a dense model")
        return DenseDecoder(config, open_store(folder, config), own=True)
    from moec.sources.transformers_config import read_config
    from moec.sources.transformers_model import TransformersStore

    config = decoder_of_transformers(read_config(folder), str(folder))
    store = TransformersStore(folder)
    store.check(folder)
    if config.tied_embeddings and not store.is_tied(HEAD, TABLE):  # the files hold both, and they differ
        config = config.model_copy(update={"tied_embeddings": False})
    return DenseDecoder(config, store, own=False)


def decoder_of_transformers(config: Any, place: str) -> DecoderConfig:
    """The `mobilellm` decoder that computes what a transformers config describes. CheckpointError with every reason
    why none does."""
    if config.model_type not in KINDS:
        raise CheckpointError(
            f"is a {config.model_type}: {_NOT_OURS}, only {', '.join(KINDS)}", place=place, remedy="name such a model"
        )
    faults = [fault for fault in _faults(config) if fault]
    rope = dict(config.rope_parameters or {})
    scaling = _scaling(rope, faults)
    if faults:
        raise CheckpointError(f"{_NOT_OURS}: {'; '.join(faults)}", place=place)
    try:
        return _decoder(config, rope, scaling)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise CheckpointError(f"{_NOT_OURS}: {'; '.join(wrong)}", place=place) from None


def _decoder(config: Any, rope: dict[str, Any], scaling: dict[str, Any] | None) -> DecoderConfig:
    eos = config.eos_token_id
    return DecoderConfig(
        architecture="mobilellm",
        layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        norm_eps=float(f"{config.rms_norm_eps:.6g}"),  # files that hold it as float32 say 9.999999747e-06
        tied_embeddings=bool(config.tie_word_embeddings),
        rope=RopeConfig(
            theta=float(rope["rope_theta"]),
            interleaved=False,
            scaling=None if scaling is None else RopeScaling(**scaling),
        ),
        ffn_width=config.intermediate_size,
        bos_id=config.bos_token_id,
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
    )


def _faults(config: Any) -> Iterator[str]:
    if getattr(config, "attention_bias", False):
        yield "attention has biases"
    if getattr(config, "mlp_bias", False):
        yield "the feed-forward block has biases"
    if config.hidden_act not in ("silu", "swish"):
        yield f"the activation is {config.hidden_act}, not SwiGLU's silu"
    if getattr(config, "sliding_window", None):
        yield f"every layer attends to a window of {config.sliding_window}"


def _scaling(rope: dict[str, Any], faults: list[str]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", "default")
    if not isinstance(rope.get("rope_theta"), (int, float)) or not math.isfinite(rope["rope_theta"]):
        faults.append("its rotary embedding has no theta")
        return None
    if kind == "default":
        return None
    if kind != "llama3":
        faults.append(f"its rotary embedding is of type {kind}")
        return None
    return {
        "factor": float(rope["factor"]),
        "original_context": int(rope["original_max_position_embeddings"]),
        "low_freq_factor": float(rope["low_freq_factor"]),
        "high_freq_factor": float(rope["high_freq_factor"]),
    }
