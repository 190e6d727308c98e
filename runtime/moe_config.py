"""The integers and floats that moec::fused_moe_packed hands to the kernel, and the encoding of a weight's format.

`kernels/moe_config.h` holds the same tables for C++; a test compares the two by reading that file. Append fields, never
renumber, and raise MOEC_ABI_VERSION (kernels/moec_kernel.h) when you do.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from moec.compiler.ops.attributes import Experts, Routing

VERSION = 1


class Kind(IntEnum):
    """How a packed weight stores a number: as a float, as an integer, or as the position of an integer in a table
    (kernels/core/levels.h)."""

    F32 = 0
    INT4 = 1
    INT8 = 2
    IQ4_NL = 3
    FP4 = 4
    NL3 = 5

    @property
    def bits(self) -> int:
        """Bits of a number as it is packed, without its part of a scale."""
        return {Kind.F32: 32, Kind.INT8: 8, Kind.NL3: 3}.get(self, 4)

    @property
    def nibbles(self) -> bool:
        """Whether its codes are two in a byte before they are packed."""
        return self.bits < 8


_AXIS_OUT = 1 << 4
_INT8_ACTIVATIONS = 1 << 5
_F32_SCALES = 1 << 6
_BLOCK_ACTIVATIONS = 1 << 7
_GROUP_SHIFT = 8


@dataclass(frozen=True)
class WeightFormat:
    """The `format` integer of a packed weight, in words. `axis_out`: groups lie along the output features.

    `block_activations`: INT8 activations have a scale for each 32 inputs of a token, not one for the token.

    ValueError when the fields contradict each other: f32 has no groups, a group is a positive multiple of 32.
    """

    kind: Kind = Kind.F32
    group_size: int = 0
    axis_out: bool = False
    int8_activations: bool = False
    f32_scales: bool = False
    block_activations: bool = False

    def __post_init__(self) -> None:
        if self.kind == Kind.F32:
            if any((self.group_size, self.axis_out, self.int8_activations, self.f32_scales, self.block_activations)):
                raise ValueError("an f32 weight has no groups, scales or rounded activations")
        elif self.group_size <= 0 or self.group_size % 32 or self.group_size >= 1 << 22:
            raise ValueError(f"group size {self.group_size} is not a positive multiple of 32")
        if self.block_activations and not self.int8_activations:
            raise ValueError("this format has no INT8 activations, whose blocks could have scales")

    def encode(self) -> int:
        return (
            int(self.kind)
            | (_AXIS_OUT if self.axis_out else 0)
            | (_INT8_ACTIVATIONS if self.int8_activations else 0)
            | (_F32_SCALES if self.f32_scales else 0)
            | (_BLOCK_ACTIVATIONS if self.block_activations else 0)
            | self.group_size << _GROUP_SHIFT
        )

    @classmethod
    def decode(cls, value: int) -> WeightFormat:
        known = 0xF | _AXIS_OUT | _INT8_ACTIVATIONS | _F32_SCALES | _BLOCK_ACTIVATIONS
        if value < 0 or (value & 0xFF) & ~known or (value & 0xF) > max(Kind):
            raise ValueError(f"{value:#x} is not a weight format")
        return cls(
            kind=Kind(value & 0xF),
            group_size=value >> _GROUP_SHIFT,
            axis_out=bool(value & _AXIS_OUT),
            int8_activations=bool(value & _INT8_ACTIVATIONS),
            f32_scales=bool(value & _F32_SCALES),
            block_activations=bool(value & _BLOCK_ACTIVATIONS),
        )


class Config(IntEnum):
    """Positions in the `config` list. Enumerated values are positions in the tuples below."""

    VERSION = 0
    EXPERTS = 1
    D_MODEL = 2
    EXPERT_WIDTH = 3
    TOP_K = 4
    SHARED_WIDTH = 5
    W13_FORMAT = 6
    W2_FORMAT = 7
    SHARED_W13_FORMAT = 8
    SHARED_W2_FORMAT = 9
    SCORE = 10
    AFTER_TOPK = 11
    BIAS_ON = 12
    GROUPS = 13
    KEEP = 14
    GROUP_SCORE = 15
    FILL = 16
    NORMALIZE = 17
    APPLY = 18
    ACTIVATION = 19
    GATED = 20
    INTERLEAVED = 21


class Params(IntEnum):
    """Positions in the `params` list."""

    EPS = 0
    CLAMP_MIN = 1
    SCALE = 2
    ALPHA = 3
    GATE_MIN = 4
    GATE_MAX = 5
    UP_MIN = 6
    UP_MAX = 7
    UP_OFFSET = 8
    THRESHOLD = 9


SCORE = ("softmax", "sigmoid", "sqrtsoftplus", "sparsemixer")
BIAS_ON = ("scores", "logits")
GROUP_SCORE = ("max", "top2sum")
FILL = ("zero", "ninf")
NORMALIZE = ("none", "sum")
APPLY = ("output", "input")
ACTIVATION = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class MoeConfig:
    """Everything about one MoE block that is not a tensor. `encode()` gives the operator's two lists.

    The last of the floats, a threshold, is there for sparsemixer only: older runtimes read the lists without it.

    The `layout` of `what` plays no part here: packing has dealt with it. w13 has 2F rows when gated, else F.
    """

    experts: int
    d_model: int
    expert_width: int
    top_k: int
    how: Routing
    what: Experts
    w13: WeightFormat
    w2: WeightFormat
    shared_width: int = 0
    shared_w13: WeightFormat = WeightFormat()
    shared_w2: WeightFormat = WeightFormat()

    def encode(self) -> tuple[list[int], list[float]]:
        config = [0] * len(Config)
        config[Config.VERSION] = VERSION
        config[Config.EXPERTS] = self.experts
        config[Config.D_MODEL] = self.d_model
        config[Config.EXPERT_WIDTH] = self.expert_width
        config[Config.TOP_K] = self.top_k
        config[Config.SHARED_WIDTH] = self.shared_width
        config[Config.W13_FORMAT] = self.w13.encode()
        config[Config.W2_FORMAT] = self.w2.encode()
        config[Config.SHARED_W13_FORMAT] = self.shared_w13.encode()
        config[Config.SHARED_W2_FORMAT] = self.shared_w2.encode()
        config[Config.SCORE] = SCORE.index(self.how.score)
        config[Config.AFTER_TOPK] = int(self.how.after_topk)
        config[Config.BIAS_ON] = BIAS_ON.index(self.how.bias_on)
        config[Config.GROUPS] = self.how.groups
        config[Config.KEEP] = self.how.keep
        config[Config.GROUP_SCORE] = GROUP_SCORE.index(self.how.group_score)
        config[Config.FILL] = FILL.index(self.how.fill)
        config[Config.NORMALIZE] = NORMALIZE.index(self.how.normalize)
        config[Config.APPLY] = APPLY.index(self.how.apply)
        config[Config.ACTIVATION] = ACTIVATION.index(self.what.activation)
        config[Config.GATED] = int(self.what.gated)
        config[Config.INTERLEAVED] = int(self.what.interleaved)
        params = [0.0] * len(Params)
        params[Params.EPS] = self.how.eps
        params[Params.CLAMP_MIN] = self.how.clamp_min
        params[Params.SCALE] = self.how.scale
        params[Params.ALPHA] = self.what.alpha
        params[Params.GATE_MIN] = self.what.gate_min
        params[Params.GATE_MAX] = self.what.gate_max
        params[Params.UP_MIN] = self.what.up_min
        params[Params.UP_MAX] = self.what.up_max
        params[Params.UP_OFFSET] = self.what.up_offset
        params[Params.THRESHOLD] = self.how.threshold
        return config, params if self.how.score == "sparsemixer" else params[: Params.THRESHOLD]
