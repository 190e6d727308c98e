"""Sizes of a model in a Metal artifact, and an estimate of the memory of the app that runs it.

Weights are stored as MLX takes them (encode.py): codes, and scales in the target's dtype; the affine bias of every
group is computed when the file is loaded and stays beside them. A test compares stored sizes with a compiled artifact.
Memory in use has not been measured on Apple hardware; the runtime's own (Metal, MLX) is not counted.
"""

from __future__ import annotations

from typing import Any

from moec.compiler.architecture import Architecture, Cache, Weight
from moec.compiler.footprint import Footprint
from moec.compiler.spec.device import Device
from moec.compiler.spec.quantization import WeightScheme
from moec.compiler.states import Codes
from moec.targets.metal.options import Options

_WIDTH = {"float16": 2, "bfloat16": 2, "float32": 4}
_LARGEST_GROUP = 128  # larger groups are stored as several of this size with equal scales
# Two methods; 43,304 bytes a method in an artifact of 4 layers, and what the file needs around its constants.
_PROGRAM_PER_LAYER, _AROUND = 2 * 10_800, 18_000


class MetalFootprint(Footprint):
    target = "metal"
    checked = "stored sizes: compiled artifacts; memory in use: never measured on Apple hardware, runtime not counted"
    mapped = False  # unknown: whether the delegate keeps the file's pages or copies them was never observed

    def _dtype(self, options: Any) -> int:
        return _WIDTH[options.dtype if isinstance(options, Options) else Options().dtype]

    def weight_bytes(self, weight: Weight, scheme: WeightScheme | None, options: Any) -> int:
        if weight.role == "router":
            return 4 * weight.numel
        if scheme is None or weight.columns == 1:
            return self._dtype(options) * weight.numel
        return weight.numel * (8 if scheme.levels else scheme.bits) // 8 + self._scales(weight, scheme, options)

    def _scales(self, weight: Weight, scheme: WeightScheme, options: Any) -> int:
        return weight.numel // min(scheme.group_size, _LARGEST_GROUP) * self._dtype(options)

    def copied_bytes(self, weight: Weight, scheme: WeightScheme | None, options: Any) -> int:
        """The biases of the affine form: one for each scale."""
        return 0 if scheme is None or weight.columns == 1 else self._scales(weight, scheme, options)

    def cache_bytes(self, cache: Cache, codes: Codes | None, positions: int) -> int:
        return sum(state.bytes(positions) for state in cache.states(codes, dtype="float16"))

    def constant_bytes(self, architecture: Architecture, positions: int) -> int:
        """Cosines and sines, float32 [context, d / 2] each, loaded whole; of our own decoders."""
        rows = architecture.caches[:1] if architecture.own else ()
        return sum(architecture.context * 4 * cache.key_width for cache in rows)

    def program_bytes(self, architecture: Architecture) -> int:
        return _AROUND + _PROGRAM_PER_LAYER * architecture.layers

    def activation_bytes(self, architecture: Architecture, tokens: int, options: Any) -> int:
        """The widest layer's tensors of `tokens` tokens, and the logits of one."""
        cache, moe = architecture.caches[0] if architecture.caches else Cache(1, 0, 0), architecture.experts
        q, kv = architecture.heads * cache.key_width, cache.kv_heads * cache.key_width
        routed = 0 if moe is None else moe.top_k * (3 * moe.width + architecture.d_model) + 3 * moe.shared_width
        widest = max(2 * (q + 2 * kv) + q + kv, 5 * architecture.ffn_width, routed)
        return self._dtype(options) * tokens * (architecture.d_model + widest) + 4 * architecture.vocab_size

    def runtime_bytes(self) -> int:
        return 0

    def instructions(self, architecture: Architecture) -> int:
        """Not used: nothing is expected of a GPU that was never timed."""
        return 0

    def peak(self, device: Device, *, integer: bool) -> float:
        """Of the GPU, which computes with floats whatever the weights are. It was never timed: there are no `rates`."""
        assert device.gpu_fp16_gflop_per_s is not None, "Options.device_needs"
        return device.gpu_fp16_gflop_per_s.number * 1e9

    def chunk(self, options: Any) -> int:
        return options.max_tokens if isinstance(options, Options) else Options().max_tokens


FOOTPRINT = MetalFootprint()
