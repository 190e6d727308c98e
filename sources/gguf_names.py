"""Where the tensors of a model of transformers lie in a GGUF file: names, and how several of them make one.

E experts, N rows (outputs), K inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

# The model's names -> the file's, of a whole model and below a layer.
_WHOLE: Mapping[str, str] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Place:
    """The tensors of the file that one of the model is made of, joined along their rows.

    alternating: rows of theirs by turns, instead of one tensor's after the other's. transposed: the model holds the
    result with its last two dimensions swapped. of_rows: a number for each row, [E, N] of parts [E, N].
    """

    sources: tuple[str, ...]
    alternating: bool = False
    transposed: bool = False
    of_rows: bool = False

    def rows_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape [.., N, K] of what the tensors are joined to, for a tensor of the model of this shape."""
        if self.of_rows:
            return (*shape, 1)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def rows(self, part: Tensor) -> Tensor:
        """A tensor of the file as rows [.., N, K]."""
        return part[..., None] if self.of_rows else part

    def in_order(self, rows: Tensor) -> Tensor:
        """Rows [.., N, K] of one part after the other in the model's order; codes and scales lie as values do."""
        if not self.alternating:
            return rows
        return rows.unflatten(-2, (len(self.sources), -1)).transpose(-3, -2).flatten(-3, -2)

    def in_model(self, rows: Tensor) -> Tensor:
        """What was joined, [.., N, K], as the model holds it."""
        if self.of_rows:
            return rows[..., 0]
        return rows.transpose(-1, -2) if self.transposed else rows


def _of(*sources: str) -> Callable[[re.Match[str]], Place]:
    return lambda found: Place(tuple(found.expand(source) for source in sources))


def _experts(*sources: str) -> Callable[[re.Match[str]], Place]:
    """Experts [E, K, N], whose gate and up projections lie in alternating columns."""
    return lambda found: Place(sources, alternating=len(sources) > 1, transposed=True)


def _biases(*sources: str) -> Callable[[re.Match[str]], Place]:
    return lambda found: Place(sources, alternating=len(sources) > 1, of_rows=True)


_Names = tuple[tuple[str, Callable[[re.Match[str]], Place]], ...]
_BELOW: _Names = (
    (r"input_layernorm\.weight", _of("attn_norm.weight")),
    (r"post_attention_layernorm\.weight", _of("ffn_norm.weight")),
    (r"self_attn\.([qkv])_proj\.(weight|bias)", _of(r"attn_\1.\2")),
    (r"self_attn\.o_proj\.(weight|bias)", _of(r"attn_output.\1")),
    (r"self_attn\.([qk])_norm\.weight", _of(r"attn_\1_norm.weight")),
    (r"mlp\.(gate|up|down)_proj\.(weight|bias)", _of(r"ffn_\1.\2")),
    (r"(?:mlp\.gate|block_sparse_moe\.router)\.weight", _of("ffn_gate_inp.weight")),
    (r"(?:mlp|block_sparse_moe)\.experts\.gate_up_proj", _of("ffn_gate_exps.weight", "ffn_up_exps.weight")),
    (r"(?:mlp|block_sparse_moe)\.experts\.down_proj", _of("ffn_down_exps.weight")),
    (r"mlp\.shared_expert\.(gate|up|down)_proj\.weight", _of(r"ffn_\1_shexp.weight")),
    (r"mlp\.shared_expert_gate\.weight", _of("ffn_gate_inp_shexp.weight")),
    (r"shared_mlp\.input_linear\.weight", _of("ffn_gate_shexp.weight", "ffn_up_shexp.weight")),
    (r"shared_mlp\.output_linear\.weight", _of("ffn_down_shexp.weight")),
)
# Of one model_type, before those above.
_OF_TYPE: Mapping[str, _Names] = {
    "gpt_oss": (
        (r"post_attention_layernorm\.weight", _of("post_attention_norm.weight")),
        (r"self_attn\.sinks", _of("attn_sinks.weight")),
        (r"mlp\.router\.(weight|bias)", _of(r"ffn_gate_inp.\1")),
        (r"mlp\.experts\.gate_up_proj", _experts("ffn_gate_exps.weight", "ffn_up_exps.weight")),
        (r"mlp\.experts\.gate_up_proj_bias", _biases("ffn_gate_exps.bias", "ffn_up_exps.bias")),
        (r"mlp\.experts\.down_proj", _experts("ffn_down_exps.weight")),
        (r"mlp\.experts\.down_proj_bias", _biases("ffn_down_exps.bias")),
    ),
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def place_of(name: str, model_type: str) -> Place | None:
    """Where the tensor `name` of a model of this type lies; None where GGUF has no name for it. A stack of experts has
    a name of its own, also where the file holds a tensor for each."""
    if name in _WHOLE:
        return Place((_WHOLE[name],))
    layer = _LAYER.fullmatch(name)
    for pattern, make in (*_OF_TYPE.get(model_type, ()), *_BELOW) if layer is not None else ():
        found = re.fullmatch(pattern, layer[2]) if layer is not None else None
        if found is not None and layer is not None:
            place = make(found)
            below = tuple(f"blk.{layer[1]}.{source}" for source in place.sources)
            return Place(below, place.alternating, place.transposed, place.of_rows)
    return None
