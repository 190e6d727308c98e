"""The `.pte` writer: what ExecuTorch's own reader finds in a file, against the weights that went in."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.schema import Program, Tensor
from torch import nn

from moec.compiler.program import LazyWeight
from moec.targets.xnnpack.execution import to_execution
from moec.targets.xnnpack.pte import SEGMENT_ALIGNMENT, TENSOR_ALIGNMENT, Emitted, emit, write_pte

SIZES = (3, 7)  # odd, so that every weight but the first needs padding


class Sum(nn.Module):
    """x [1, T, 7] plus two weights; `minus` reads the second one with the other sign."""

    def __init__(self, *, minus: bool = False) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(*SIZES), requires_grad=False)
        self.second = nn.Parameter(torch.empty(SIZES[1]), requires_grad=False)
        self.minus = minus

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.first[:1]
        return y - self.second if self.minus else y + self.second


@pytest.fixture(scope="module")
def values() -> dict[str, torch.Tensor]:
    return {"first": torch.randn(*SIZES), "second": torch.randn(SIZES[1])}


def emitted() -> Emitted:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        modules = {"forward": Sum(), "other": Sum(minus=True)}
        example = (torch.zeros(1, 5, SIZES[1]),)
    dynamic = ({1: torch.export.Dim("T", min=1, max=9)},)
    exported = {
        name: torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
        for name, module in modules.items()
    }
    return emit(to_execution(exported, []).methods, {"get_answer": 42})


def lazy(tensors: dict[str, torch.Tensor]) -> dict[str, LazyWeight]:
    return {n: LazyWeight(tuple(v.shape), v.dtype, lambda v=v: v) for n, v in tensors.items()}


def read(file: Path) -> Program:
    return deserialize_pte_binary(file.read_bytes()).program


def test_executorch_reads_back_every_weight(values, tmp_path) -> None:
    written = write_pte(tmp_path / "m.pte", emitted(), lazy(values))
    program = read(tmp_path / "m.pte")
    found = {
        plan.name: [
            program.constant_buffer[v.val.data_buffer_idx].storage[: 4 * torch.Size(v.val.sizes).numel()]
            for v in plan.values
            if isinstance(v.val, Tensor) and v.val.data_buffer_idx
        ]
        for plan in program.execution_plan
    }
    wanted = {value.numpy().tobytes() for value in values.values()}
    assert set(found["forward"]) == set(found["other"]) == wanted
    assert len(program.constant_buffer) == 3, "methods share weights; constant 0 is reserved"
    assert [p.name for p in program.execution_plan] == ["forward", "other", "get_answer"]
    assert written.weight_bytes == {name: value.nbytes for name, value in values.items()}


def test_length_and_digest_are_those_of_the_file(values, tmp_path) -> None:
    written = write_pte(tmp_path / "m.pte", emitted(), lazy(values))
    content = (tmp_path / "m.pte").read_bytes()
    assert written.bytes == len(content)
    assert written.sha256 == hashlib.sha256(content).hexdigest()


def test_everything_is_aligned(values, tmp_path) -> None:
    made = emitted()
    write_pte(tmp_path / "m.pte", made, lazy(values))
    assert all(s.offset % SEGMENT_ALIGNMENT == 0 for s in made.program.segments)
    assert all(o % TENSOR_ALIGNMENT == 0 for o in made.program.constant_segment.offsets)


def test_a_weight_is_converted_to_the_type_the_graph_reads(values, tmp_path) -> None:
    rounded = {name: value.to(torch.bfloat16) for name, value in values.items()}
    write_pte(tmp_path / "a.pte", emitted(), lazy(rounded))
    write_pte(tmp_path / "b.pte", emitted(), lazy({n: v.to(torch.float32) for n, v in rounded.items()}))
    assert (tmp_path / "a.pte").read_bytes() == (tmp_path / "b.pte").read_bytes()


def test_weights_are_held_one_at_a_time(values, tmp_path) -> None:
    events: list[str] = []

    def weight(name: str, value: torch.Tensor) -> LazyWeight:
        def load() -> torch.Tensor:
            events.append(f"load {name}")
            return value.clone()

        return LazyWeight(tuple(value.shape), value.dtype, load)

    weights = {n: weight(n, v) for n, v in values.items()}
    write_pte(tmp_path / "m.pte", emitted(), weights, after=lambda name: events.append(f"done {name}"))
    assert sorted(events[::2]) == ["load first", "load second"]
    assert [e.split()[1] for e in events[::2]] == [e.split()[1] for e in events[1::2]], "each is done before the next"


def test_a_weight_of_another_size_is_our_fault(values, tmp_path) -> None:
    weights = lazy(values)
    weights["second"] = LazyWeight((SIZES[1],), torch.float32, lambda: torch.zeros(SIZES[1] + 1))
    with pytest.raises(ValueError, match="were announced"):
        write_pte(tmp_path / "m.pte", emitted(), weights)


def test_a_full_disk_is_found_before_the_first_weight(values, tmp_path, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    unread = {n: LazyWeight(tuple(v.shape), v.dtype, pytest.fail) for n, v in values.items()}
    with pytest.raises(OSError, match="No space"):
        write_pte(tmp_path / "m.pte", emitted(), unread)
