"""From a legal Program to `model.pte`: methods `forward` (last token's logits) and `forward_all` (every token's).

Both read the same weights and the same KV cache. Weights of delegated linears are handed to XNNPACK here and copied
into the file as it packs them; all others are computed one at a time while the file is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.backend.backend_details import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner
from executorch.exir.schema import DelegateCall, KernelCall
from torch.export import ExportedProgram
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.program import Program, Role, module_path, weight_names
from moec.compiler.progress import Progress
from moec.compiler.target import LoweredFiles
from moec.runtime.native import native_files, source_digest
from moec.targets.constant_methods import constant_methods
from moec.targets.xnnpack.execution import quiet, to_execution
from moec.targets.xnnpack.facts import MethodFacts, XnnpackFacts
from moec.targets.xnnpack.legalize_delegate import INT8_SUFFIX
from moec.targets.xnnpack.options import Options
from moec.targets.xnnpack.pte import Emitted, WrittenFile, emit, write_pte
from moec.targets.xnnpack.session import missing_operators, program_fault

aten = torch.ops.aten
MODEL = "model.pte"
_REPORT = "this is a fault of moec, not of the model: please report it"


class _Linears(LinearConfig):
    """Linears alone: XNNPACK's own would take a ReLU behind one with them, which the runtime's check does not know."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fused_acts: list[str] = []


class LinearPartitioner(XnnpackPartitioner):
    """Takes linears only, float or dynamically quantized.

    XNNPACK's other rewrites of a delegate's graph are not needed for those; skipping them gives the same bytes in a
    quarter of the time.
    """

    def __init__(self) -> None:
        super().__init__(
            configs=[_Linears], config_precisions=[ConfigPrecisionType.DYNAMIC_QUANT, ConfigPrecisionType.FP32]
        )
        self.delegation_spec = DelegationSpec(XnnpackBackend.__name__, [CompileSpec("dqlinear_partitioner", b"")])


def lower(program: Program, out: Path, options: Options, progress: Progress) -> LoweredFiles:
    """Write `out/model.pte`. OSError if the disk refuses."""
    native_files(progress=progress)  # packing needs the kernels: built now if this machine has none yet
    delegated = _delegated_weights(program)
    with progress.stage("lower to ExecuTorch", total=None):
        assert program.last_token is not None, "the pass last_token has not run"
        methods = {"forward_all": program, "forward": program.last_token}
        exported = {name: _with_weights(method, delegated) for name, method in methods.items()}
        partitioners: list[Partitioner] = [LinearPartitioner()] if delegated else []
        execution = to_execution(exported, partitioners)
        with quiet():
            emitted = emit(execution.methods, constant_methods(program.info, program.states.values()))
    del exported
    _check_operators(emitted, program)
    if options.memory_mb is not None and not any(name.startswith("moec::fused_moe") for name in _operators(emitted)):
        raise CompileError(
            "memory_mb needs routed experts, and the program has no fused MoE node",
            place=program.info.name,
            remedy="leave memory_mb out; `moec explain` says why blocks are not fused",
        )
    with progress.stage("write weights", total=len(emitted.weights)) as step:
        written = write_pte(out / MODEL, emitted, program.weights, execution.named_data, after=step)
    if fault := program_fault(out / MODEL):
        raise CompileError(
            f"the runtime would refuse the program that was made: {fault}", place=program.info.name, remedy=_REPORT
        )
    return LoweredFiles(
        files=(MODEL,),
        sizes_by_role=_sizes_by_role(program, written),
        facts=_facts(program, emitted, delegated, written),
        digests={MODEL: written.sha256},
        kernel_digest=source_digest(),
        notes=_notes(program, delegated),
    )


def _operators(emitted: Emitted) -> set[str]:
    return {
        f"{op.name}.{op.overload}" if op.overload else op.name
        for plan in emitted.program.execution_plan
        for op in plan.operators
    }


