"""moec::latent_attention: attention of many heads over one cache of latents (MLA in its absorbed form).

T tokens, S cache positions, H query heads, R width of a latent, P width of the rotated part of a key. A position's key
is its latent beside its rotated part, the same for all heads, and its value is its latent (DeepSeek-V2, arXiv
2405.04434, section 2.1.2; the products with the weights that expand latents are `head_linear`):

    score[t, h, j] = scale * (q[t, h] . latent[j] + q_rope[t, h] . rope[j])
    y[t, h] = sum over j of softmax(score[t, h])[j] * latent[j]

q [1, T, H, R], q_rope [1, T, H, P], latents [1, T, R], rope [1, T, P], caches [1, S, 1, R] and [1, S, 1, P], start_pos
int64 [1]. Rows are written at start_pos .. start_pos+T-1; causality and window are those of `cached_attention`. Returns
[1, T, H, R].

Caches hold float32 or, with scales beside them, INT8 codes: float32 [1, S, 1], one for a latent and one for its rotated
part, whose sizes differ. `in_integers` is what engines compute that multiply codes (`attention_codes.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ops.attention_codes import Keys, attend_codes
from moec.compiler.ops.cached_attention import attend, dequantized, extended, write_positions
from moec.compiler.ops.call import Call, V, Written, register, require

_OP = "latent_attention"


@dataclass(frozen=True)
class LatentAttention(Call[V]):
    q: V
    q_rope: V
    latents: V
    rope: V
    latent_cache: Written[V]
    rope_cache: Written[V]
    start_pos: V
    scale: float
    window: int
    latent_scale: Written[V] | None = None
    rope_scale: Written[V] | None = None

    def parts(self) -> tuple[tuple[V, V, V | None], tuple[V, V, V | None]]:
        """Latents and rotated parts: (the rows of this call, their cache, the cache's scales)."""
        return (self.latents, self.latent_cache, self.latent_scale), (self.rope, self.rope_cache, self.rope_scale)

    @property
    def coded(self) -> bool:
        """Whether the caches hold codes."""
        return self.latent_scale is not None

    def eager(self: LatentAttention[Tensor]) -> Tensor:
        positions, parts = self._written()
        latents, rope = (dequantized(*part) for part in parts)
        q = torch.cat((self.q, self.q_rope), -1)
        y = attend(q, torch.cat((latents, rope), -1), latents, positions, self.scale, self.window)
        return y.unflatten(2, (self.q.shape[2], -1))

    def in_integers(self: LatentAttention[Tensor]) -> Tensor:
        """`eager` as engines compute it that multiply codes of caches as they are; the same over float caches."""
        if not self.coded:
            return self.eager()
        positions, ((latents, latent_scale), (rope, rope_scale)) = self._written()
        assert latent_scale is not None
        assert rope_scale is not None
        keys: Keys = (latents, latent_scale), (rope, rope_scale)
        q = torch.cat((self.q, self.q_rope), -1)
        y = attend_codes(q, keys, (latents, latent_scale), positions, self.scale, self.window)
        return y.unflatten(2, (self.q.shape[2], -1))

    def _written(self: LatentAttention[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
        """Positions of the call; both caches and their scales up to the last of them, written."""
        positions = write_positions(_OP, self.start_pos, self.q.shape[1], self.latent_cache.shape[1])
        end = int(positions[-1]) + 1
        return positions, [
            extended(rows[:, :, None], cache, scales, positions, end) for rows, cache, scales in self.parts()
        ]

    def fake(self: LatentAttention[Tensor]) -> Tensor:
        """[1, T, H, R] without values; ValueError for shapes that are not those of the module's docstring."""
        for name, part in (("q", self.q), ("q_rope", self.q_rope)):
            require(part.dim() == 4, _OP, f"{name} must have four dimensions")
        require(self.q.shape[2] == self.q_rope.shape[2], _OP, "q and q_rope differ in heads")
        require(self.latent_cache.shape[1] == self.rope_cache.shape[1], _OP, "the caches differ in length")
        require(self.window >= 0, _OP, "window must not be negative")
        require((self.latent_scale is None) == (self.rope_scale is None), _OP, "both caches must be stored alike")
        for q, (rows, cache, scales) in zip((self.q, self.q_rope), self.parts(), strict=True):
            require(rows.dim() == 3 and rows.shape[2] == q.shape[3], _OP, "queries and rows differ in width")
            wanted = cache.dim() == 4 and tuple(cache.shape[2:]) == (1, rows.shape[2])
            require(wanted, _OP, "caches must be [1, S, 1, width of the rows]")
            if scales is None:
                require(cache.dtype.is_floating_point, _OP, "caches of codes need their scales")
                continue
            require(cache.dtype == torch.int8, _OP, "caches with scales must be int8")
            require(tuple(scales.shape) == tuple(cache.shape[:3]), _OP, "scales must be [1, S, 1]")
        return self.q.new_empty(self.q.shape)


latent_attention = register(_OP, LatentAttention)
