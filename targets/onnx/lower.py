"""From a legal Program to `model.onnx` and `model.onnx.data`.

The graph is built from shapes alone and checked; weights are then streamed into the external file one at a time, so the
size of a model is bounded by the disk, not by memory, and never by protobuf's 2 GB.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.ops import CachedAttention
from moec.compiler.program import Program, module_path
from moec.compiler.states import coded_type
from moec.compiler.target import LoweredFiles
from moec.passes.float_activations import QUANTIZED
from moec.passes.levels_to_int8 import note
from moec.targets.onnx import aten, handlers
from moec.targets.onnx.attention import MASK, S, T, declare_cache, past_length
from moec.targets.onnx.context import Context
from moec.targets.onnx.facts import CacheFacts, GraphFacts, OnnxFacts, Tap
from moec.targets.onnx.genai import GENAI_FILE, write_genai_config
from moec.targets.onnx.moe_standard import DOMAIN
from moec.targets.onnx.nodes import IR_VERSION, MICROSOFT, OPSET
from moec.targets.onnx.options import Options
from moec.targets.onnx.weights import DATA_FILE

MODEL_FILE = "model.onnx"
HANDLERS: dict[Any, Any] = {**aten.HANDLERS, **handlers.HANDLERS}


def build(program: Program, options: Options) -> tuple[ModelProto, Context]:
    """The model without the bytes of its weights. CompileError naming what has no ONNX form, before any is read."""
    c = Context(program, options)
    nodes = list(program.graph.nodes)
    _check_signature(program)
    tokens, start = (n for n in nodes if n.op == "placeholder" and program.weight_of(n) is None)
    c.values[tokens] = c.add_input("input_ids", TensorProto.INT64, (1, T))
    c.add_input(MASK, TensorProto.INT64, (1, S))
    layers = [n for n in nodes if CachedAttention.find(n)]
    if not layers:
        raise CompileError("the model has no attention block that was recognised", place=program.info.name)
    for node in layers:
        declare_cache(c, node)
    c.values[start] = past_length(c)
    for node in nodes:
        if node.op == "call_function":
            c.values[node] = _lowered(c, node)
    logits = nodes[-1].args[0][0]
    c.b.op("Identity", c.value(logits), out="logits")
    logits_info = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, T, program.info.vocab_size])
    graph = helper.make_graph(
        c.b.nodes,
        re.sub(r"\W", "_", program.info.name),
        c.inputs,
        [logits_info, *c.outputs],
        list(c.weights.initializers.values()),
    )
    versions = {"": OPSET, DOMAIN: 1, MICROSOFT: 1}
    model = helper.make_model(
        graph,
        functions=list(c.functions.values()),
        opset_imports=[helper.make_opsetid(d, v) for d, v in versions.items() if d == "" or d in c.domains],
        ir_version=IR_VERSION,
        producer_name="moec",
        producer_version=version("moec"),
    )
    return model, c


def _check_signature(program: Program) -> None:
    for spec in program.exported.graph_signature.output_specs:
        if spec.kind != OutputKind.USER_OUTPUT:
            raise CompileError(
                f"the model writes {spec.target} outside an attention block that was recognised: no ONNX form",
                place=program.info.name,
                remedy="see `moec explain` for the block that was not fused; metal, mlir and xnnpack take it as it is",
            )


def _lowered(c: Context, node: Node) -> str:
    handler = HANDLERS.get(node.target)
    where = module_path(node) or node.name
    if handler is None:
        raise CompileError(f"{node.name} ({node.target}) has no ONNX form", place=where)
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16, torch.float64):
        kind = str(value.dtype).removeprefix("torch.")
        raise CompileError(f"{node.name} ({node.target}) computes in {kind}, this target in float32", place=where)
    return str(handler(c, node))


def lower(program: Program, out: Path, options: Options, progress: Any) -> LoweredFiles:
    """Write both files. The manifest's facts say how to run the model and what it holds."""
    with progress.stage("lower to ONNX"):
        model, c = build(program, options)
    digest = c.weights.write(out, progress)
    with progress.stage(f"write {MODEL_FILE}"):
        (out / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))
        _check(out / MODEL_FILE)
    for_genai = write_genai_config(c, next(iter(c.layers)), MODEL_FILE, out)
    sizes = {**c.weights.sizes_by_role(), "program": (out / MODEL_FILE).stat().st_size}
    return LoweredFiles(
        (MODEL_FILE, DATA_FILE, *([GENAI_FILE] if for_genai else [])),
        sizes,
        _facts(model, c, options),
        digests={DATA_FILE: digest},
        notes=_notes(program, options),
    )


def _check(file: Path) -> None:
    """ONNX's own checker, by path: it follows external data, and takes models of any size."""
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise AssertionError(f"the model that was built is not valid ONNX: {error}") from error


def walk(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes and those of their branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                graph: GraphProto = attribute.g
                yield from walk(graph.node)


def _counts(nodes: Iterable[NodeProto]) -> dict[str, int]:
    counts = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in walk(nodes))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _facts(model: ModelProto, c: Context, options: Options) -> OnnxFacts:
    return OnnxFacts(
        flavour=options.flavour,
        dtype="float32",
        kv_cache=(c.coded and coded_type(c.program.states.values())) or "fp32",
        computes={"activations": "fp32", **({"kv_cache": "fp32"} if options.kv_cache == "fp32" else {})},
        caches=tuple(CacheFacts.model_validate(layer) for layer in c.caches),
        moe_taps=tuple(Tap.model_validate(tap) for tap in c.taps),
        opsets={o.domain or "ai.onnx": o.version for o in model.opset_import},
        ir_version=model.ir_version,
        versions={"onnx": version("onnx")},
        graph=GraphFacts(
            inputs=tuple(i.name for i in model.graph.input),
            outputs=tuple(o.name for o in model.graph.output),
            nodes=_counts(model.graph.node),
            functions={
                f"{f.domain}::{f.name}{':' if f.overload else ''}{f.overload}": _counts(f.node) for f in model.functions
            },
            initializers=len(model.graph.initializer),
            external_bytes=c.weights.bytes,
        ),
    )


def _notes(program: Program, options: Options) -> tuple[str, ...]:
    notes = [*note(program)]
    if any(n.target in QUANTIZED for n in program.graph.nodes):
        notes.append("activations are float32: products do not round them to INT8, whatever the spec says")
    coded = coded_type(program.states.values())
    if options.kv_cache == "fp32" and coded is not None:
        notes.append(f"the KV cache is float32 by the target's option, the spec says {coded}")
    return tuple(notes)
