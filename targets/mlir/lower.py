"""From a legal Program to an MLIR artifact.

    fused.torch.mlir          raw torch dialect; our operators kept as `torch.operator "torch.moec...."`
    reference.torch.mlir      the reference expansion in the torch dialect's backend form
    reference.linalg.mlir     the same as linalg-on-tensors
    weights.safetensors       what the arguments are, codes as they are stored
    model.vmfb                the torch text compiled by IREE, with `engine: iree`

Each text begins with comments that say what every argument and result is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moec.checkpoints.safetensors_file import SafetensorsWriter
from moec.compiler.errors import CompileError
from moec.compiler.extras import require
from moec.compiler.program import Program, Role
from moec.compiler.target import LoweredFiles
from moec.passes.levels_to_int8 import note
from moec.targets.mlir import toolchain
from moec.targets.mlir.facts import Argument, MlirFacts
from moec.targets.mlir.functional import TAPS, Signature, exported, operators_of, signature_of
from moec.targets.mlir.options import Options

ENTRY = "forward"
FUSED, TORCH, LINALG, WEIGHTS, VMFB = (
    "fused.torch.mlir", "reference.torch.mlir", "reference.linalg.mlir", "weights.safetensors", "model.vmfb",
)  # fmt: skip
UNCHECKED = "the fused text: it is verified as MLIR, its operators have no implementation outside moec"


def lower(program: Program, out: Path, options: Options, progress: Any) -> LoweredFiles:
    """Write the files above. MissingExtra without torch-mlir; CompileError naming an operator without a lowering."""
    require("torch_mlir", "mlir", "compiling for mlir")
    if options.engine == "iree":
        require("iree.compiler", "iree", "compiling for mlir with `engine: iree`")
    signature = signature_of(program)
    model = program.info.name
    for name in signature.caches:  # a sequence starts from zeros, in the worker
        if bool(program.weights[name].load().any()):
            raise CompileError(f"the model writes {name}, which does not start at zero", place=model)
    arguments, results = _arguments(program, signature), _results(signature)
    files = [FUSED, TORCH]
    with progress.stage("text of the fused graph"):
        kept = exported(program, signature, expand=False)
        notes = _header(f"{model}: the fused graph", arguments, results[: 1 + len(signature.caches)])
        (out / FUSED).write_text(notes + _imported(kept, model, decompose=False), "utf-8")
    with progress.stage("text of the reference expansion"):
        expanded = exported(program, signature, expand=True)
        raw = out / "expanded.raw"
        raw.write_text(_imported(expanded, model, decompose=True), "utf-8")
        notes = _header(f"{model}: the reference expansion", arguments, results)
        toolchain.lower_text("torch", raw, out / TORCH, model=model)
        raw.unlink()
    if options.linalg:
        with progress.stage("linalg-on-tensors"):
            toolchain.lower_text("linalg", out / TORCH, out / LINALG, model=model)
        files.append(LINALG)
    for name in files[1:]:
        _prepend(out / name, notes)
    sizes = _write_weights(program, signature, out / WEIGHTS, progress)
    files.append(WEIGHTS)
    if options.engine == "iree":
        from moec.targets.mlir.iree import compile_text

        with progress.stage("compile with IREE"):
            compile_text(out / TORCH, out / VMFB, model=model)
        files.append(VMFB)
    sizes["program"] = sum((out / name).stat().st_size for name in files if name != WEIGHTS)
    facts = MlirFacts(
        dtype="float32",
        engine=options.engine,
        entry=ENTRY,
        tokens=f"dynamic, 1 to {program.info.max_tokens}" if program.info.max_tokens > 1 else "1",
        arguments=tuple(Argument.model_validate(a) for a in arguments),
        results=tuple(results),
        operators=tuple(operators_of(kept)),
        tools=toolchain.versions(),
        not_checked=(UNCHECKED,),
    )
    return LoweredFiles(tuple(files), dict(sizes), facts, notes=(f"not checked: {UNCHECKED}", *note(program)))


def _arguments(program: Program, signature: Signature) -> list[dict[str, Any]]:
    """What each argument is, in order."""

    def described(kind: str, name: str) -> dict[str, Any]:
        weight = program.weights[name]
        dtype = str(weight.dtype).removeprefix("torch.")
        return {"kind": kind, "tensor": name, "dtype": dtype, "shape": list(weight.shape)}

    return [
        *(described("weight", name) for name in signature.weights),
        *(described("cache", name) for name in signature.caches),
        {"kind": "tokens", "dtype": "int64", "shape": [1, "T" if program.info.max_tokens > 1 else 1]},
        {"kind": "start_pos", "dtype": "int64", "shape": [1]},
    ]


def _results(signature: Signature) -> list[str]:
    taps = (f"MoE layer {n}: {field}" for n in range(signature.moe_layers) for field in TAPS)
    return ["logits", *(f"cache {name}" for name in signature.caches), *taps]


def _header(title: str, arguments: Sequence[dict[str, Any]], results: Sequence[str]) -> str:
    lines = [title, f"T, the number of tokens, is dynamic; weights are the tensors of {WEIGHTS}", ""]
    lines += [f"%arg{i}  {a['kind']} {a.get('tensor', '')}".rstrip() for i, a in enumerate(arguments)]
    lines += ["", *(f"result {i}  {name}" for i, name in enumerate(results))]
    return "".join(f"// {line}".rstrip() + "\n" for line in lines)


def _prepend(file: Path, notes: str) -> None:
    file.write_text(notes + file.read_text("utf-8"), "utf-8")


def _imported(program: torch.export.ExportedProgram, model: str, *, decompose: bool) -> str:
    """The raw torch dialect of an exported function. CompileError naming an operator that cannot be imported."""
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table
    from torch_mlir.extras.fx_importer import FxImporter

    if decompose:
        program = program.run_decompositions(get_decomposition_table())
    context = ir.Context()
    torch_dialect.register_dialect(context)
    importer = FxImporter(context=context)
    try:
        importer.import_frozen_program(program, func_name=ENTRY)
    except (NotImplementedError, ValueError, KeyError, TypeError, ir.MLIRError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CompileError(f"torch-mlir cannot import the graph: {first[:300]}", place=model) from error
    return str(importer.module)


def _write_weights(program: Program, signature: Signature, file: Path, progress: Any) -> Counter[str]:
    """One tensor in memory at a time; wide elements first, so that each tensor is aligned to its own."""
    weights = program.weights
    names = sorted(signature.weights, key=lambda name: -weights[name].dtype.itemsize)
    sizes: Counter[str] = Counter()
    layout = [(name, weights[name].dtype, tuple(weights[name].shape)) for name in names]
    with SafetensorsWriter(file, layout) as writer:
        for name in progress.each("write weights", names):
            value = weights[name].load()
            writer.write(name, [value])
            sizes[program.roles.get(name, Role.OTHER).value] += value.nbytes
    return sizes
