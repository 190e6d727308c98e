"""A small program whose state cannot go back to an earlier position, written with ExecuTorch's own emitter.

T tokens, C channels, K taps, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn

from moec.compiler.program import ModelInfo
from moec.targets.constant_methods import constant_methods
from moec.targets.xnnpack import cpu_ops  # noqa: F401  (registers moec::*)

C, K, MAX_TOKENS = 16, 4, 8


class Carried(nn.Module):
    """A convolution that carries its last inputs on; then a table of the first `known` ids, at which others fail."""

    def __init__(self, vocabulary: int, known: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = (("first", (vocabulary, C)), ("taps", (K, C)), ("second", (known, C)), ("head", (C, vocabulary)))
        for name, shape in shapes:
            self.register_parameter(name, nn.Parameter(torch.randn(*shape, generator=generator)))
        self.register_buffer("state", torch.zeros(1, K - 1, C))

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        x = nn.functional.embedding(tokens, self.first)
        y = torch.ops.moec.short_conv(x, self.taps, None, self.state, start_pos, False)
        y = y + nn.functional.embedding(tokens, self.second)
        return (y @ self.head)[:, -1]


def carried_program(vocabulary: int, context: int, *, known: int) -> bytes:
    """The `.pte`; token 2 ends an answer."""
    tokens = ({1: torch.export.Dim("T", min=1, max=MAX_TOKENS)}, {})
    example = (torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(Carried(vocabulary, known), example, dynamic_shapes=tokens, strict=False)
            edge = to_edge_transform_and_lower(
                {"forward": exported.run_decompositions({})},
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
                constant_methods={
                    **constant_methods(ModelInfo("carried", vocabulary, context, MAX_TOKENS, 1, (2,)), []),
                    "get_states_appended": 0,
                },
            )
            planning = MemoryPlanningPass(share_mutable_buffers=True)
            config = ExecutorchBackendConfig(memory_planning_pass=planning, emit_mutable_buffer_names=True)
            return bytes(edge.to_executorch(config).buffer)
    finally:
        logging.disable(logging.NOTSET)
