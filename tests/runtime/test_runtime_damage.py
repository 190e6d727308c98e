"""Damaged programs: an error of one line and exit status 2, never a crash. The runner is a process of its own."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
from executorch.exir.schema import DelegateCall, IntList, JumpFalseCall

from moec.compiler.errors import ArtifactError, RunError
from moec.runtime import native
from moec.targets.xnnpack.session import CpuSession, missing_operators, program_fault
from tests.runtime import runtime_model as m


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("runtime") / "model.pte"
    m.write_pte(path, int8_cache=True)
    return path.read_bytes()


def _run(path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(native.runner_binary()), str(path), "--prompt-length", "20", "--decode", "2", "--threads", "2"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _refused(path: Path, data: bytes) -> str:
    """The reason, in the runner and in a session alike."""
    path.write_bytes(data)
    done = _run(path)
    assert done.returncode == 2, f"status {done.returncode}: {done.stdout}{done.stderr}"
    assert done.stderr.startswith(f"error: {path}: ")
    assert done.stderr.count("\n") == 1
    with pytest.raises(ArtifactError) as raised:
        CpuSession(path)
    assert str(path) in str(raised.value)
    return done.stderr


def test_the_file_itself_runs(tmp_path: Path, good: bytes) -> None:
    (tmp_path / "model.pte").write_bytes(good)
    assert _run(tmp_path / "model.pte").returncode == 0


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.04, 0.5, 0.99, 0.99999])
def test_truncated(tmp_path: Path, good: bytes, share: float) -> None:
    reason = _refused(tmp_path / "model.pte", good[: int(len(good) * share)])
    assert "truncated" in reason or "not an ExecuTorch program" in reason


@pytest.mark.parametrize("data", [b"x", b"\0" * 5000, b"PK\3\4" + b"a" * 500, b"12345678eh00" + b"\xff" * 500])
def test_other_files(tmp_path: Path, data: bytes) -> None:
    assert "not an ExecuTorch program" in _refused(tmp_path / "model.pte", data)


def test_header_that_announces_the_impossible(tmp_path: Path, good: bytes) -> None:
    for offset in (16, 24, 32):  # sizes and offsets of the extended header, 8 bytes each
        data = bytearray(good)
        data[offset : offset + 8] = b"\xff" * 8
        assert "truncated" in _refused(tmp_path / "model.pte", bytes(data))


def test_a_structure_that_points_nowhere(tmp_path: Path, good: bytes) -> None:
    data = bytearray(good)
    data[0:4] = (len(good) // 2).to_bytes(4, "little")  # the root of the flatbuffer
    assert "damaged" in _refused(tmp_path / "model.pte", bytes(data))


INSTRUCTIONS = {
    "operator": lambda call, plan: setattr(call, "op_index", 8199),
    "operator just outside": lambda call, plan: setattr(call, "op_index", len(plan.operators)),
    "negative operator": lambda call, plan: setattr(call, "op_index", -1),
    "value": lambda call, plan: call.args.__setitem__(0, len(plan.values)),
    "negative value": lambda call, plan: call.args.__setitem__(-1, -(2**31)),
}


@pytest.mark.parametrize("what", INSTRUCTIONS)
@pytest.mark.parametrize("where", [0, -1])
def test_instructions_that_name_what_is_not_there(tmp_path: Path, good: bytes, what: str, where: int) -> None:
    """The flatbuffer is whole, so that ExecuTorch's verifier lets it pass; it would follow the index."""
    file = deserialize_pte_binary(good)
    plan = next(p for p in file.program.execution_plan if p.name == "forward")
    INSTRUCTIONS[what](plan.chains[0].instructions[where].instr_args, plan)
    reason = _refused(tmp_path / "model.pte", bytes(serialize_pte_binary(file)))
    assert "damaged: an instruction names " + what.split()[-1 if "negative" in what else 0] in reason


def _calls(plan: Any, name: str) -> Any:
    """The first call of an operator."""
    index = next(i for i, op in enumerate(plan.operators) if f"{op.name}.{op.overload}" == name)
    return next(i.instr_args for i in plan.chains[0].instructions if getattr(i.instr_args, "op_index", None) == index)


def _output(plan: Any, name: str) -> Any:
    return plan.values[_calls(plan, name).args[-1]].val


