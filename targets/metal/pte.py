"""Writing a `.pte` around delegate payloads that we built: one delegate call per method, weights as named data.

ExecuTorch's exporter never sees the large graph. It exports a module of a single call with the signature
`forward(tokens int64 [1, T], start_pos int64 [1]) -> float32 logits`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

BACKEND = "MLXBackend"


@dataclass(frozen=True)
class Method:
    """One entry point: its delegate payload, and whether it gives the logits of every token or of the last one."""

    payload: bytes
    every_token: bool


class _Signature(nn.Module):
    """Shapes only; nothing of it runs."""

    def __init__(self, vocab_size: int, every_token: bool) -> None:
        super().__init__()
        self.vocab_size, self.every_token = vocab_size, every_token

    def forward(self, tokens: Tensor, start_pos: Tensor) -> tuple[Tensor]:
        rows = tokens.to(torch.float32) + start_pos
        if not self.every_token:
            rows = rows[:, -1]
        return (rows.unsqueeze(-1).expand(*rows.shape, self.vocab_size).clone(),)


class _Call(nn.Module):
    def __init__(self, lowered: nn.Module) -> None:
        super().__init__()
        self.lowered = lowered

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        return self.lowered(tokens, start_pos)[0]


def write_pte(
    file: Path,
    methods: Mapping[str, Method],
    data: NamedDataStore,
    *,
    vocab_size: int,
    max_tokens: int,
    constants: Mapping[str, Any],
) -> None:
    """`constants`: constant methods, as ExecuTorch's LLM runners read them. The data is shared by all methods."""
    output = data.get_named_data_store_output()
    exported: dict[str, ExportedProgram] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for index, (name, method) in enumerate(methods.items()):
            signature = _export(_Signature(vocab_size, method.every_token), max_tokens)
            # the named data belongs to the file, not to a method: attached once, found by all
            lowered = LoweredBackendModule(signature, BACKEND, method.payload, [], output if index == 0 else None)
            exported[name] = _export(_Call(lowered), max_tokens)
        edge = to_edge(
            exported,
            constant_methods=dict(constants),
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        program = edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True))
    with file.open("wb") as stream:
        program.write_to_file(stream)


def _export(module: nn.Module, max_tokens: int) -> ExportedProgram:
    example = (torch.zeros(1, min(5, max_tokens), dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    dynamic = {1: Dim("T", min=1, max=max_tokens)} if max_tokens > 1 else None
    return torch.export.export(module, example, dynamic_shapes=(dynamic, None), strict=False)
