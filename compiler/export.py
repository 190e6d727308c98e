"""From a module to a Program: torch.export over fake tensors, with a dynamic token count and a KV cache.

`forward(tokens int64 [1, T], start_pos int64 [1]) -> logits float32 [1, T, V]`; T is dynamic in [1, max_tokens]. No
weight is allocated: the graph comes from shapes alone, and the weights stay lazy in the Program.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from moec.compiler.errors import CheckpointError
from moec.compiler.program import LazyWeight, ModelInfo, Program, Role, Stage
from moec.compiler.program import zeros as zeros
from moec.compiler.states import State
from moec.compiler.written_states import written_states

MAX_TOKENS = 128  # tokens of one call: bounds the planned memory; a session splits longer prompts
EXAMPLE_TOKENS = 7  # any count that is not special (0, 1) and no model dimension


def export_module(
    module: nn.Module, *, context: int, max_tokens: int, mode: FakeTensorMode | None = None
) -> ExportedProgram:
    """Export a module of fake tensors, `forward(tokens [1, T], start_pos [1])`, at ATen training level."""
    limit = min(max_tokens, context)
    with mode or FakeTensorMode(allow_non_fake_inputs=True):
        example = (torch.zeros(1, min(EXAMPLE_TOKENS, limit), dtype=torch.long), torch.zeros(1, dtype=torch.long))
    # with a limit of one token there is nothing dynamic
    dynamic = {1: torch.export.Dim("T", min=1, max=limit)} if limit > 1 else None
    with torch.no_grad():
        return torch.export.export(module.eval(), example, dynamic_shapes=(dynamic, None), strict=False)


def unreadable(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> LazyWeight:
    """A weight of a program that has shapes only: enough for every pass."""

    def load() -> torch.Tensor:
        raise AssertionError(f"a pass read the weight {name}")

    return LazyWeight(shape, dtype, load)


def assemble(
    exported: ExportedProgram,
    weights: Mapping[str, LazyWeight],
    role_of: Mapping[str, Role],
    info: ModelInfo,
    states: Iterable[State] = (),
) -> Program:
    """Attach lazy weights to an exported graph and check that each one the graph reads is there in its shape.

    `states`: what the source knows of the states that the graph writes; the others are read off the graph.
    """
    used: dict[str, LazyWeight] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) or spec.target is None:
            continue
        state = exported.state_dict.get(spec.target)
        wanted = tuple((exported.constants[spec.target] if state is None else state).shape)
        weight = weights.get(spec.target)
        if weight is None:
            raise CheckpointError(
                f"the model needs tensor {spec.target} {list(wanted)}", remedy="use a checkpoint that has it"
            )
        if tuple(weight.shape) != wanted:
            raise CheckpointError(
                f"tensor {spec.target} has shape {list(weight.shape)}, the model needs {list(wanted)}"
            )
        used[spec.target] = weight
    return Program(
        exported=exported,
        weights=used,
        roles={name: role_of.get(name, Role.OTHER) for name in used},
        info=info,
        stage=Stage.EXPORTED,
        states={**written_states(exported, info.context), **{s.name: s for s in states}},
    )
