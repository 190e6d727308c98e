"""`model: {python: "module:function"}` and `model: {exported_program: FILE}`: any torch module as a Program.

The contract of both is one signature, of one of two forms:

    forward(tokens int64 [1, T], start_pos int64 [1]) -> logits float32 [1, T, V]
        T is dynamic. What earlier calls left behind lives in buffers that forward writes (a KV cache); token t is at
        position start_pos + t, and a call with start_pos = 0 begins anew.
    forward(tokens int64 [1, T]) -> logits float32 [1, T, V]
        Stateless and causal. It is run over its whole context in every call: right, and slow.

A python function takes no arguments and returns the module, in evaluation mode or not. Attributes of it that are read,
all optional but `context` of a stateless one: `context` (positions; else as many as its longest cache has rows),
`bos_id`, `eos_ids`. An exported program is what `torch.export.save` wrote, at training level (not decomposed), of a
module with such a signature.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from moec.checkpoints.safetensors_file import finite
from moec.compiler.errors import CheckpointError, CompileError
from moec.compiler.export import EXAMPLE_TOKENS, MAX_TOKENS, assemble
from moec.compiler.program import LazyWeight, ModelInfo, Program, Role
from moec.compiler.source import Checkpoint
from moec.compiler.states import Appended
from moec.compiler.trust import require_trust
from moec.compiler.written_states import written_states
from moec.sources.roles import roles_by_use

CONTRACT = "forward(tokens int64 [1, T], start_pos int64 [1]) -> logits float32 [1, T, V]"
DEFAULT_CONTEXT = 2048


class ModuleStore(Checkpoint):
    """The tensors of a module, by the module's own names. `place` names it in messages."""

    def __init__(self, module: nn.Module | ExportedProgram, place: str, folder: Path) -> None:
        self.module, self.place, self.folder = module, place, folder

    def weight(self, name: str, shape: tuple[int, ...]) -> LazyWeight:
        tensor = self.tensors().get(name)
        if tensor is None:
            raise CheckpointError(f"the module has no tensor {name} {list(shape)}", place=self.place)
        load = _reader(tensor, name, self.place, mask=not isinstance(tensor, nn.Parameter))
        return LazyWeight(tuple(tensor.shape), tensor.dtype, load)

    def tensors(self) -> dict[str, Tensor]:
        if isinstance(self.module, ExportedProgram):
            constants = {n: t for n, t in self.module.constants.items() if isinstance(t, Tensor)}
            return {**self.module.state_dict, **constants}
        module = self.module
        return {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and elements of all tensors."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            data = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
        return found.hexdigest()


def open_python(reference: str, folder: Path | None = None) -> ModuleStore:
    """Call `module:function`; `folder` (default: the working directory) is searched for the module first.

    TrustError unless code is trusted; CompileError when it cannot be imported, called, or does not return a module.
    """
    name, _, function = reference.partition(":")
    where = str((folder or Path.cwd()).resolve())
    require_trust(f"importing this python module (from {where}, or the path) runs its code", place=reference)
    sys.path.insert(0, where)
    try:
        make = getattr(importlib.import_module(name), function)
    except Exception as error:
        raise CompileError(
            f"cannot import it: {_first_line(error)}",
            place=reference,
            remedy=f"put the module on the path, or in {where}",
        ) from error
    finally:
        sys.path.remove(where)
    try:
        module = make()
    except Exception as error:
        raise CompileError(f"the function failed: {_first_line(error)}", place=reference) from error
    if not isinstance(module, nn.Module):
        raise CompileError(
            f"the function returned {type(module).__name__}", place=reference, remedy="return a torch.nn.Module"
        )
    return ModuleStore(module.eval(), reference, Path(where))


def open_exported(file: Path) -> ModuleStore:
    """A program that torch.export.save wrote. CheckpointError when it is missing or not one.

    TrustError unless code is trusted: torch reads the file by unpickling, which runs what the file says.
    """
    if not file.is_file():
        raise CheckpointError("there is no such file", place=str(file), remedy="name what torch.export.save wrote")
    require_trust("reading an exported program unpickles it, which can run any code", place=str(file))
    try:
        exported = torch.export.load(file)
    except Exception as error:
        raise CheckpointError(
            f"torch {torch.__version__} does not read it: {_first_line(error)}",
            place=str(file),
            remedy="save it with torch.export.save of the same torch version",
        ) from error
    return ModuleStore(exported, str(file), file.parent)


def export_module_model(store: ModuleStore, name: str, *, max_tokens: int = MAX_TOKENS) -> Program:
    """The Program of a module or of an exported program, stage EXPORTED; its tensors are held, not copied."""
    module = store.module
    if isinstance(module, ExportedProgram):
        inputs = sum(s.kind == InputKind.USER_INPUT for s in module.graph_signature.input_specs)
        if inputs == 1:
            return _from_module(
                _stateless(module.module(), None, store, max_tokens), store, name, max_tokens, "module."
            )
        return _assembled(module, store, name, max_tokens, "", {})
    if len(_parameters(module)) == 1:
        context = getattr(module, "context", None)
        return _from_module(_stateless(module, context, store, max_tokens), store, name, max_tokens, "module.")
    return _from_module(module, store, name, max_tokens, "")


def _parameters(module: nn.Module) -> list[str]:
    """The arguments that forward needs."""
    given = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in given if p.kind in kinds and p.default is inspect.Parameter.empty]


