"""The order of the passes from a fused (or quantized) program to what this target lowers."""

from __future__ import annotations

import operator

import torch
import torchao.quantization.quant_primitives

from moec.compiler.dialect import TORCH, Legality, Permitted
from moec.compiler.ops.call import NAMESPACE
from moec.compiler.pipeline import Pass, legal_for
from moec.passes.last_token import ROW_WISE, last_token
from moec.targets.xnnpack.cpu_ops import OUT_FORMS, linear_packed
from moec.targets.xnnpack.legalize_delegate import delegate_linears
from moec.targets.xnnpack.legalize_gated import fuse_gated_linears
from moec.targets.xnnpack.legalize_latent import pack_head_linears
from moec.targets.xnnpack.legalize_linear import pack_embeddings, pack_linears
from moec.targets.xnnpack.legalize_moe import pack_moe
from moec.targets.xnnpack.options import Options

torchao = torch.ops.torchao
# the rounding of activations before a delegated linear: every operand that is not a weight has a row per token
ROUNDING = (
    torchao.choose_qparams_affine.default,
    torchao.quantize_affine.default,
    torchao.dequantize_affine.default,
    operator.getitem,
)
LEGAL = Legality(
    "the target xnnpack",
    Permitted(TORCH | {"torchao"}, frozenset(f"{NAMESPACE}::{name}" for name in OUT_FORMS)),
)


def legalize_passes(options: Options) -> list[Pass]:
    return [
        pack_moe(),
        pack_linears(options),
        fuse_gated_linears(),
        pack_head_linears(),
        pack_embeddings(),
        delegate_linears(),
        legal_for(LEGAL),
        last_token(ROW_WISE | {linear_packed}, every_operand=ROUNDING),
    ]
