"""What is legal at each stage, as data: `STAGES` for the compiler's own, and what a target declares for LEGAL.

A stage permits operators and holds invariants; it keeps the invariants of the stages before it. Both are checked on the
exported graph and after every pass (`pipeline.steps`), on the program and on its method for the last token.

    EXPORTED    any operator; tokens and start_pos go in, one result comes out; the program has every weight that the
                graph reads, and declares a state for every buffer that it writes
    CANONICAL   no operator of torch that writes an operand
    FUSED       no top-k, no rows picked by value, no scan over tokens; only fused MoE nodes read experts (a block
                left unmatched would gather [tokens, k, 2F, D] of weights), and their routers are FP32
    QUANTIZED   codes are read only by operators that take codes
    LEGAL       what the target's `Legality` permits, nothing else
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.ops.call import NAMESPACE, find_call
from moec.compiler.ops.moe_call import MoeCall
from moec.compiler.program import Program, Role, Stage, module_path

NO_STATES = "choose a target that runs layers with a recurrent state: docs/any-moe.md lists them"
NOT_FUSED = "see what was tried with `moec explain`"


@dataclass(frozen=True)
class Fault:
    """One thing that is not legal. `what` follows "after PASS "; `node` gives the place."""

    what: str
    node: Node | None = None
    remedy: str = ""


@dataclass(frozen=True)
class Invariant:
    """A condition that holds from a stage on, and a function that finds violations."""

    name: str
    faults: Callable[[Program], Iterable[Fault]]


@dataclass(frozen=True)
class Permitted:
    """Operators by qualified name ("moec::linear_q", "aten::topk") and namespace ("aten").

    `namespaces` None: all. `operators` are permitted beside the namespaces. What has no schema (item access, arithmetic
    on sizes) is always permitted.
    """

    namespaces: frozenset[str] | None = None
    operators: frozenset[str] = frozenset()
    remedy: str = NOT_FUSED

    def __contains__(self, operator: str) -> bool:
        if not operator or operator in self.operators:
            return True
        return self.namespaces is None or operator.partition("::")[0] in self.namespaces


@dataclass(frozen=True)
class Legality:
    """What a stage permits, or what a target takes: `owner` says which, for people."""

    owner: str
    permitted: Permitted = Permitted()
    invariants: tuple[Invariant, ...] = ()


def check_dialect(program: Program, *, after: str, target: Legality | None = None) -> None:
    """Raise CompileError naming the first thing that is illegal at the program's stage.

    `target`: what the target declared, for a program at stage LEGAL.
    """
    stages = [STAGES[stage] for stage in Stage if stage <= program.stage]
    legal = [*stages, target] if target is not None else stages
    for one in (program, program.last_token):
        if one is None:
            continue
        for fault in _faults(one, legal):
            place = None if fault.node is None else module_path(fault.node) or fault.node.name
            raise CompileError(
                f"after {after} {fault.what}", place=place or program.info.name, remedy=fault.remedy or None
            )


def _faults(program: Program, legal: Sequence[Legality]) -> Iterator[Fault]:
    """Faults in the order of the stages: a violation of an early stage explains those of later ones."""
    for legality in legal:
        for invariant in legality.invariants:
            yield from invariant.faults(program)
        for node in program.graph.nodes:
            if node.op == "call_function" and operator_name(node) not in legality.permitted:
                what = f"{node.name} ({node.target}) is no operator of {legality.owner}"
                recurrent = operator_name(node) in RECURRENT_OPERATORS
                yield Fault(what, node, NO_STATES if recurrent else legality.permitted.remedy)


def operator_name(node: Node) -> str:
    """`namespace::name` of the operator that a node calls; "" for what has no schema."""
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else ""


# ---- EXPORTED


def _signature_faults(program: Program) -> Iterator[Fault]:
    signature = program.exported.graph_signature
    inputs = [s for s in signature.input_specs if s.kind == InputKind.USER_INPUT]
    results = [s for s in signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    if len(inputs) != 2 or len(results) != 1:
        yield Fault(
            f"the graph takes {len(inputs)} inputs and gives {len(results)} results",
            remedy="the signature must be forward(tokens [1, T], start_pos [1]) -> logits [1, T, V]",
        )


def _weight_faults(program: Program) -> Iterator[Fault]:
    for node in program.graph.nodes:
        name = program.weight_of(node) if node.op == "placeholder" else None
        if name is None or not node.users:
            continue
        weight = program.weights.get(name)
        if weight is None:
            yield Fault(f"the graph reads {name}, which the program does not hold", node)
            continue
        value = node.meta["val"]
        if tuple(value.shape) != tuple(weight.shape):
            yield Fault(f"the graph reads {name} as {list(value.shape)}, it is {list(weight.shape)}", node)


def _state_faults(program: Program) -> Iterator[Fault]:
    """A state whose buffers are not as it says, and a buffer that is written and belongs to no state."""
    declared = program.state_tensors()
    nodes = {str(program.weight_of(n)): n for n in program.graph.nodes if n.op == "placeholder"}
    for name, tensor in declared.items():
        weight = program.weights.get(name)
        held = None if weight is None else (tuple(weight.shape), str(weight.dtype).removeprefix("torch."))
        if held != (tensor.shape, tensor.dtype):
            said = (tensor.shape, tensor.dtype)
            yield Fault(f"the state {name} is declared as {said}, it is {held}", nodes.get(name))
    written = [
        str(s.target) for s in program.exported.graph_signature.output_specs if s.kind == OutputKind.BUFFER_MUTATION
    ]
    for node in program.graph.nodes:
        call = find_call(node)
        if call is not None:
            written += [str(program.weight_of(operand)) for operand in call.written().values()]
    for name in written:
        if name not in declared:
            yield Fault(f"{name} is written and is no state of the program", nodes.get(name))


# ---- CANONICAL


def _writing_faults(program: Program) -> Iterator[Fault]:
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and operator_name(node).startswith("aten::"):
            yield Fault(f"{node.name} ({node.target}) writes its operand: the graph is not functional", node)


# ---- FUSED


def picks_rows(node: Node) -> bool:
    """Whether the size of a result depends on values: rows of the tokens that chose an expert."""
    name = operator_name(node)
    return name in ("aten::nonzero", "aten::nonzero_numpy") or (name == "aten::where" and len(node.args) == 1)


def _is_stack(shape: Sequence[int]) -> bool:
    """Matrices of experts; a filter of each channel is [C, 1, K]."""
    return len(shape) == 3 and shape[1] > 1


def _expert_faults(program: Program) -> Iterator[Fault]:
    for node in program.graph.nodes:
        name = program.weight_of(node) if node.op == "placeholder" else None
        if name is None:
            continue
        stacked = program.roles.get(name) is Role.EXPERT
        for user in node.users:
            # a weight [E, ., .] that is no filter of a convolution belongs to experts, whatever its role says
            cube = _is_stack(program.weights[name].shape) and program.roles.get(name) not in (Role.CACHE, Role.CONSTANT)
            unfused = cube and user.op == "call_function" and "conv" not in operator_name(user)
            if (stacked or unfused) and MoeCall.find(user) is None:
                yield Fault(
                    f"the experts {name} are read by {user.name} ({user.target}): this MoE block was not fused",
                    user,
                    NOT_FUSED,
                )


def _selection_faults(program: Program) -> Iterator[Fault]:
    """A top-k or a dispatch outside fused nodes. No target computes a number of rows that depends on values, and a
    top-k that is left means a block that was not fused, however its experts are stored."""
    for node in program.graph.nodes:
        what = "selects" if operator_name(node) == "aten::topk" else "picks rows by value" if picks_rows(node) else ""
        if what:
            yield Fault(f"{node.name} ({node.target}) still {what}: this MoE block was not fused", node, NOT_FUSED)


def _fold_faults(program: Program) -> Iterator[Fault]:
    for node in program.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "higher_order":
            yield Fault(f"{node.name} ({node.target}) is left: this recurrent layer was not fused", node, NOT_FUSED)


def _router_faults(program: Program) -> Iterator[Fault]:
    for node in program.graph.nodes:
        moe = MoeCall[Any].find(node)
        for operand in () if moe is None else (moe.router_input, moe.router_weight):
            if operand.meta["val"].dtype != torch.float32:
                yield Fault(f"the router operand {operand.name} is not float32", node, "keep the router in float32")


# ---- QUANTIZED

CODES = (torch.uint8, torch.int8)


def _code_faults(program: Program) -> Iterator[Fault]:
    """Codes of a matrix that an operator of torch reads as if they were numbers. A target's operators are not
    checked."""
    for node in program.graph.nodes:
        name = program.weight_of(node) if node.op == "placeholder" else None
        if name is None or len(node.meta["val"].shape) < 2 or node.meta["val"].dtype not in CODES:
            continue
        if program.roles.get(name) in (Role.CACHE, Role.CONSTANT, Role.OTHER):
            continue
        for user in node.users:
            if operator_name(user).startswith("aten::"):
                yield Fault(f"the codes {name} are read as numbers by {user.name} ({user.target})", user)


# ---- what targets declare


def _int8_faults(program: Program) -> Iterator[Fault]:
    for node in program.graph.nodes:
        call = find_call(node)
        if call is not None and getattr(call, "int8_activations", False):
            yield Fault(f"{node.name} ({node.target}) rounds its activations to INT8", node)


FLOAT_ACTIVATIONS = Invariant("products take float activations", _int8_faults)

OWN_OPERATORS = frozenset(
    f"{NAMESPACE}::{name}"
    for name in (
        "rms_norm",
        "rope",
        "cached_attention",
        "linear_q",
        "embedding_q",
        "fused_moe",
        "fused_moe_q",
    )
)
# layers with a state of fixed size: a target permits them beside those above where it has a form for them
RECURRENT_OPERATORS = frozenset(f"{NAMESPACE}::{name}" for name in ("short_conv", "gated_delta", "selective_scan"))
TORCH = frozenset({"aten", "prims", "prim"})

STAGES: dict[Stage, Legality] = {
    Stage.EXPORTED: Legality(
        "an exported graph",
        invariants=(
            Invariant("tokens and start_pos in, one result out", _signature_faults),
            Invariant("every weight that is read is held, in its shape", _weight_faults),
            Invariant("what is written is declared, as it is", _state_faults),
        ),
    ),
    Stage.CANONICAL: Legality(
        "a canonical graph", invariants=(Invariant("no operator of torch's own writes", _writing_faults),)
    ),
    Stage.FUSED: Legality(
        "a fused graph",
        invariants=(
            Invariant("experts are read by fused MoE nodes alone", _expert_faults),
            Invariant("nothing selects, nothing picks rows by value", _selection_faults),
            Invariant("nothing folds over tokens", _fold_faults),
            Invariant("routers are FP32", _router_faults),
        ),
    ),
    Stage.QUANTIZED: Legality("a quantized graph", invariants=(Invariant("codes are read as codes", _code_faults),)),
    Stage.LEGAL: Legality("a legal graph"),
}
