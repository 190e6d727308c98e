"""The `model:` section of a decoder of our own, as frozen typed values. Lengths are in tokens, widths in features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from moec.compiler.errors import SpecError
from moec.compiler.spec.model import Count, Positive, Spec, Tokens, Width
from moec.compiler.spec.strict import Fault, Section, shown


class RopeScaling(Section):
    """Llama-3 frequency scaling: pairs of wavelength above original_context / low_freq_factor are divided by factor."""

    factor: Positive
    original_context: Tokens
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 1.0

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        low, high = cls.value(raw, "low_freq_factor", int, float), cls.value(raw, "high_freq_factor", int, float)
        if low is not None and high is not None and low > high:
            yield Fault(("low_freq_factor",), f"must be at most high_freq_factor ({shown(high)}), got {shown(low)}")


class RopeConfig(Section):
    """Rotary position embedding over all of head_dim; `interleaved` rotates pairs (2i, 2i+1), else (i, i + d/2)."""

    theta: Positive
    interleaved: bool
    scaling: RopeScaling | None = None


class AttentionWindow(Section):
    """Local attention over the last `size` positions, in all layers but every n-th one, which stays global."""

    size: Tokens
    every_nth_global: Count


class MoeConfig(Section):
    """Routed experts and one optional shared expert, all SwiGLU. `shared_width: 0` means no shared expert.

    score -> (+ selection bias, for the choice only) -> top_k -> weights normalised to sum 1 -> times `scale`.
    """

    experts: Annotated[int, Field(ge=1, le=4096)]
    top_k: Annotated[int, Field(ge=1, le=256)]
    expert_width: Width
    shared_width: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    score: Literal["sigmoid"] = "sigmoid"
    selection_bias: bool = True
    normalize: bool = True
    scale: Positive = 1.0

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        top_k, experts = (raw.get(key) for key in ("top_k", "experts"))
        if type(top_k) is int and type(experts) is int and 1 <= experts < top_k:
            yield Fault(("top_k",), f"must be at most model.moe.experts ({shown(experts)}), got {shown(top_k)}")


def _decoder_schema(schema: dict[str, Any]) -> None:
    """What `DecoderConfig.faults` checks and JSON Schema can say."""

    def one_of_two(needed: str, other: str) -> dict[str, Any]:  # `needed` is there, and `other` is not or null
        return {"required": [needed], "properties": {needed: {"not": {"type": "null"}}, other: {"type": "null"}}}

    schema["properties"]["head_dim"]["multipleOf"] = 2
    schema |= {
        "if": {"properties": {"architecture": {"const": "mobilemoe"}}},
        "then": one_of_two("moe", "ffn_width"),
        "else": one_of_two("ffn_width", "moe"),
    }


class DecoderConfig(Section):
    """A decoder of our own: `mobilemoe` (every layer is MoE) or `mobilellm` (dense SwiGLU of `ffn_width`)."""

    model_config = ConfigDict(json_schema_extra=_decoder_schema)

    architecture: Literal["mobilemoe", "mobilellm"]
    layers: Annotated[int, Field(ge=1, le=1024)]
    d_model: Width
    heads: Count
    kv_heads: Count
    head_dim: Annotated[int, Field(ge=2, le=1024)]
    vocab_size: Annotated[int, Field(ge=2, le=1 << 24)]
    context: Tokens
    norm_eps: Positive = 1e-5
    qk_norm: bool = False
    tied_embeddings: bool = True
    rope: RopeConfig
    attention_window: AttentionWindow | None = None
    moe: MoeConfig | None = None
    ffn_width: Width | None = None
    bos_id: Annotated[int, Field(ge=0)] | None = None
    eos_ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = ()

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        heads, kv_heads, head_dim = (raw.get(key) for key in ("heads", "kv_heads", "head_dim"))
        if type(heads) is int and type(kv_heads) is int and kv_heads >= 1 and heads >= 1 and heads % kv_heads:
            yield Fault(("kv_heads",), f"heads ({shown(heads)}) must be a multiple of kv_heads, got {shown(kv_heads)}")
        if type(head_dim) is int and head_dim % 2:
            yield Fault(("head_dim",), f"must be even, RoPE rotates pairs of features; got {shown(head_dim)}")
        yield from cls._feed_forward_faults(raw)
        yield from cls._token_faults(raw)

    @classmethod
    def _feed_forward_faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        sparse = raw.get("architecture") == "mobilemoe"
        if raw.get("architecture") not in ("mobilemoe", "mobilellm"):
            return
        needed, other = ("moe", "ffn_width") if sparse else ("ffn_width", "moe")
        if raw.get(needed) is None:
            yield Fault((needed,), f"architecture {raw['architecture']} needs this key")
        if raw.get(other) is not None:
            yield Fault((other,), f"architecture {raw['architecture']} has no {other}; write {needed} instead")

    @classmethod
    def _token_faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        vocab = raw.get("vocab_size")
        if type(vocab) is not int:
            return
        named: list[tuple[tuple[str | int, ...], Any]] = [(("bos_id",), raw.get("bos_id"))]
        eos_ids = raw.get("eos_ids")
        if isinstance(eos_ids, (list, tuple)):
            named += [(("eos_ids", i), token) for i, token in enumerate(eos_ids)]
        for loc, token in named:
            if type(token) is int and token >= vocab:
                yield Fault(loc, f"token {shown(token)} is outside the vocabulary of {shown(vocab)}")

    def window(self, layer: int) -> int:
        """Positions that layer `layer` (from 0) attends to, itself included; 0 means all."""
        if self.attention_window is None or (layer + 1) % self.attention_window.every_nth_global == 0:
            return 0
        return self.attention_window.size


def decoder_of(spec: Spec, what: str) -> DecoderConfig:
    """The decoder that a spec describes. SpecError for a model of another source: `what` is done to decoders only."""
    if not isinstance(spec.model, DecoderConfig):
        raise SpecError(f"only a `model:` with an `architecture:` of moec's own can be {what}", place=spec.name)
    return spec.model
