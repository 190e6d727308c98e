"""From a legal Program to `model.pte`: methods `forward` (logits of the last token) and `forward_all` (of every token).

Each method is one delegate; both read the same constants. A runtime keeps one KV cache per loaded method: an
application uses one of them.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from executorch.exir._serialize._named_data_store import NamedDataStore
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind, OutputSpec, TensorArgument
from torch.fx import Graph, Node

from moec.compiler.errors import CompileError
from moec.compiler.ops import find_call
from moec.compiler.program import Editor, Program, Role, module_path
from moec.compiler.states import coded_type
from moec.compiler.target import LoweredFiles
from moec.passes.float_activations import QUANTIZED
from moec.passes.levels_to_int8 import note
from moec.targets.constant_methods import constant_methods
from moec.targets.metal.delegate_package import activate
from moec.targets.metal.encode import Encoding, weight_sqnr_db
from moec.targets.metal.facts import Chunking, MetalFacts, MethodFacts, Tap
from moec.targets.metal.options import Options
from moec.targets.metal.pte import Method, write_pte

activate()

import executorch.backends.mlx.ops  # noqa: E402, F401  (registers the delegate's own handlers)
from executorch.backends.mlx.builder.op_registry import REGISTRY  # noqa: E402
from executorch.backends.mlx.builder.program_builder import MLXProgramBuilder  # noqa: E402
from executorch.backends.mlx.serialization.mlx_graph_serialize import serialize_mlx_graph  # noqa: E402

from moec.targets.metal import aten_handlers, handlers, moe_handlers  # noqa: E402
from moec.targets.metal.context import Context  # noqa: E402
from moec.targets.metal.emitter import Slot  # noqa: E402

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
# from this size a tensor begins on a page of Apple's 16 KiB, so that a runtime may use it in place
PAGE, PAGED_FROM = 16384, 1 << 20


# arguments of our attention operators that are caches; [1, S, G, ..] in the program, [1, G, S, ..] in the file
SCALES = ("k_scale", "v_scale")  # of an INT8 cache: they stay fp32 in a program of another type
UNCHECKED = (
    "Metal kernels: results were checked by executing the file's instructions with MLX on another device",
    "speed and memory on an Apple GPU",
    "the order of equal router scores",
    "float32 products of the GPU: newer ones round operands to TF32 unless MLX_ENABLE_TF32=0 is set before first use",
)


def _register() -> None:
    for target, handler in {**handlers.HANDLERS, **moe_handlers.HANDLERS, **aten_handlers.HANDLERS}.items():
        REGISTRY.register(target=[target])(_calling(handler))


def _calling(handler: Callable[[Context, Node], Slot]) -> Callable[[Any, Node], Slot]:
    """The builder takes any exception of a handler for "unsupported": ours are kept, to be raised as they were."""

    def call(builder: Any, node: Node) -> Slot:
        try:
            return handler(builder.moec, node)
        except Exception as fault:
            builder.faults.append(fault)
            raise

    return call


_register()


@dataclass
class _Lowerable:
    """What the builder reads of an exported program. Weights are not in it: constants are described by meta tensors."""

    graph: Graph
    graph_signature: ExportGraphSignature

    def __post_init__(self) -> None:
        self.state_dict: dict[str, Any] = {}
        self.constants: dict[str, Any] = {}
        self._state_dict, self._constants = self.state_dict, self.constants


class _Builder(MLXProgramBuilder):
    """The delegate's builder for graphs whose operators write their caches in place."""

    moec: Context
    faults: list[Exception]

    def _emit_buffer_mutation_writebacks(self) -> None:
        """Nothing to write back."""


@dataclass(frozen=True)
class BuiltMethod:
    """A payload, and for each constant it names: how to make it (Encoding), or its value."""

    payload: bytes
    constants: Mapping[str, Encoding | torch.Tensor]
    quantized: Mapping[str, tuple[str, int, int]]
    taps: list[dict[str, int]]
    instructions: Mapping[str, int]