def _check_operators(emitted: Emitted, program: Program) -> None:
    """CompileError for a program that could not be loaded: before its weights are packed."""
    missing = missing_operators(sorted(_operators(emitted)))
    if not missing:
        return
    first = missing[0].partition(".")[0].removesuffix("_copy")
    for node in program.graph.nodes:
        if node.op == "call_function" and str(getattr(node.target, "_schema", "")).startswith(
            (first + ".", first + "(")
        ):
            where = module_path(node) or program.info.name
            break
    else:
        where = program.info.name
    raise CompileError(
        f"the runtime has no kernel for {', '.join(missing)}",
        place=where,
        remedy="write the model with operators that it has, or compile for another target (onnx, mlir)",
    )


def _delegated_weights(program: Program) -> list[str]:
    """Names of the weights that `aten.linear` reads, through a dequantization or not: XNNPACK needs their values."""
    names = weight_names(program.exported)
    found: list[str] = []
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is aten.linear.default:
            for operand in node.args[1:3]:
                found += _constants_of(operand, names)
    return list(dict.fromkeys(found))


def _constants_of(operand: Any, names: Mapping[str, str]) -> list[str]:
    if not isinstance(operand, Node):
        return []
    if operand.op == "placeholder":
        return [names[operand.name]] if operand.name in names else []
    if operand.target is torch.ops.torchao.dequantize_affine.default:
        return [name for a in operand.args for name in _constants_of(a, names)]
    return []


def _with_weights(program: Program, names: list[str]) -> ExportedProgram:
    """The exported program with the values of `names` in its state; the other weights stay fake."""
    exported = program.exported
    for name in names:
        if name in exported.state_dict:
            exported.state_dict[name] = torch.nn.Parameter(program.weights[name].load(), requires_grad=False)
    return exported


def _sizes_by_role(program: Program, written: WrittenFile) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, size in written.weight_bytes.items():
        sizes[program.roles.get(name, Role.OTHER).value] += size
    if written.delegate_bytes:
        sizes["xnnpack"] = written.delegate_bytes
    return dict(sizes)


def _facts(program: Program, emitted: Emitted, delegated: list[str], written: WrittenFile) -> XnnpackFacts:
    methods: dict[str, MethodFacts] = {}
    operators: Counter[str] = Counter()
    for plan in emitted.program.execution_plan:
        instructions = [i.instr_args for chain in plan.chains for i in chain.instructions]
        if not instructions:
            continue
        methods[plan.name] = MethodFacts(
            instructions=len(instructions),
            delegates=len(plan.delegates),
            delegate_calls=sum(isinstance(i, DelegateCall) for i in instructions),
            arena_bytes=tuple(plan.non_const_buffer_sizes[1:]),
        )
        for call in instructions:
            if isinstance(call, KernelCall):
                op = plan.operators[call.op_index]
                operators[f"{op.name}.{op.overload}" if op.overload else op.name] += 1
    found: dict[str, Any] = {}  # only what holds is set: the manifest says nothing of a delegate that is not there
    if delegated:
        found["delegate_bytes"] = written.delegate_bytes
        found["delegated_roles"] = tuple(sorted({program.roles[n].value for n in delegated}))
    if roles := _asymmetric_roles(program, delegated):
        found["asymmetric_roles"] = tuple(roles)
    return XnnpackFacts(methods=methods, operators=dict(sorted(operators.items())), **found)


def _asymmetric_roles(program: Program, delegated: list[str]) -> list[str]:
    """Roles whose activations XNNPACK rounds, asymmetrically: those of delegated INT4 weights."""
    return sorted({program.roles[name].value for name in delegated if name.endswith(INT8_SUFFIX)})


def _notes(program: Program, delegated: list[str]) -> tuple[str, ...]:
    roles = _asymmetric_roles(program, delegated)
    if not roles:
        return ()
    return (
        f"XNNPACK serves the INT4 weights of {', '.join(roles)}: it stores their group scales as BF16 (relative error "
        "up to 2^-9) and rounds activations asymmetrically",
    )
