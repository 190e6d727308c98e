"""Codes of a whole model by methods that observe inputs: layer by layer, each weight (each expert) with its own inputs.

The float model runs on the text (`streaming.py`); after each stretch the weights that it read are quantized and
dropped. So one layer is in memory, beside the residual stream of all tokens. Several methods can be served by one run.

Shape suffixes: T tokens, E experts, N rows (outputs), K reduction (inputs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moec.analysis.calibration.balance import Link, Product, best_factors, links_of, of_outputs
from moec.analysis.calibration.moe import ExpertInputs, MoeLayer, Seen
from moec.analysis.calibration.results import Writer
from moec.analysis.calibration.streaming import LayerStream, Stretch
from moec.compiler.errors import CompileError
from moec.compiler.matching.read import aten, is_op
from moec.compiler.ops import FusedMoe, fused_moe
from moec.compiler.program import Program, module_path
from moec.compiler.progress import Progress
from moec.compiler.quant import QuantizedTensor
from moec.compiler.quantizer import Inputs, Moments, Quantizer
from moec.compiler.spec.quantization import Quantization, WeightScheme
from moec.compiler.weights import filled
from moec.passes.quantize_weights import Read, reads

_JUDGED_EXPERTS = 4  # of a layer, when the factors of its norm are chosen


@dataclass(frozen=True)
class Method:
    """A method to serve, and where its results go."""

    quantizer: Quantizer
    writer: Writer


@dataclass(frozen=True)
class Coverage:
    """least: tokens that every expert is to see; allowed: layers, or experts as LAYER.NUMBER, that may see fewer."""

    least: int
    allowed: frozenset[str] = frozenset()


@dataclass
class _Factors:
    """Multipliers of rows [N] and columns [K] of weights, by name."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _MoeNode:
    """A fused MoE node: its operands as nodes and constants of the graph, and as values, by name."""

    node: Node
    operands: Mapping[str, Any]
    values: Mapping[str, Any]
    layer: MoeLayer