def build_method(program: Program, options: Options) -> BuiltMethod:
    """The delegate payload of one method. CompileError naming a node that has no lowering."""
    dtype = DTYPES[options.dtype]
    edit = program.edit()
    caches = _caches(edit.graph)
    _retype(edit, caches, dtype)
    builder: Any = _Builder(
        _Lowerable(edit.graph, _signature(edit, [*caches, *_written_by_graph(edit, program.info.name)]))
    )
    builder.faults = []
    context = builder.moec = Context(program, builder, dtype)
    try:
        graph = builder.build()
    except ValueError as e:
        for fault in builder.faults:
            raise fault from None
        raise _unsupported(builder, program) or e from e
    taps = [t.numbers() for t in context.taps]
    counts = Counter(type(i.op).__name__ for chain in graph.instruction_chains for i in chain.instructions)
    return BuiltMethod(serialize_mlx_graph(graph), _constants(builder, edit), context.quantized, taps, counts)


def _caches(graph: Graph) -> dict[Node, str]:
    """Placeholders that our operators write, with the name of the operand they are."""
    found: dict[Node, str] = {}
    for node in graph.nodes:
        call = find_call(node)
        if call is not None:
            found |= {operand: name for name, operand in call.written().items()}
    return found


def _retype(edit: Editor, caches: Mapping[Node, str], dtype: torch.dtype) -> None:
    """Give the placeholders the shapes and types that the file stores."""
    for node in [n for n in edit.graph.nodes if n.op == "placeholder"]:
        value, name = node.meta["val"], edit.weight_of(node)
        shape, kind = tuple(value.shape), value.dtype
        if node in caches:
            shape = (shape[0], shape[2], shape[1], shape[3] if len(shape) == 4 else 1)
            kind = kind if caches[node] in SCALES or not kind.is_floating_point else dtype
        elif name is not None and kind.is_floating_point and edit.roles.get(name) not in (Role.ROUTER, Role.CONSTANT):
            kind = dtype
        if (shape, kind) != (tuple(value.shape), value.dtype):
            with value.fake_mode:
                node.meta["val"] = torch.empty(shape, dtype=kind)


def _written_by_graph(edit: Editor, model: str) -> list[Node]:
    """Placeholders of caches that the graph writes itself, where attention was not fused: by `index_copy`, in place."""
    by_name = {node.name: node for node in edit.graph.nodes}
    found = []
    for spec in edit.output_specs:
        if spec.kind == OutputKind.USER_OUTPUT:
            continue
        source = by_name[spec.arg.name]
        if spec.kind != OutputKind.BUFFER_MUTATION or source.target is not torch.ops.aten.index_copy.default:
            raise CompileError(
                f"the model writes {spec.target} in a way that was not recognised: by {source.target}",
                place=model,
                remedy="write each cache at start_pos with index_copy; see `moec explain`",
            )
        found.append(source.args[0])
    return found  # type: ignore[return-value]


def _signature(edit: Editor, caches: Sequence[Node]) -> ExportGraphSignature:
    """`caches` are written in place: their outputs are themselves, and nothing is copied back."""
    written = [
        OutputSpec(kind=OutputKind.BUFFER_MUTATION, arg=TensorArgument(node.name), target=edit.weight_of(node))
        for node in caches
    ]
    kinds = {node.name: InputKind.BUFFER for node in caches}
    inputs = [replace(s, kind=kinds.get(getattr(s.arg, "name", ""), s.kind)) for s in edit.input_specs]
    results = [s for s in edit.output_specs if s.kind == OutputKind.USER_OUTPUT]
    return ExportGraphSignature(input_specs=inputs, output_specs=[*written, *results])


def _unsupported(builder: Any, program: Program) -> CompileError | None:
    for node, info in builder.node_info.items():
        if not info.supported:
            reason = (info.unsupported_reason or "").splitlines()[0]
            where = module_path(node) or program.info.name
            return CompileError(f"{node.name} ({node.target}) has no Metal lowering: {reason}", place=where)
    return None


def _constants(builder: Any, edit: Editor) -> dict[str, Encoding | torch.Tensor]:
    """Name -> how it is made, for every constant the instructions read."""
    placeholders = {edit.weight_of(n): n for n in edit.graph.nodes if n.op == "placeholder"}
    found: dict[str, Encoding | torch.Tensor] = {}
    for name in builder._constant_name_to_slot:
        if name in builder.moec.constants:
            found[name] = builder.moec.constants[name]
        elif name in placeholders:
            found[name] = Encoding(name, "plain", placeholders[name].meta["val"].dtype)
        else:
            found[name] = builder.extra_constants[name]
    return found


