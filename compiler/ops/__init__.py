"""The operators of the fused and quantized stages. Importing this package registers them under `torch.ops.moec`."""

from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.ops.cached_attention import cached_attention
from moec.compiler.ops.cached_attention_q8 import cached_attention_q8
from moec.compiler.ops.embedding_q import embedding_q
from moec.compiler.ops.fused_moe import fused_moe
from moec.compiler.ops.fused_moe_q import fused_moe_q
from moec.compiler.ops.linear_q import linear_q
from moec.compiler.ops.rms_norm import rms_norm
from moec.compiler.ops.rope import rope

__all__ = [
    "Experts",
    "Routing",
    "cached_attention",
    "cached_attention_q8",
    "embedding_q",
    "fused_moe",
    "fused_moe_q",
    "linear_q",
    "rms_norm",
    "rope",
]
