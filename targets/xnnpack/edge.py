"""From a legal graph to ExecuTorch's edge dialect, operator by operator, for graphs of operators that have a rule here.

`to_edge_transform_and_lower` decomposes, functionalizes and retraces a graph about ten times, which is most of a
compile. A fused decoder has a few plain operators besides `moec`'s own; models of other sources also have the
arithmetic of their rotary embedding, and what lies between layers with a state. Most are only renamed here, some
rewritten in a few others (silu, softplus, split), which gives the same program as ExecuTorch's function. For a graph
with any other operator the result is None, and the caller takes that function.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.passes.replace_aten_with_edge_pass import aten_to_edge
from executorch.exir.program._program import lift_constant_tensor_pass
from torch._export.verifier import Verifier
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument
from torch.fx import Graph, Node

from moec.compiler.program import copy_graph

aten = torch.ops.aten
# ExecuTorch's edge dialect has no views: its memory planner removes the copies that are not needed
VIEWS = {
    aten.view.default: aten.view_copy.default,
    aten.reshape.default: aten.view_copy.default,
    aten.slice.Tensor: aten.slice_copy.Tensor,
    aten.split_with_sizes.default: aten.split_with_sizes_copy.default,
    aten.select.int: aten.select_copy.int,
    aten.unsqueeze.default: aten.unsqueeze_copy.default,
    aten.squeeze.dims: aten.squeeze_copy.dims,
    aten.permute.default: aten.permute_copy.default,
    aten.transpose.int: aten.transpose_copy.int,
}
UNCHANGED = {
    aten.cat.default,
    aten.clamp.default,
    aten.cos.default,
    aten.exp.default,
    aten.index_select.default,
    aten.neg.default,
    aten.relu.default,
    aten.rsqrt.default,
    aten.sigmoid.default,
    aten.sin.default,
    aten.tanh.default,
    aten.linear.default,
    torch.ops.torchao.choose_qparams_affine.default,
    torch.ops.torchao.quantize_affine.default,
    torch.ops.torchao.dequantize_affine.default,
}
ARITHMETIC = {aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor}


class InPlaceEdgeVerifier(Verifier):
    """Edge operators and delegates, and operators that write their caches."""

    dialect = "MOEC_EDGE"

    def allowed_op_types(self) -> tuple[type[Any], ...]:
        return (*super().allowed_op_types(), EdgeOpOverload)

    def allowed_getattr_types(self) -> tuple[type[Any], ...]:
        return (torch.fx.GraphModule, LoweredBackendModule, torch.Tensor)


InPlaceEdgeVerifier.dialect = "TRAINING"  # the only dialect in which torch lets operators write their arguments


def plain_edge_program(exported: ExportedProgram) -> ExportedProgram | None:
    """The program in edge dialect, caches declared as mutated buffers; None if an operator has no rule."""
    graph = copy_graph(exported.graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        rename = _renaming(node)
        if rename is None:
            return None
        rename(graph, node)
    signature = copy.copy(exported.graph_signature)
    signature.output_specs = [*_mutations(exported, graph), *signature.output_specs]
    root = torch.nn.Module()
    _numbers_to_tensors(graph, root)
    module = torch.fx.GraphModule(root, graph)
    module.meta.update(exported.graph_module.meta)
    edge = ExportedProgram(
        root=module,
        graph=graph,
        graph_signature=signature,
        state_dict=dict(exported.state_dict),
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
        verifiers=[InPlaceEdgeVerifier],
    )
    lifted: ExportedProgram = lift_constant_tensor_pass(edge)
    return lifted


def _renaming(node: Node) -> Callable[[Graph, Node], None] | None:
    target: Any = node.target
    if target is operator.getitem or target is aten.sym_size.int:
        return _keep
    if getattr(target, "namespace", "") == "moec":
        return _keep if target._schema.is_mutable else _to_edge
    if target in VIEWS or target in UNCHANGED:
        return _to_edge
    if target in ARITHMETIC and not node.kwargs and (_same_type(node) or _by_number(node)):
        return _to_edge
    if target is aten._to_copy.default and set(node.kwargs) == {"dtype"} and not _same_type(node):
        return _to_edge
    if target is aten.split.Tensor and all(isinstance(v.shape[_axis(node)], int) for v in node.meta["val"]):
        return _size_split
    if len(node.args) == 1 and not node.kwargs and target in EXPANDED:
        return EXPANDED[target]
    if target is aten.arange.default and len(node.args) == 1:
        return _expand_arange
    return None


def _same_type(node: Node) -> bool:
    """Two tensors of one type: nothing to promote, no number to make a tensor of."""
    values = [a.meta.get("val") if isinstance(a, Node) else None for a in node.args]
    return all(isinstance(v, torch.Tensor) and v.dtype == node.meta["val"].dtype for v in values)


def _by_number(node: Node) -> bool:
    """A float32 tensor and a number, in this order: the number becomes a float32 tensor, and nothing is promoted."""
    tensor, number = node.args[0], node.args[1]
    value = tensor.meta.get("val") if isinstance(tensor, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32 and type(number) is float


def _numbers_to_tensors(graph: Graph, root: torch.nn.Module) -> None:
    """Replace operands that are numbers by 0-dimensional constants of `root`, as the edge dialect has them."""
    arithmetic = {aten_to_edge(target) for target in ARITHMETIC}
    for node in graph.nodes:
        if node.target not in arithmetic or isinstance(node.args[1], Node):
            continue
        name = f"number_{node.name}"
        root.register_buffer(name, torch.tensor(node.args[1]))
        with graph.inserting_before(node):
            node.args = (node.args[0], graph.get_attr(name))


def _keep(graph: Graph, node: Node) -> None:
    pass


def _to_edge(graph: Graph, node: Node) -> None:
    node.target = aten_to_edge(VIEWS.get(node.target, node.target))


def _expand_silu(graph: Graph, node: Node) -> None:
    """silu(x) = x * sigmoid(x)."""
    with graph.inserting_before(node):
        gate = graph.call_function(aten_to_edge(aten.sigmoid.default), (node.args[0],))
    gate.meta = dict(node.meta)
    node.target, node.args = aten_to_edge(aten.mul.Tensor), (node.args[0], gate)


def _expand_square(graph: Graph, node: Node) -> None:
    """square(x) = x^2."""
    node.target, node.args = aten_to_edge(aten.pow.Tensor_Scalar), (node.args[0], 2)


def _expand_softplus(graph: Graph, node: Node) -> None:
    """softplus(x) = log(1 + exp(x)), and x above 20, as torch defines it."""
    x: Any = node.args[0]
    with graph.inserting_before(node):
        exp = graph.call_function(aten_to_edge(aten.exp.default), (x,))
        log = graph.call_function(aten_to_edge(aten.log1p.default), (exp,))
        large = graph.call_function(aten_to_edge(aten.gt.Scalar), (x, 20))
    exp.meta, log.meta = dict(node.meta), dict(node.meta)
    large.meta = {**node.meta, "val": node.meta["val"] > 20}
    node.target, node.args = aten_to_edge(aten.where.self), (large, x, log)


EXPANDED = {
    aten.silu.default: _expand_silu,
    aten.softplus.default: _expand_softplus,
    aten.square.default: _expand_square,
}


def _axis(split: Node) -> int:
    return int(split.args[2]) if len(split.args) > 2 else 0  # type: ignore[arg-type]


def _size_split(graph: Graph, node: Node) -> None:
    """split(x, n) = split(x, [n, n, ..., what is left])."""
    sizes = [int(v.shape[_axis(node)]) for v in node.meta["val"]]
    node.target = aten_to_edge(aten.split_with_sizes_copy.default)
    node.args = (node.args[0], sizes, _axis(node))


def _expand_arange(graph: Graph, node: Node) -> None:
    """arange(n) = arange(0, n, 1), of integers."""
    node.target, node.args = aten_to_edge(aten.arange.start_step), (0, node.args[0], 1)
    node.kwargs = {"dtype": node.meta["val"].dtype, "device": torch.device("cpu"), "pin_memory": False}


def _mutations(exported: ExportedProgram, graph: Graph) -> list[OutputSpec]:
    """Make the caches that operators write outputs of `graph`; their specs, as functionalization would give them."""
    buffers = {s.arg.name: str(s.target) for s in exported.graph_signature.input_specs if s.kind == InputKind.BUFFER}
    written: dict[Node, str] = {}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node):
                written[value] = buffers[value.name]
    output = next(reversed(graph.nodes))
    output.args = ((*written, *output.args[0]),)
    output.meta.pop("val", None)
    return [OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(n.name), name) for n, name in written.items()]
