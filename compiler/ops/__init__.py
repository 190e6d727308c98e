"""The operators of the fused and quantized stages. Importing this package registers them under `torch.ops.moec`.

Each is a class of `call.py` (`LinearQ`: its operands by name, in a graph or with tensors) and the operator itself
(`linear_q`, what a node's target is).
"""

from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.ops.cached_attention import CachedAttention, cached_attention
from moec.compiler.ops.call import Call, find_call
from moec.compiler.ops.embedding_q import EmbeddingQ, embedding_q
from moec.compiler.ops.fused_moe import FusedMoe, fused_moe
from moec.compiler.ops.fused_moe_q import FusedMoeQ, fused_moe_q
from moec.compiler.ops.gated_delta import GatedDelta, gated_delta
from moec.compiler.ops.head_linear import HeadLinear, head_linear
from moec.compiler.ops.latent_attention import LatentAttention, latent_attention
from moec.compiler.ops.linear_q import LinearQ, linear_q
from moec.compiler.ops.moe_call import MoeCall, MoeSizes, RoutedMoe
from moec.compiler.ops.rms_norm import RmsNorm, rms_norm
from moec.compiler.ops.rope import Rope, rope
from moec.compiler.ops.selective_scan import SelectiveScan, selective_scan
from moec.compiler.ops.short_conv import ShortConv, short_conv

__all__ = [
    "CachedAttention",
    "Call",
    "EmbeddingQ",
    "Experts",
    "FusedMoe",
    "FusedMoeQ",
    "GatedDelta",
    "HeadLinear",
    "LatentAttention",
    "LinearQ",
    "MoeCall",
    "MoeSizes",
    "RmsNorm",
    "Rope",
    "RoutedMoe",
    "Routing",
    "SelectiveScan",
    "ShortConv",
    "cached_attention",
    "embedding_q",
    "find_call",
    "fused_moe",
    "fused_moe_q",
    "gated_delta",
    "head_linear",
    "latent_attention",
    "linear_q",
    "rms_norm",
    "rope",
    "selective_scan",
    "short_conv",
]