class Engine:
    """One calibration of `program` (stage FUSED) on `texts` of token ids."""

    def __init__(
        self,
        program: Program,
        quantization: Quantization,
        texts: Sequence[Sequence[int]],
        methods: Sequence[Method],
        coverage: Coverage,
        progress: Progress,
    ) -> None:
        self._program, self._methods, self._coverage, self._progress = program, methods, coverage, progress
        planned = [r for r in reads(program, quantization) if program.weights[r.name].stored is None]
        linear = [r for r in planned if is_op(r.node, aten.linear.default)]
        self._linear = {r.node: r for r in linear}
        self._experts = {(r.node, r.operand): r for r in planned if r.node.target is fused_moe}
        known = {r.name for r in linear}
        self._tables = list({r.name: r for r in planned if r.operand == "weight" and r.name not in known}.values())
        kinds = [m.quantizer.observes for m in methods if m.quantizer.observes is not None]
        self._kind: type[Inputs] = max(kinds, key=lambda k: len(k.__mro__)) if kinds else Inputs
        self._links = links_of(program) if any(m.quantizer.balances for m in methods) else []
        fused = [n for n in program.graph.nodes if n.target is fused_moe]
        names = program.info.moe_layers
        self._layers = {n: names[i] if i < len(names) else module_path(n) or n.name for i, n in enumerate(fused)}
        self._stream = LayerStream(program, texts, [*self._linear, *fused])
        self.report: dict[str, Any] = {"tokens": self._stream.tokens, "moe": [], "scaled": {}}

    @torch.no_grad()
    def run(self) -> None:
        """Results of every method in its writer, and `report`. CompileError for an expert that saw too few tokens."""
        stretches = list(self._stream)
        with self._progress.stage("calibrate", len(stretches) + 1) as step:
            for stretch in stretches:
                node = self._stream.joint(stretch)
                if node is None:
                    self._linears(stretch)
                else:
                    self._moe(stretch, node)
                step("")
            for read in self._tables:  # looked up, never multiplied
                self._write(read, None, _Factors())
            step("")

    # --- linears ----------------------------------------------------------------------------------------------------

    def _linears(self, stretch: Stretch) -> None:
        here = [self._linear[n] for n in stretch.nodes if n in self._linear]
        seen: dict[Node, Inputs] = {}
        first: dict[Node, Node] = {}
        for read in here:
            first.setdefault(_root(read.node.args[0]), read.node)

        def observe(node: Node, args: tuple[Any, ...]) -> None:
            root = _root(node.args[0])
            if first.get(root) is node:
                x_TK = args[0].flatten(0, -2).to(torch.float32)
                seen.setdefault(root, self._kind(x_TK.shape[-1])).add(x_TK)

        self._stream.run(stretch, observe)
        factors = self._factors_of(here, seen)
        by_inputs: dict[tuple[Node, WeightScheme, int], list[Read]] = {}
        for read in {r.name: r for r in reversed(here)}.values():
            columns = id(factors.columns.get(read.name))
            by_inputs.setdefault((_root(read.node.args[0]), read.scheme, columns), []).append(read)
        for (root, _, _), together in by_inputs.items():
            self._write_together(together, seen[root], factors)
        self._write_factors(factors)

    def _write_together(self, together: Sequence[Read], inputs: Inputs, factors: _Factors) -> None:
        """Weights [N, K] of one scheme that read the same inputs, with the same factors of their columns."""
        names, scheme = [r.name for r in together], together[0].scheme
        weights = [self._program.weights[name].load() for name in names]
        counts = [len(w) for w in weights]
        columns = factors.columns.get(names[0])
        for method in self._methods:
            if len(names) == 1 or not method.quantizer.by_row or scheme.axis != "in":
                for read in together:
                    self._write_one(method, read, inputs, factors)
                continue
            scaled = any(name in factors.rows for name in names)
            rows = [factors.rows.get(name, torch.ones(n)) for name, n in zip(names, counts, strict=True)]
            codes = _codes(
                method.quantizer, torch.cat(weights), scheme, inputs, torch.cat(rows) if scaled else None, columns
            )
            start = 0
            for name, count in zip(names, counts, strict=True):
                method.writer.codes(name, codes.part(slice(start, start + count)))
                start += count

    def _factors_of(self, here: Sequence[Read], seen: Mapping[Node, Inputs]) -> _Factors:
        """The factors of every link whose weights are all of this stretch."""
        factors = _Factors()
        by_node = {r.node: r for r in here}
        names = {r.name for r in here}
        planned = {r.name for r in self._linear.values()}
        for link in self._links:
            if not all(n in by_node for n in link.readers) or any(o in planned and o not in names for o in link.outs):
                continue
            products = []
            for node in link.readers:
                inputs = seen[_root(node.args[0])]
                assert isinstance(inputs, Moments)
                read = by_node[node]
                products.append(Product(self._program.weights[read.name].load(), read.scheme, inputs))
            self._add(link, best_factors(products, link.heads), factors, [by_node[n].name for n in link.readers])
        return factors

    def _add(self, link: Link, found: Tensor | None, factors: _Factors, readers: Sequence[str]) -> None:
        count = self.report["scaled"].setdefault(link.kind, {"pairs": 0, "scaled": 0})
        count["pairs"] += 1
        if found is None:
            return
        count["scaled"] += 1
        for name in link.outs:
            factors.rows[name] = 1.0 / of_outputs(found, link.heads)
        for name in readers:
            factors.columns[name] = found

    def _write(self, read: Read, inputs: Inputs | None, factors: _Factors) -> None:
        for method in self._methods:
            self._write_one(method, read, inputs, factors)

    def _write_one(self, method: Method, read: Read, inputs: Inputs | None, factors: _Factors) -> None:
        w = self._program.weights[read.name].load()
        w_NK = w if read.orientation == "out_in" else w.t()
        rows, columns = factors.rows.get(read.name), factors.columns.get(read.name)
        method.writer.codes(read.name, _codes(method.quantizer, w_NK, read.scheme, inputs, rows, columns))

    def _write_factors(self, factors: _Factors) -> None:
        for method in self._methods:
            if method.quantizer.balances:
                for name in dict.fromkeys([*factors.rows, *factors.columns]):
                    rows, columns = factors.rows.get(name), factors.columns.get(name)
                    method.writer.scaled(name, rows=rows, columns=columns)

    # --- experts ----------------------------------------------------------------------------------------------------

    def _moe(self, stretch: Stretch, node: Node) -> None:
        call: FusedMoe[Node] = FusedMoe.of(node)
        moe = self._moe_node(node, call)
        x_TD = self._stream.joint_operand(call.x).to(torch.float32)
        same = call.x is call.router_input
        router_TD = x_TD if same else self._stream.joint_operand(call.router_input).to(torch.float32)
        y_TD = torch.zeros_like(x_TD)
        everything = self._kind(x_TD.shape[-1])
        everything.add(x_TD)
        factors = self._norm_factors(moe, everything)
        if any((moe.node, part) in self._experts for part in ("w13", "w2")):
            self._routed(moe, x_TD, router_TD, y_TD, factors)
        else:
            for _ in moe.layer.run(x_TD, router_TD, 0, y_TD):
                pass
        hidden = moe.layer.shared(x_TD, y_TD)
        if hidden is not None:
            self._shared(moe, everything, hidden, factors)
        self._write_factors(factors)
        self._stream.give(stretch, y_TD if self._stream.needs(node) else None)

    def _moe_node(self, node: Node, call: FusedMoe[Node]) -> _MoeNode:
        operands = {f.name: getattr(call, f.name) for f in fields(call)}
        values = {
            name: self._program.weights[str(self._program.weight_of(operand))].load()
            if isinstance(operand, Node) and operand.op == "placeholder"
            else operand
            for name, operand in operands.items()
        }
        return _MoeNode(node, operands, values, MoeLayer(values))

    def _norm_factors(self, moe: _MoeNode, inputs: Inputs) -> _Factors:
        factors = _Factors()
        link = next((k for k in self._links if k.readers == (moe.node,)), None)
        if link is None or not isinstance(inputs, Moments):
            return factors
        products = []
        if (shared := self._experts.get((moe.node, "shared_w13"))) is not None:
            products.append(Product(moe.values["shared_w13"], shared.scheme, inputs))
        if (routed := self._experts.get((moe.node, "w13"))) is not None and routed.scheme.axis == "in":
            for expert in range(0, moe.layer.count, max(1, moe.layer.count // _JUDGED_EXPERTS)):
                products.append(Product(_matrix(moe.values["w13"][expert], routed), routed.scheme, inputs))
        readers = ("router_weight", "w13", "shared_w13", "shared_gate")
        present = [str(self._program.weight_of(moe.operands[r])) for r in readers if moe.operands.get(r) is not None]
        self._add(link, best_factors(products), factors, present)
        return factors

    def _routed(self, moe: _MoeNode, x_TD: Tensor, router_TD: Tensor, y_TD: Tensor, factors: _Factors) -> None:
        up, down = self._experts[moe.node, "w13"], self._experts[moe.node, "w2"]
        columns = factors.columns.get(up.name)
        codes: list[tuple[list[QuantizedTensor], list[QuantizedTensor]]] = [([], []) for _ in self._methods]
        seen: list[dict[str, int]] = []
        by_expert: list[Tensor | None] = []
        for part in moe.layer.run(x_TD, router_TD, self._coverage.least, y_TD):
            inputs_up, inputs_down = self._inputs(part.up), self._inputs(part.down)
            seen.append({"tokens": inputs_up.tokens - inputs_up.forced, "forced": inputs_up.forced})
            self._check_coverage(self._layers[moe.node], part, inputs_up)
            w13, w2 = _matrix(moe.values["w13"][part.expert], up), _matrix(moe.values["w2"][part.expert], down)
            hidden = self._hidden_factors(moe.layer, w2, down.scheme, inputs_down, "expert")
            by_expert.append(hidden)
            rows = None if hidden is None else _up_rows(moe.layer, hidden)
            for method, (ups, downs) in zip(self._methods, codes, strict=True):
                ups.append(_codes(method.quantizer, w13, up.scheme, inputs_up, rows, columns))
                downs.append(_codes(method.quantizer, w2, down.scheme, inputs_down, None, hidden))
        for method, (ups, downs) in zip(self._methods, codes, strict=True):
            method.writer.codes(up.name, filled(len(ups), ups))
            method.writer.codes(down.name, filled(len(downs), downs))
        self.report["moe"].append({"layer": self._layers[moe.node], "experts": seen})
        if any(f is not None for f in by_expert):
            width = max(len(f) for f in by_expert if f is not None)
            factors_EF = torch.stack([torch.ones(width) if f is None else f for f in by_expert])
            factors.columns[down.name] = factors_EF
            factors.rows[up.name] = torch.stack([_up_rows(moe.layer, f_F) for f_F in factors_EF])
            if moe.operands.get("b13") is not None:
                factors.rows[str(self._program.weight_of(moe.operands["b13"]))] = factors.rows[up.name]

    def _shared(self, moe: _MoeNode, inputs_up: Inputs, hidden_TS: Tensor, factors: _Factors) -> None:
        up, down = self._experts.get((moe.node, "shared_w13")), self._experts.get((moe.node, "shared_w2"))
        if up is None or down is None:
            return
        inputs_down = self._inputs(Seen(hidden_TS, hidden_TS[:0]))
        found = self._hidden_factors(moe.layer, moe.values["shared_w2"], down.scheme, inputs_down, "shared")
        if found is not None:
            factors.columns[down.name] = found
            factors.rows[up.name] = torch.cat([torch.ones_like(found), 1.0 / found])
        self._write(up, inputs_up, factors)
        self._write(down, inputs_down, factors)

    def _hidden_factors(
        self, layer: MoeLayer, w_NK: Tensor, scheme: WeightScheme, inputs: Inputs, kind: str
    ) -> Tensor | None:
        """Factors of the hidden channels of an expert; None where its up projection cannot take their inverse."""
        how = layer.experts
        free = how.gated and how.up_offset == 0 and how.up_min == -torch.inf and how.up_max == torch.inf
        balanced = any(m.quantizer.balances for m in self._methods)
        if not free or not balanced or not isinstance(inputs, Moments):
            return None
        found = best_factors([Product(w_NK, scheme, inputs)])
        count = self.report["scaled"].setdefault(kind, {"pairs": 0, "scaled": 0})
        count["pairs"] += 1
        count["scaled"] += found is not None
        return found

    def _inputs(self, seen: Seen) -> Inputs:
        inputs = self._kind(seen.routed.shape[-1])
        for rows, forced in ((seen.routed, False), (seen.forced, True)):
            if len(rows):
                inputs.add(rows, forced=forced)
        return inputs

    def _check_coverage(self, layer: str, part: ExpertInputs, inputs: Inputs) -> None:
        allowed = self._coverage.allowed
        if inputs.tokens >= self._coverage.least or {layer, f"{layer}.{part.expert}"} & allowed:
            return
        raise CompileError(
            f"expert {part.expert} saw {inputs.tokens} tokens of calibration text, {self._coverage.least} are needed",
            place=layer,
            remedy="give more text (calibration.tokens), or name it in calibration.uncalibrated: "
            f"[{layer}.{part.expert}]",
        )


def _root(node: Any) -> Node:
    """The value behind reshapes that leave its last dimension: linears of one value share what is seen of it."""
    while node.target in (aten.view.default, aten.reshape.default, aten.unsqueeze.default):
        source = node.args[0]
        if source.meta["val"].shape[-1] != node.meta["val"].shape[-1]:
            break
        node = source
    found: Node = node
    return found


def _matrix(w: Tensor, read: Read) -> Tensor:
    """An expert's weight as [N, K]."""
    return w if read.orientation == "out_in" else w.t()


def _up_rows(layer: MoeLayer, factors_F: Tensor) -> Tensor:
    """Multipliers of the rows of a gate and up projection [2F] for factors of the hidden channels [F]."""
    ones, inverse = torch.ones_like(factors_F), 1.0 / factors_F
    return torch.stack([ones, inverse], -1).flatten() if layer.experts.interleaved else torch.cat([ones, inverse])


def _codes(
    quantizer: Quantizer,
    w_NK: Tensor,
    scheme: WeightScheme,
    inputs: Inputs | None,
    rows: Tensor | None,
    columns: Tensor | None,
) -> QuantizedTensor:
    """One matrix by one method; rows and columns are multiplied first if the method wants that."""
    w = w_NK.to(torch.float32)
    if quantizer.balances:
        if rows is not None:
            w = w * rows.unsqueeze(-1)
        if columns is not None:
            w = w * columns
            inputs = None if inputs is None else inputs.divided(columns)
    seen = inputs if quantizer.observes is not None else None
    return quantizer.quantize(w if scheme.axis == "in" else w.t(), scheme, seen)