def _from_module(module: nn.Module, store: ModuleStore, name: str, max_tokens: int, prefix: str) -> Program:
    own = module.module if isinstance(module, _Stateless) else module
    context = int(getattr(module, "context", 0) or getattr(own, "context", 0) or 0) or None
    limit = min(max_tokens, context or DEFAULT_CONTEXT)
    example = (torch.zeros(1, min(EXAMPLE_TOKENS, limit), dtype=torch.long), torch.zeros(1, dtype=torch.long))
    dynamic = {1: torch.export.Dim("T", min=1, max=limit)} if limit > 1 else None
    try:
        with torch.no_grad():
            exported = torch.export.export(module, example, dynamic_shapes=(dynamic, None), strict=False)
    except Exception as error:
        raise CompileError(
            f"torch.export failed: {_first_line(error)}", place=store.place, remedy=f"the signature must be {CONTRACT}"
        ) from error
    extra = dict(module.named_buffers(recurse=False)) if isinstance(module, _Stateless) else {}
    return _assembled(exported, store, name, max_tokens, prefix, extra, context)


def _assembled(
    exported: ExportedProgram,
    store: ModuleStore,
    name: str,
    max_tokens: int,
    prefix: str,
    extra: Mapping[str, Tensor],
    context: int | None = None,
) -> Program:
    longest, vocabulary = _checked_signature(exported, store.place)
    tensors = {**{prefix + n: t for n, t in store.tensors().items()}, **extra}
    tensors |= {n: t for n, t in exported.constants.items() if isinstance(t, Tensor) and n not in tensors}
    written = {s.target for s in exported.graph_signature.output_specs if s.kind == OutputKind.BUFFER_MUTATION}
    roles = roles_by_use(exported)
    for spec in exported.graph_signature.input_specs:
        if spec.target is not None and spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            roles[spec.target] = Role.CACHE if spec.target in written | _written(exported) else Role.CONSTANT
    fixed = {n for n, role in roles.items() if role in (Role.CONSTANT, Role.CACHE)}
    weights = {
        n: LazyWeight(tuple(t.shape), t.dtype, _reader(t, n, store.place, mask=n in fixed)) for n, t in tensors.items()
    }
    context = context or _positions(exported) or DEFAULT_CONTEXT
    owner = store.module
    eos = getattr(owner, "eos_ids", ())
    info = ModelInfo(
        name=name,
        vocab_size=vocabulary,
        context=context,
        max_tokens=min(max_tokens, longest, context),
        bos_id=getattr(owner, "bos_id", None),
        eos_ids=tuple(int(e) for e in eos),
    )
    return assemble(exported, weights, roles, info)


def _positions(exported: ExportedProgram) -> int | None:
    """Rows of the longest cache: later positions have no place. None for a module that appends to none."""
    states = written_states(exported, 0).items()
    rows = [int(s.shape[s.update.axis]) for _, s in states if isinstance(s.update, Appended)]  # type: ignore[call-overload]
    return max(rows, default=None)