def lower(program: Program, out: Path, options: Options, progress: Any) -> LoweredFiles:
    """Write `out/model.pte`. The manifest's facts say how to replay it and what could not be checked here."""
    assert program.last_token is not None, "the pass last_token has not run"
    methods = {"forward": program.last_token, "forward_all": program}
    built = {name: build_method(methods[name], options) for name in progress.each("lower to Metal", list(methods))}
    constants = {k: v for method in built.values() for k, v in method.constants.items()}
    quantized = {k: v for method in built.values() for k, v in method.quantized.items()}
    store = NamedDataStore()
    sizes: Counter[str] = Counter()
    rounded: dict[str, float] = {}
    for name in progress.each("encode weights", sorted(constants)):
        made = constants[name]
        value = made if isinstance(made, torch.Tensor) else _made(program, made, quantized, options, rounded)
        before = len(store.buffers)
        store.add_named_data(name, value, alignment=PAGE if value.nbytes >= PAGED_FROM else 16)
        if len(store.buffers) > before:  # equal bytes are stored once
            role = program.roles.get(made.weight, Role.OTHER) if isinstance(made, Encoding) else Role.CONSTANT
            sizes[role.value] += value.nbytes
    info = program.info
    with progress.stage("write model.pte"):
        write_pte(
            out / "model.pte",
            {n: Method(m.payload, every_token=n == "forward_all") for n, m in built.items()},
            store,
            vocab_size=info.vocab_size,
            max_tokens=info.max_tokens,
            constants=constant_methods(info, program.states.values()),
        )
    sizes["program"] = sum(len(m.payload) for m in built.values())
    facts = _facts(built, options, rounded, program)
    return LoweredFiles(("model.pte",), dict(sizes), facts, notes=_notes(program, options, rounded))


def _made(
    program: Program,
    how: Encoding,
    quantized: Mapping[str, tuple[str, int, int]],
    options: Options,
    rounded: dict[str, float],
) -> torch.Tensor:
    """One constant's value. CompileError when rounding its scales would change the weight and is not allowed."""
    stored = program.weights[how.weight].load()
    value = how.encode(stored)
    if how.kind != "scales" or how.dtype == stored.dtype:
        return value
    codes_name, bits, group_size = quantized[how.weight]
    loss = weight_sqnr_db(program.weights[codes_name].load(), stored, stored.to(how.dtype), bits, group_size)
    if math.isinf(loss):
        return value
    if not options.allow_requantization:
        raise CompileError(
            f"{options.dtype} cannot hold the scales of {codes_name}: rounding them leaves {loss:.1f} dB",
            place="targets.metal.dtype",
            remedy="use another dtype, or set allow_requantization: true",
        )
    rounded[codes_name] = round(loss, 2)
    return value


def _facts(
    built: Mapping[str, BuiltMethod], options: Options, rounded: Mapping[str, float], program: Program
) -> MetalFacts:
    return MetalFacts(
        dtype=options.dtype,
        kv_cache=coded_type(program.states.values()) or options.dtype,
        activations=options.dtype,
        computes={"activations": "fp32"},
        methods={
            name: MethodFacts(
                payload_sha256=hashlib.sha256(method.payload).hexdigest(),
                payload_bytes=len(method.payload),
                delegates=1,
                instructions=dict(sorted(method.instructions.items())),
                moe_taps=tuple(Tap.model_validate(tap) for tap in method.taps),
            )
            for name, method in built.items()
        },
        requantized_sqnr_db=dict(rounded),
        chunking=Chunking(
            max_tokens=program.info.max_tokens,
            advice="prefill in chunks of at least 32 tokens: below that the GPU reads an expert once per token",
        ),
        unchecked_without_apple_hardware=tuple(UNCHECKED),
    )


def _notes(program: Program, options: Options, rounded: Mapping[str, float]) -> tuple[str, ...]:
    notes = ["not checked without Apple hardware: " + "; ".join(UNCHECKED), *note(program)]
    if any(n.target in QUANTIZED for n in program.graph.nodes):
        notes.append(f"activations are not rounded to INT8: products take {options.dtype}")
    if rounded:
        worst = min(rounded.values())
        notes.append(f"scales of {len(rounded)} weights are rounded to {options.dtype}: at worst {worst:.1f} dB SQNR")
    return tuple(notes)
