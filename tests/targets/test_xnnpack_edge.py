"""The fast way to the edge dialect: the bytes that ExecuTorch's own function writes, and who takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from executorch.extension.pybindings import portable_lib
from torch import nn

from moec.checkpoints import synthesize
from moec.compiler import build
from moec.compiler.program import LazyWeight
from moec.compiler.spec import load_spec, parse_spec
from moec.sources.random_checkpoint import save_random
from moec.sources.transformers_source import TransformersModel
from moec.targets.xnnpack import execution
from moec.targets.xnnpack.edge import plain_edge_program
from moec.targets.xnnpack.execution import to_execution
from moec.targets.xnnpack.pte import emit, write_pte
from tests.tiny import tiny_text

FAMILIES = Path(__file__).parents[2] / "specs" / "families"
WIDTH = 7
slow = pytest.mark.slow


class Rotary(nn.Module):
    """What transformers' models compute beside the fused operators. x [1, T, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1.0, 0.5, 0.25, 0.1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[1]).to(torch.float32).unsqueeze(1) * self.frequencies.unsqueeze(0)
        table = torch.cat([angles, angles[:, :3]], -1)
        turned = x * (table.cos() * 1.25) + (-x) * (table.sin() * 1.25)
        return (turned.exp() + 1e-6).rsqrt().tanh() - 0.5


class BetweenStates(nn.Module):
    """What transformers' models compute beside layers with a state. x [1, T, 7]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        two, five = x.split([2, 5], -1)
        pieces = [*five.split(2, -1), five.reshape(1, x.shape[1], -1, 5)[:, :, 0, :1]]
        steps = torch.nn.functional.softplus(torch.cat([*pieces, two[..., :1]], -1)) / 6.0
        return steps.clamp(0.1, 0.9) + torch.relu(x).square() / (x + 9.0)


@pytest.mark.parametrize("module", [Rotary, BetweenStates])
def test_the_fast_way_writes_the_bytes_of_executorchs_own(
    module: type[nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x = torch.randn(1, 5, WIDTH)
    dynamic = ({1: torch.export.Dim("T", min=1, max=9)},)
    exported = torch.export.export(module(), (x,), dynamic_shapes=dynamic, strict=False).run_decompositions({})
    for node in exported.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        exported.graph.erase_node(node)  # as the pass canonicalize does
    assert plain_edge_program(exported) is not None
    weights = {n: LazyWeight(tuple(v.shape), v.dtype, lambda v=v: v) for n, v in module().named_buffers()}
    write_pte(tmp_path / "fast.pte", emit(to_execution({"forward": exported}, []).methods, {}), weights)
    monkeypatch.setattr(execution, "plain_edge_program", lambda method: None)
    write_pte(tmp_path / "slow.pte", emit(to_execution({"forward": exported}, []).methods, {}), weights)
    assert (tmp_path / "fast.pte").read_bytes() == (tmp_path / "slow.pte").read_bytes()
    program = portable_lib._load_for_executorch(str(tmp_path / "fast.pte"))  # a buffer would have to outlive it
    # ExecuTorch's kernels call the C library's functions where torch has vectors of its own: a few last places
    torch.testing.assert_close(program.run_method("forward", (x,))[0], module()(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: torch.nn.functional.gelu(x) + 1.5,
        lambda x: x * 2,  # an integer: torch decides what it becomes
        lambda x: x.to(torch.float64) * 2.5,
        lambda x: x + torch.arange(3),
        lambda x: torch.add(x, 1.5, alpha=2),
        lambda x: x.sum(-1),
    ],
)
def test_what_needs_more_than_new_names_goes_executorchs_way(compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Unplain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return compute(x)

    exported = torch.export.export(Unplain(), (torch.zeros(1, 3),), strict=False).run_decompositions({})
    assert plain_edge_program(exported) is None
    assert "forward" in to_execution({"forward": exported}, []).methods


@pytest.mark.parametrize(
    "model",
    ["mobilemoe-tiny", "qwen3-moe", "lfm2-moe", *(pytest.param(m, marks=slow) for m in ("qwen3-next", "gpt-oss"))],
)
def test_shipped_models_take_the_fast_way(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one operator has no plain form, a compile takes three times as long and nothing else tells."""

    class Done(BaseException):
        pass

    def first(method: torch.export.ExportedProgram) -> None:
        assert plain_edge_program(method) is not None
        raise Done

    monkeypatch.setattr(execution, "plain_edge_program", first)
    if model == "mobilemoe-tiny":
        spec = parse_spec(tiny_text())
        synthesize(spec, tmp_path / "checkpoint", seed=1)
    else:
        spec = load_spec(FAMILIES / f"{model}.yaml")
        assert isinstance(spec.model, TransformersModel)
        save_random(spec.model.transformers, tmp_path / "checkpoint", seed=1)
    with pytest.raises(Done):
        build.compile(spec, "xnnpack", tmp_path / "checkpoint", tmp_path / "artifact")
