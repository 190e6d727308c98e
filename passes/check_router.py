"""Check the router: every fused MoE node scores its experts in FP32, from an FP32 weight and an FP32 input.

A BF16 router changes the selected set of 2.6% of tokens; an FP32 router, compared with FP64, that of one in 20,000. The
pass rewrites nothing: it fails with the layer's name for a router that is not FP32, and lifts the program to stage
FUSED, in which the dialect keeps routers FP32 from then on (`dialect.STAGES`).
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.ops import FusedMoe
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Program, Role, Stage, module_path


def check_router() -> Pass:
    return Pass("check_router", _run, needs=Stage.CANONICAL, gives=Stage.FUSED)


def _run(program: Program) -> PassResult:
    pinned = 0
    for node in program.graph.nodes:
        moe = FusedMoe[Node].find(node)
        if moe is None:
            continue
        for operand in (moe.router_input, moe.router_weight):
            dtype = operand.meta["val"].dtype
            if dtype != torch.float32:
                raise CompileError(
                    f"the router reads {operand.name} as {str(dtype).removeprefix('torch.')}",
                    place=module_path(node) or node.name,
                    remedy="keep the router and its input in float32",
                )
        name = program.weight_of(moe.router_weight)
        if name is None or program.roles[name] is not Role.ROUTER:
            raise CompileError(
                "the router's weight does not have the role router", place=module_path(node) or node.name
            )
        pinned += 1
    return PassResult(program.edit().done(stage=Stage.FUSED), pinned)