EMBEDDING, NORM, MOE = "moec::embedding_packed.out", "moec::rms_norm.out", "moec::fused_moe_packed.out"
SIZE = "aten::sym_size.int"
# what each kind did: reads behind a list, writes into mapped pages or to address 0, operands overwritten once checked
STRUCTURES: dict[str, tuple[Callable[[Any], object], str]] = {
    "a short list of arguments": (lambda p: _calls(p, NORM).args.pop(), "takes 5 arguments, it is given 4"),
    "a long list of arguments": (lambda p: _calls(p, NORM).args.append(0), "takes 5 arguments, it is given 6"),
    "an argument of another kind": (lambda p: _calls(p, NORM).args.__setitem__(2, p.inputs[0]), "of another kind"),
    "another result": (lambda p: _calls(p, NORM).args.__setitem__(4, p.inputs[0]), "is another value"),
    "another operator": (lambda p: setattr(p.operators[0], "name", "aten::system"), "which this runtime does not have"),
    "an output that is a constant": (lambda p: _to_constant(_output(p, NORM)), "writes a constant or an input"),
    "an output that is the input": (
        lambda p: _calls(p, EMBEDDING).args.__setitem__(slice(-2, None), [p.inputs[0]] * 2),
        "writes over another of its arguments",
    ),
    "an output without memory": (lambda p: setattr(_output(p, NORM), "allocation_info", None), "has no memory"),
    "an output over an operand": (
        lambda p: setattr(_output(p, MOE), "allocation_info", p.values[_calls(p, MOE).args[0]].val.allocation_info),
        "writes over another of its arguments",
    ),
    "memory that was not planned": (
        lambda p: setattr(_output(p, NORM).allocation_info, "memory_offset_low", 1 << 30), "outside the memory"
    ),
    "an arena that is not there": (
        lambda p: setattr(_output(p, NORM).allocation_info, "memory_id", 9), "outside the memory"
    ),
    "a constant behind the file": (
        lambda p: p.values[_calls(p, NORM).args[1]].val.sizes.__setitem__(0, 1 << 30), "a constant outside the file"
    ),
    "a constant that is not there": (
        lambda p: setattr(p.values[_calls(p, NORM).args[1]].val, "data_buffer_idx", 999), "a constant outside the file"
    ),
    "a negative size": (lambda p: _output(p, NORM).sizes.__setitem__(0, -1), "negative"),
    "an impossible order": (lambda p: _output(p, NORM).dim_order.__setitem__(0, 7), "not in row-major order"),
    "an impossible memory plan": (lambda p: p.non_const_buffer_sizes.__setitem__(1, 1 << 50), "impossible memory plan"),
    "a list of what is not there": (
        lambda p: next(v.val for v in p.values if isinstance(v.val, IntList)).items.__setitem__(0, 9999), "a list names"
    ),
    "an input that is not there": (lambda p: p.inputs.__setitem__(1, 9999), "an input or output that is not there"),
    "an output that is a constant itself": (
        lambda p: p.outputs.__setitem__(0, _calls(p, NORM).args[1]), "an output that is a constant"
    ),
    "a mixture whose config is written": (
        lambda p: _calls(p, SIZE).args.__setitem__(-1, p.values[_calls(p, MOE).args[12]].val.items[3]),
        "the config of a mixture is written while the program runs",
    ),
    "no instructions": (lambda p: p.chains.clear(), "without instructions"),
    "control flow": (
        lambda p: setattr(p.chains[0].instructions[0], "instr_args", JumpFalseCall(0, 0)), "control flow"
    ),
    "a delegate that is called but not there": (
        lambda p: setattr(p.chains[0].instructions[0], "instr_args", DelegateCall(0, [0])), "names delegate 0 of 0"
    ),
}  # fmt: skip


def _to_constant(tensor: Any) -> None:
    tensor.allocation_info, tensor.data_buffer_idx = None, 1
    tensor.sizes[:] = [1] * len(tensor.sizes)


@pytest.mark.parametrize("what", STRUCTURES)
def test_structures_that_executorch_believes(tmp_path: Path, good: bytes, what: str) -> None:
    file = deserialize_pte_binary(good)
    damage, said = STRUCTURES[what]
    damage(next(p for p in file.program.execution_plan if p.name == "forward"))
    assert said in _refused(tmp_path / "model.pte", bytes(serialize_pte_binary(file)))