def _reader(tensor: Tensor, name: str, place: str, *, mask: bool) -> Callable[[], Tensor]:
    """Reads a tensor, whose values must be finite. A buffer may be a `mask`, with -inf; NaN is nothing anywhere."""

    def load() -> Tensor:
        value = tensor.detach()
        if value.is_floating_point():
            finite(value.nan_to_num(nan=float("nan"), posinf=0.0, neginf=0.0) if mask else value, name, place)
        return value

    return load


def _written(exported: ExportedProgram) -> set[str]:
    """Buffers that an operator writes: the caches of a graph at training level."""
    names = {s.arg.name: s.target for s in exported.graph_signature.input_specs if s.kind == InputKind.BUFFER}
    found: set[str] = set()
    for node in exported.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        into = node.args[0]
        while into.op == "call_function":  # through views of the buffer
            into = into.args[0]
        if into.name in names:
            found.add(str(names[into.name]))
    return found


def _checked_signature(exported: ExportedProgram, place: str) -> tuple[int, int]:
    """(most tokens of a call, vocabulary). CompileError for anything but the contract."""

    def wrong(what: str) -> CompileError:
        return CompileError(what, place=place, remedy=f"the signature must be {CONTRACT}")

    inputs = [s.arg.name for s in exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    outputs = [s.arg.name for s in exported.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    nodes = {n.name: n for n in exported.graph.nodes}
    if len(inputs) != 2 or len(outputs) != 1:
        raise wrong(f"it takes {len(inputs)} inputs and gives {len(outputs)} results")
    tokens, start, logits = (nodes[n].meta.get("val") for n in (*inputs, *outputs))
    if not all(isinstance(t, Tensor) for t in (tokens, start, logits)):
        raise wrong("its inputs and its result are not all tensors")
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] != 1:
        raise wrong(f"its first input is {_shown(tokens)}")
    if isinstance(tokens.shape[1], int) and tokens.shape[1] != 1:
        raise CompileError(
            f"its token count is fixed at {tokens.shape[1]}",
            place=place,
            remedy="export it with a dynamic one: dynamic_shapes=({1: torch.export.Dim('T', min=1, max=128)}, None)",
        )
    if start.dtype != torch.int64 or tuple(start.shape) != (1,):
        raise wrong(f"its second input is {_shown(start)}")
    same = logits.dim() == 3 and logits.shape[0] == 1 and str(logits.shape[1]) == str(tokens.shape[1])
    if not same or logits.dtype != torch.float32 or not isinstance(logits.shape[2], int):
        raise wrong(f"its result is {_shown(logits)}")
    return _longest(exported, tokens.shape[1], place), int(logits.shape[2])


def _longest(exported: ExportedProgram, size: Any, place: str) -> int:
    if isinstance(size, int):
        return size
    bounds = exported.range_constraints.get(size.node.expr)
    if bounds is None:
        return MAX_TOKENS
    if int(bounds.lower) > 1:
        raise CompileError(
            f"it takes at least {bounds.lower} tokens", place=place, remedy="decoding needs calls of one"
        )
    return int(bounds.upper) if bounds.upper.is_finite else MAX_TOKENS


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} [{', '.join(map(str, tensor.shape))}]"


class _Stateless(nn.Module):
    """A causal module over the whole context: tokens of earlier calls are kept, and all are computed again."""

    def __init__(self, module: nn.Module, context: int) -> None:
        super().__init__()
        self.module, self.context = module, context
        self.register_buffer("history", torch.zeros(1, context, dtype=torch.long))

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        positions = start_pos + torch.arange(tokens.shape[1])
        self.history.index_copy_(1, positions, tokens)
        return self.module(self.history).index_select(1, positions)


def _stateless(module: nn.Module, context: int | None, store: ModuleStore, max_tokens: int) -> nn.Module:
    if isinstance(store.module, ExportedProgram):
        context = context or max_tokens
    if not context:
        raise CompileError(
            "a stateless module must say how many positions it has",
            place=store.place,
            remedy="set its attribute `context`, or take start_pos and keep a KV cache",
        )
    return _Stateless(module, int(context))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
