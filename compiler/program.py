"""The Program: one exported graph, its lazy weights by name, and the role of each weight.

The graph is a `torch.export.ExportedProgram` made from fake tensors, so no weight is in memory until it is
loaded. `weights[name].load()` reads (maps, computes) one tensor; nothing here keeps it.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from torch._export.verifier import TrainingIRVerifier
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx import Node
from torch.fx.graph import PythonCode

from moec.compiler.ops.call import NAMESPACE, Call
from moec.compiler.roles import Role as Role
from moec.compiler.states import State, StateTensor
from moec.compiler.weights import LazyWeight as LazyWeight
from moec.compiler.weights import QuantizedWeight


class Stage(IntEnum):
    """How far a program has been lowered. What is legal at each stage is written in `dialect.py`."""

    EXPORTED = 0
    CANONICAL = 1
    FUSED = 2
    QUANTIZED = 3
    LEGAL = 4


@dataclass(frozen=True)
class ModelInfo:
    """What a runtime must know beside the graph. Lengths in tokens."""

    name: str
    vocab_size: int
    context: int
    max_tokens: int  # upper bound of the dynamic token count of one call
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    moe_layers: tuple[str, ...] = ()  # module paths, in execution order


@dataclass(frozen=True)
class Program:
    """A graph with its weights. Passes return a new Program; `edit()` copies the graph, never the weights.

    quantized: the weights that are held as codes, by the name of the float weight. An entry stays when a target packs
    the codes into another layout: it then says what was packed, and its tensors are no longer among `weights`.
    calibration: what was observed to compute the codes, for people and the manifest; None where nothing was.
    """

    exported: ExportedProgram
    weights: Mapping[str, LazyWeight]
    roles: Mapping[str, Role]
    info: ModelInfo
    stage: Stage = Stage.EXPORTED
    quantized: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    states: Mapping[str, State] = field(default_factory=dict)  # what is carried between calls, by its buffer's name
    # the same model giving logits [1, V] of the last token of a call, for targets that ship both as methods: made by
    # the pass `last_token`, dropped by every edit after it
    last_token: Program | None = None
    calibration: Callable[[], Mapping[str, Any]] | None = field(default=None, compare=False)

    @property
    def graph(self) -> torch.fx.Graph:
        return self.exported.graph_module.graph

    def edit(self) -> Editor:
        return Editor(self)

    def state_tensors(self) -> dict[str, StateTensor]:
        """The buffers of all states, scales included, by name."""
        return {t.name: t for state in self.states.values() for t in state.tensors(self.info.context)}

    def weight_of(self, node: Node) -> str | None:
        """The weight's name if `node` is the placeholder of a parameter, buffer or constant; None otherwise."""
        if node.op != "placeholder":
            return None
        return self._weight_names.get(node.name)

    @cached_property
    def _weight_names(self) -> dict[str, str]:
        return weight_names(self.exported)

    def text(self) -> str:
        """Of the graph, and of that for the last token if there is one."""
        method = "" if self.last_token is None else f"last token of {self.last_token.text()}"
        return program_text(self) + method

    def digest(self) -> str:
        """Of the graph for every token, whatever its operands are called."""
        return hashlib.sha256(program_text(self, names=False).encode()).hexdigest()[:16]


class _Edited(torch.fx.GraphModule):
    """Holds a graph while it is edited. Nothing runs it, so no code is generated for each pass of each graph."""

    def recompile(self) -> PythonCode:
        return PythonCode("", {}, None)