def test_a_constant_method_that_takes_memory(tmp_path: Path, good: bytes) -> None:
    file = deserialize_pte_binary(good)
    next(p for p in file.program.execution_plan if p.name == "get_bos_id").non_const_buffer_sizes.append(1 << 33)
    assert "a constant that takes memory" in _refused(tmp_path / "model.pte", bytes(serialize_pte_binary(file)))


def test_a_file_that_is_cut_while_it_is_in_use(tmp_path: Path, good: bytes) -> None:
    """An error, where the process ended with SIGBUS: pages that nobody has touched are gone with the file's end."""
    (tmp_path / "model.pte").write_bytes(good)
    program = int.from_bytes(good[16:24], "little")
    script = f"""
import os, sys
from pathlib import Path
from moec.compiler.errors import RunError
from moec.targets.xnnpack.session import CpuSession, missing_operators, program_fault
session = CpuSession(Path({str(tmp_path / "model.pte")!r}), threads=2)
for _ in range(2):
    os.truncate({str(tmp_path / "model.pte")!r}, {program})
    try:
        session.prefill([1, 2, 3])
    except RunError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-500:]}"
    assert done.stdout.count("truncated while it is in use") == 2


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        build = m.OneLayer.__init__

        def damaged(self: Any, **options: Any) -> None:
            build(self, **options)
            self.norm.data[0] = float("nan")

        patch.setattr(m.OneLayer, "__init__", damaged)
        (tmp_path / "model.pte").write_bytes(m.lowered())
    with CpuSession(tmp_path / "model.pte", threads=1) as session, pytest.raises(RunError, match="not numbers"):
        session.prefill([1, 2, 3])


def test_the_table_of_operators_is_that_of_the_wheel() -> None:
    from moec.targets.xnnpack.operator_table import TABLE, table

    assert TABLE.read_text("utf-8") == table(), "python -m moec.targets.xnnpack.operator_table"


class ManyResults(torch.nn.Module):
    """Operators of several results, of a list of them, and of optional arguments."""

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        best, place = torch.topk(x_TD, 4, dim=-1)
        most, least = x_TD.max(-1, keepdim=True), x_TD.min(-1, keepdim=True)
        left, right = torch.ops.aten.native_layer_norm(x_TD, [8], None, None, 1e-5)[0].chunk(2, -1)
        variance, mean = torch.var_mean(x_TD, -1, keepdim=True)
        parts = best * left - right + torch.gather(x_TD, -1, place)
        return parts + most.values - least.values + most.indices.float() + variance * mean.clamp(-1, None)


def test_operators_of_several_results_are_accepted(tmp_path: Path) -> None:
    example = (torch.arange(24.0).view(3, 8),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(ManyResults(), example).run_decompositions({})
        edge = to_edge_transform_and_lower(
            exported, compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        )
        used = {n.target.__name__ for n in edge.exported_program().graph.nodes if n.op == "call_function"}
        assert {"aten.topk.default", "aten.max.dim", "aten.native_layer_norm.default"} <= used
        (tmp_path / "model.pte").write_bytes(edge.to_executorch().buffer)
    assert program_fault(tmp_path / "model.pte") == ""


def test_what_the_runtime_has_and_what_it_would_refuse(tmp_path: Path, good: bytes) -> None:
    assert missing_operators(["aten::add.out", "aten::polar.out", "moec::rope.out", "moec::rope"]) == [
        "aten::polar.out", "moec::rope"
    ]  # fmt: skip
    (tmp_path / "model.pte").write_bytes(good)
    assert program_fault(tmp_path / "model.pte") == ""
    (tmp_path / "model.pte").write_bytes(good[:1000])
    assert program_fault(tmp_path / "model.pte").startswith("truncated")


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_of_the_program(tmp_path: Path, good: bytes, seed: int) -> None:
    """Flips may be harmless or found; what may not happen is a signal or silence."""
    rng = random.Random(seed)
    program = int.from_bytes(good[16:24], "little")
    for _ in range(15):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 4])):
            data[rng.randrange(program)] ^= 1 << rng.randrange(8)
        (tmp_path / "model.pte").write_bytes(data)
        done = _run(tmp_path / "model.pte")
        assert done.returncode in (0, 2), f"status {done.returncode}: {done.stderr}"
        assert done.returncode == 0 or done.stderr.startswith("error: ")
