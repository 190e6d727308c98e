"""Sizes of a model in an XNNPACK artifact and in the process that runs it, without packing anything.

Packed weights follow kernels/moec_kernel.h (16 rows and 8 inputs are padded; FP16 scales); a float linear goes to the
XNNPACK delegate, which keeps a packed copy beside the file. Arena and program are read off the graphs that
`legalize.py` makes of our decoders; a test compares all of it with compiled artifacts.
"""

from __future__ import annotations

from typing import Any

from moec.compiler.architecture import Architecture, Cache, Weight
from moec.compiler.footprint import Footprint
from moec.compiler.rates import Rates, kernel_rates
from moec.compiler.spec.device import Device
from moec.compiler.spec.quantization import WeightScheme
from moec.compiler.states import Codes
from moec.targets.xnnpack.options import Options

_ROWS, _INPUTS = 16, 8  # kernels/core/format.h: kBlockRows, kUnit
_DELEGABLE = {"attention": "attention", "ffn": "ffn", "shared": "ffn", "head": "head", "embedding": "head"}
# Bytes of the program per instruction of one method, with experts and without: 310 to 322 and 261 to 303 seen.
_PROGRAM_SPARSE, _PROGRAM_DENSE = 310, 300
# A process of the runner apart from model, arena and scratch: its pages and libexecutorch's, stacks. Measured on x86-64
# Linux as the peak of small models less what this file computes; `moec device measure` measures it anew.
_RUNTIME = 7_200_000
_TILE_BYTES, _MOST_TILE = 3 << 20, 48  # kernels/core/moe_run.cpp: kTileBytes, kMostTile
# Instructions of a layer's mixer beside attention: of the artifacts of six families, which differ by a tenth.
_MIXERS = {"short_conv": 5, "gated_delta": 53, "selective_scan": 28}
_LATENT_LANES = 16  # passes/absorb_latents.py
_THREADS = 4  # each holds one tile: what is assumed where the spec names no number


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class XnnpackFootprint(Footprint):
    target = "xnnpack"
    checked = "artifacts and processes of x86-64 Linux"
    mapped = True

    def weight_bytes(self, weight: Weight, scheme: WeightScheme | None, options: Any) -> int:
        if scheme is None or weight.columns == 1:
            return 4 * weight.numel
        codes = _up(weight.rows, _ROWS) * _up(weight.columns, _INPUTS) * scheme.grid.packed_bits // 8
        if scheme.axis == "out":
            scales = weight.rows // scheme.group_size * _up(weight.columns, _INPUTS)
        else:
            scales = _up(weight.rows, _ROWS) * (weight.columns // scheme.group_size)
        return weight.count * (codes + 2 * scales)

    def holds(self, weight: Weight, scheme: WeightScheme, options: Any) -> bool:
        return not (scheme.levels and self._delegated(weight, scheme, options))

    def copied_bytes(self, weight: Weight, scheme: WeightScheme | None, options: Any) -> int:
        return self.weight_bytes(weight, scheme, options) if self._delegated(weight, scheme, options) else 0

    def _delegated(self, weight: Weight, scheme: WeightScheme | None, options: Any) -> bool:
        """Whether XNNPACK serves this linear (legalize_linear.py: `auto` gives it float weights, the head apart)."""
        section = _DELEGABLE.get(weight.role)
        # a shared expert is part of the fused block; a table is looked up, not multiplied, unless it is the head
        if section is None or weight.columns == 1 or weight.role in ("shared", "embedding"):
            return False
        kernels = options.kernels if isinstance(options, Options) else Options().kernels
        chosen = getattr(kernels, section)
        return chosen == "xnnpack" or (chosen == "auto" and scheme is None and section != "head")

    def cached(self, cache: Cache) -> Cache:
        return cache.absorbed(_LATENT_LANES)

    def cache_bytes(self, cache: Cache, codes: Codes | None, positions: int) -> int:
        return sum(state.bytes(positions) for state in cache.states(codes))

    def constant_bytes(self, architecture: Architecture, positions: int) -> int:
        """Cosines and sines, float32 [positions, d / 2] each; models that are not ours compute them in every call."""
        return positions * 4 * architecture.caches[0].key_width if architecture.own and architecture.caches else 0

    def program_bytes(self, architecture: Architecture) -> int:
        each = _PROGRAM_SPARSE if architecture.experts else _PROGRAM_DENSE
        return 2 * each * self.instructions(architecture)  # forward and forward_all

    def activation_bytes(self, architecture: Architecture, tokens: int, options: Any) -> int:
        """The arena of `forward`, as far as `tokens` tokens touch it, the scratch of the widest kernel, and the logits.

        Arena, floats a token: the residual, and the larger of attention (q, k, v twice, rotated q, with norms of q
        and k rotated k) and a dense feed-forward block (its input, activated gate times up); the logits of one token
        share its space. A convolution or recurrence: what its linears make, the same in parts, and what the convolution
        makes of it.
        """
        d, cache = architecture.d_model, architecture.caches[0] if architecture.caches else Cache(1, 0, 0)
        q, kv = architecture.heads * cache.key_width, cache.kv_heads * cache.key_width
        attention = 2 * (q + 2 * kv) + q + (kv if architecture.qk_norm else 0)
        if cache.latent is not None and cache.latent.absorbed:  # queries and results of every head in terms of latents
            attention = architecture.heads * (2 * cache.key_width + cache.value_width)
        mixing = max((2 * m.inputs + m.channels for m in architecture.mixers), default=0)
        arena = 4 * tokens * (d + max(attention, mixing, d + architecture.ffn_width) + cache.key_width)
        logits = 4 * architecture.vocab_size
        threads = (options.threads if isinstance(options, Options) else None) or _THREADS
        return max(arena, logits) + logits + self._scratch(architecture, tokens, threads)

    def _scratch(self, architecture: Architecture, tokens: int, threads: int) -> int:
        """Routed blocks (core/moe_run.cpp, run_wide): every pair's output and each worker's tile; a quarter of slack.

        Dense blocks: the widest input, rounded.
        """
        d, moe = architecture.d_model, architecture.experts
        if moe is None:
            return tokens * max(architecture.ffn_width, d)
        width = max(moe.width, moe.shared_width)
        row = 4 * (3 * width + d) + d + width
        tile = row * min(_MOST_TILE, max(8, _TILE_BYTES // row))
        return (4 * tokens * moe.top_k * d + threads * tile + tokens * d) * 5 // 4

    def runtime_bytes(self) -> int:
        return _RUNTIME

    def instructions(self, architecture: Architecture) -> int:
        """Of `forward`: 18 a layer with fused experts, 17 with a dense block, 2 for norms of q and k; 10 around.

        Models of other sources have some 12 more, 28 in a layer of latents, and those of their mixers in the place of
        the 10 of attention. A layer is a mixer and a block, or only one of them where there are fewer mixers than
        layers.
        """
        sparse = architecture.experts.layers if architecture.experts else 0
        norms = 2 * architecture.layers if architecture.qk_norm else 0
        foreign = 0 if architecture.own else 12 + sum(28 for c in architecture.caches if c.latent is not None)
        attending, mixing = len(architecture.caches), len(architecture.mixers)
        alone = architecture.layers - attending - mixing if mixing else 0
        dense = architecture.layers - sparse - (attending + mixing if alone else 0)
        mixers = 10 * (attending if mixing else architecture.layers) + sum(_MIXERS[m.kind] for m in architecture.mixers)
        return 10 + mixers + 8 * sparse + 7 * dense + norms + foreign

    def rates(self, device: Device, reference: Device | None) -> Rates | None:
        return kernel_rates(device, reference)

    def chunk(self, options: Any) -> int:
        return options.max_tokens if isinstance(options, Options) else Options().max_tokens


FOOTPRINT = XnnpackFootprint()