class Editor:
    """A private copy of a program's graph to rewrite, and `done()` to make it a Program again."""

    def __init__(self, program: Program) -> None:
        self._program = program
        old = program.exported.graph_module
        root = torch.nn.Module()
        for node in old.graph.nodes:
            if node.op == "get_attr":  # the body of a fold over tokens
                setattr(root, str(node.target), getattr(old, str(node.target)))
        module = _Edited(root, copy_graph(old.graph))
        module.meta.update(old.meta)
        self.module = module
        self.graph = module.graph
        self.input_specs = [_as_weight(s) for s in program.exported.graph_signature.input_specs]
        self.output_specs = list(program.exported.graph_signature.output_specs)
        self.weights: dict[str, LazyWeight] = dict(program.weights)
        self.roles: dict[str, Role] = dict(program.roles)
        self.states: dict[str, State] = dict(program.states)
        self.quantized: dict[str, QuantizedWeight] = dict(program.quantized)
        self._names = weight_names(program.exported)  # placeholder -> weight
        by_name = {n.name: n for n in self.graph.nodes if n.op == "placeholder"}
        self._placeholders = {weight: by_name[name] for name, weight in self._names.items()}
        self.fake_mode = fake_mode_of(self.graph)

    def weight_of(self, node: Node) -> str | None:
        return self._names.get(node.name) if node.op == "placeholder" else None

    def placeholder_of(self, name: str) -> Node | None:
        """The placeholder node of weight `name`."""
        return self._placeholders.get(name)

    def add_weight(self, name: str, weight: LazyWeight, role: Role, *, mutable: bool = False) -> Node:
        """A new placeholder for `weight`, before the user inputs. `mutable`: operators write it (a cache)."""
        if name in self.weights:
            raise AssertionError(f"weight {name} exists")
        kind = InputKind.BUFFER if mutable else InputKind.PARAMETER
        place = next(i for i, s in enumerate(self.input_specs) if s.kind == InputKind.USER_INPUT)
        if not mutable:  # parameters first, then buffers, then inputs: the order torch.export itself keeps
            place = next((i for i, s in enumerate(self.input_specs) if s.kind != InputKind.PARAMETER), place)
        before = self._input_node(place)
        prefix = "b_" if mutable else "p_"
        with self.graph.inserting_before(before):
            node = self.graph.placeholder(prefix + re.sub(r"\W", "_", name))
        with self.fake_mode:
            node.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype)
        self.input_specs.insert(
            place,
            InputSpec(kind=kind, arg=TensorArgument(node.name), target=name, persistent=True if mutable else None),
        )
        self.weights[name] = weight
        self.roles[name] = role
        self._names[node.name] = name
        self._placeholders[name] = node
        return node

    def retype_weight(self, name: str, weight: LazyWeight) -> Node:
        """Give weight `name` another shape or type in place; its placeholder keeps name and position."""
        node = self._placeholders[name]
        with self.fake_mode:
            node.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype)
        self.weights[name] = weight
        return node

    def hold(self, state: State) -> tuple[Node, ...]:
        """Declare `state`, new or in another form: its buffers get the shapes and types that it says, and are zero.

        The placeholders: of the state, and of its scales if it has codes.
        """
        self.states[state.name] = state
        nodes = []
        for t in state.tensors(self._program.info.context):
            made, held = zeros(t.shape, getattr(torch, t.dtype)), self.weights.get(t.name)
            if held is None:
                nodes.append(self.add_weight(t.name, made, Role.CACHE, mutable=True))
                continue
            if (tuple(held.shape), held.dtype) != (made.shape, made.dtype):
                self.retype_weight(t.name, made)
            self.roles[t.name] = Role.CACHE
            nodes.append(self._placeholders[t.name])
        return tuple(nodes)

    def call(self, target: Any, *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
        """A new call at the current insertion point, its fake value computed; `like` lends the source location."""
        node = self.graph.call_function(target, args, kwargs)
        values, options = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.fake_mode:
            node.meta["val"] = target(*values, **options)
        if like is not None:
            node.meta.update({k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")})
        return node

    def emit(self, call: Call[Any], like: Node | None = None) -> Node:
        """A new node for a call of one of our operators, at the current insertion point."""
        return self.call(call.op, *call.arguments(), like=like)

    def mutations_of(self, value: Node) -> list[str | None]:
        """The buffers whose new content `value` is, by name; None for each time that it is a result of the program."""
        results = next(reversed(self.graph.nodes)).args[0]
        assert isinstance(results, (list, tuple))
        return [
            str(s.target) if s.kind == OutputKind.BUFFER_MUTATION else None
            for s, result in zip(self.output_specs, results, strict=True)
            if result is value
        ]

    def drop_mutation(self, value: Node) -> None:
        """`value` is no longer returned as the new content of a buffer: an operator now writes the buffer itself."""
        output = next(reversed(self.graph.nodes))
        results = list(output.args[0])
        keep = [
            i
            for i, s in enumerate(self.output_specs)
            if not (s.kind == OutputKind.BUFFER_MUTATION and results[i] is value)
        ]
        self.output_specs = [self.output_specs[i] for i in keep]
        output.args = (tuple(results[i] for i in keep),)
        output.meta.pop("val", None)

    def _input_node(self, index: int) -> Node:
        """The placeholder of input spec `index`."""
        spec = self.input_specs[index]
        weight = self._names.get(spec.arg.name)
        if weight is not None:
            return self._placeholders[weight]
        return next(n for n in self.graph.nodes if n.op == "placeholder" and n.name == spec.arg.name)

    def drop_unused_weights(self) -> None:
        """Remove placeholders of weights that no node reads any more, and their weights."""
        dead = [n for n in self.graph.nodes if n.op == "placeholder" and not n.users and n.name in self._names]
        gone = {n.name for n in dead}
        self.input_specs = [s for s in self.input_specs if getattr(s.arg, "name", None) not in gone]
        for node in dead:
            self.graph.erase_node(node)
            name = self._names.pop(node.name)
            del self._placeholders[name]
            self.weights.pop(name, None)
            self.roles.pop(name, None)
            self.states.pop(name, None)

    def done(self, *, stage: Stage | None = None) -> Program:
        """Eliminate dead code, rebuild the exported program and return it."""
        self.graph.eliminate_dead_code(is_impure_node=writes)
        self.drop_unused_weights()
        old = self._program.exported
        signature = copy.copy(old.graph_signature)
        signature.input_specs = self.input_specs
        signature.output_specs = self._named_outputs()
        exported = ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=signature,
            state_dict=self._fake_state(),
            range_constraints=old.range_constraints,
            module_call_graph=old.module_call_graph,
            example_inputs=old.example_inputs,
            constants={},
            verifiers=[TrainingIRVerifier],  # the dialect that allows operators which write their caches
        )
        return replace(
            self._program,
            exported=exported,
            weights=self.weights,
            roles=self.roles,
            quantized=self.quantized,
            states=self.states,
            stage=self._program.stage if stage is None else stage,
            last_token=None,
        )

    def _named_outputs(self) -> list[OutputSpec]:
        """The output specs, each under the name of the node that is returned now."""
        results = next(reversed(self.graph.nodes)).args[0]
        assert isinstance(results, (list, tuple))
        assert len(results) == len(self.output_specs)
        return [
            replace(s, arg=TensorArgument(node.name)) if isinstance(node, Node) else s
            for s, node in zip(self.output_specs, results, strict=True)
        ]

    def _fake_state(self) -> dict[str, torch.Tensor]:
        """torch wants a state: the fake tensors of the weights' placeholders, parameters wrapped as such."""
        values = {n.name: n.meta["val"] for n in self.graph.nodes if n.op == "placeholder"}
        return {
            str(s.target): torch.nn.Parameter(values[s.arg.name], requires_grad=False)
            if s.kind == InputKind.PARAMETER
            else values[s.arg.name]
            for s in self.input_specs
            if s.kind in (InputKind.PARAMETER, InputKind.BUFFER) and isinstance(s.arg, TensorArgument)
        }


def zeros(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> LazyWeight:
    """A buffer that starts at zero: a state."""
    return LazyWeight(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def _as_weight(spec: InputSpec) -> InputSpec:
    """The spec with non-persistent buffers and lifted constants as ordinary weights: the Program owns all of them."""
    if spec.kind not in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
        return spec
    return replace(spec, kind=InputKind.BUFFER, persistent=True)


def fake_mode_of(graph: torch.fx.Graph) -> Any:
    """The FakeTensorMode, with the shape environment, that a graph's values belong to."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    raise AssertionError("the graph holds no fake value")


def copy_graph(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy with the same node names; metadata dictionaries are copied one level deep."""
    new = torch.fx.Graph()
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        values[node] = new.node_copy(node, lambda n: values[n])
        values[node].name = node.name
        values[node].meta = dict(node.meta)
    return new


def weight_names(exported: ExportedProgram) -> dict[str, str]:
    """Placeholder name -> weight name, for parameters, buffers and constants."""
    return {
        s.arg.name: s.target
        for s in exported.graph_signature.input_specs
        if s.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        and isinstance(s.arg, TensorArgument)
        and s.target is not None
    }


def module_path(node: Node) -> str:
    """Where in the source model a node came from, e.g. `model.layers.3.feed_forward`; for people and names only."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def writes(node: Node) -> bool:
    """Placeholders, outputs, and operators that write an argument (caches), must survive dead-code elimination."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _format(value: object, names: Mapping[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_format(v, names) for v in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return str(value)


def _type_text(value: object) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(str(d) for d in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_type_text(v) for v in value) + ")"
    return type(value).__name__


def program_text(program: Program, *, names: bool = True) -> str:
    """Stable text: no addresses; values are numbered in order and symbols renamed, so equal graphs print equally.

    `names`: calls of our own operators name their operands, and leave out those that are absent.
    """
    values: dict[Node, str] = {}
    weights = weight_names(program.exported)
    lines = [f"program {program.info.name} stage={program.stage.name}"]
    counter = 0
    for node in program.graph.nodes:
        if node.op == "placeholder":
            weight = weights.get(node.name)
            values[node] = f"@{weight}" if weight else f"%{node.name}"
            role = f" role={program.roles[weight].value}" if weight is not None and weight in program.roles else ""
            lines.append(f"  {values[node]}: {_type_text(node.meta.get('val'))}{role}")
            continue
        args = _arguments(node, values) if names else []
        if not args:
            args = [_format(a, values) for a in node.args]
            args += [f"{k}={_format(v, values)}" for k, v in node.kwargs.items()]
        if node.op == "output":
            lines.append(f"  return {', '.join(args)}")
            continue
        values[node] = f"%{counter}"
        counter += 1
        if node.op == "get_attr":
            lines.append(f"  {values[node]} = step of a token:")
            lines += _body_lines(getattr(program.exported.graph_module, str(node.target)))
            continue
        plain = callable(node.target) and not hasattr(node.target, "_schema")
        target = node.target.__name__ if plain else str(node.target)
        lines.append(f"  {values[node]}: {_type_text(node.meta.get('val'))} = {target}({', '.join(args)})")
    return _rename_symbols("\n".join(lines)) + "\n"


def _body_lines(body: torch.fx.GraphModule) -> list[str]:
    """Lines of a nested graph, the body of a scan over tokens."""
    values: dict[Node, str] = {}
    lines = []
    for index, node in enumerate(body.graph.nodes):
        values[node] = f"%{index}"
        args = ", ".join([_format(a, values) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()])
        what = {"placeholder": "input", "output": f"return {args}"}.get(node.op, f"{node.target}({args})")
        lines.append(f"    {values[node]}: {_type_text(node.meta.get('val'))} = {what}")
    return lines


def _arguments(node: Node, values: Mapping[Node, str]) -> list[str]:
    """`name=value` for each argument of a call of ours that is there; [] for other operators."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or getattr(node.target, "namespace", "") != NAMESPACE:
        return []
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    return [
        f"{name}={value!r}" if isinstance(value, str) else f"{name}={_format(value, values)}"
        for name, value in given.items()
        if value is not None
    ]


def _rename_symbols(text: str) -> str:
    seen: dict[str, str] = {}
    return re.sub(r"\bs\d+\b", lambda m: seen.setdefault(m.group(), f"s{len(seen)}"), text)
