"""Does a rewrite keep the meaning of a graph? Two programs compared, structure and numbers.

    end to end      the same tokens through both, in chunks and single steps, over one KV cache each
    each rewrite    every region that the pass replaced runs alone, fed with the values of the graph *before* (so with
                    its routing): an error is found where it is made, and cannot hide behind a later one
    structure       the digest changes exactly when the pass says so, weights are neither lost nor orphaned, every
                    value has the type and shape that the graph declares

The pass that quantizes is compared with the graph before it, given the dequantized weights, with the rounding of
activations and cache switched off. Legalized graphs run kernels that always round: there both sides round,
and are held to the limits of quantized artifacts (see `tolerances.py`).

T tokens, V vocabulary, E experts, K selected experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from moec.analysis.verify import metrics, tolerances
from moec.analysis.verify.interpret import GraphRunner, Override, WeightCache
from moec.analysis.verify.report import Check
from moec.analysis.verify.rounding import perturbed_operators, unrounded_operators, with_weights_of
from moec.analysis.verify.structure import has_target_operators, structure_faults
from moec.analysis.verify.tolerances import Tolerance
from moec.compiler import ops
from moec.compiler.program import Program, Stage, module_path


@dataclass(frozen=True)
class Sample:
    """Token ids to run, split in calls: a prefill, a second chunk and single steps."""

    name: str
    ids: tuple[int, ...]

    def calls(self) -> list[tuple[int, tuple[int, ...]]]:
        """(start position, ids) of each call."""
        n = len(self.ids)
        cuts = sorted({0, (2 * n) // 3, max(n - 2, 0), max(n - 1, 0), n})
        return [(a, self.ids[a:b]) for a, b in pairwise(cuts)]


@dataclass(frozen=True)
class Region:
    """One replaced region: the first new node, the block it belongs to, and how far its results are off.

    `ratio` is in units of the float tolerance, `cosine` the lowest of any row. `rounded`: judged by the cosine.
    """

    node: str
    where: str
    ratio: float
    cosine: float
    rounded: bool

    @property
    def failed(self) -> bool:
        return not self.tolerance.holds(self.value)

    @property
    def value(self) -> float:
        return self.cosine if self.rounded else self.ratio

    @property
    def tolerance(self) -> Tolerance:
        return tolerances.LAYER_MIN_COSINE if self.rounded else tolerances.FLOAT_CLOSE


@dataclass(frozen=True)
class Comparison:
    """One sample through both programs. A tie excuses `explained` tokens of being out of the float tolerance.

    `drift`: 1 - median cosine of the program before with itself, perturbed; 0 when nothing is rounded. `drift_ratio`:
    the same in units of the float tolerance, measured only where `ratio` exceeds it.
    """

    sample: str
    ratio: float
    median_cosine: float
    drift: float
    drift_ratio: float
    explained: int
    tokens: int
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Run:
    logits_TV: np.ndarray
    tied_T: np.ndarray  # whether rounding could have changed a selection of this token
    faults: tuple[str, ...] = field(default=())


def compare_programs(
    before: Program, after: Program, samples: Sequence[Sample], cache: WeightCache | None = None
) -> list[Comparison]:
    """Run both on every sample. The reference is `before`, with the dequantized weights of `after`."""
    rounded = rounds(before, after)
    cache = cache or WeightCache()
    reference = with_weights_of(before, after)
    first = GraphRunner(reference, overrides=None if rounded else unrounded_operators(), cache=cache)
    second = GraphRunner(after, overrides=None if rounded else unrounded_operators(), cache=cache)
    perturbed = GraphRunner(reference, overrides=perturbed_operators(), cache=cache)
    results = []
    for sample in samples:
        a, b = _run(first, sample), _run(second, sample)
        ratio, explained = close_rows(a.logits_TV, b.logits_TV, a.tied_T)
        cosine = metrics.Cosine.of(a.logits_TV, b.logits_TV).median
        drift = drift_ratio = 0.0
        if rounded:
            drift = 1 - metrics.Cosine.of(a.logits_TV, _run(perturbed, sample).logits_TV).median
        elif ratio > 1 and before.stage < Stage.QUANTIZED:
            drift_ratio = close_rows(a.logits_TV, _run(perturbed, sample).logits_TV, a.tied_T)[0]
        tokens = len(sample.ids)
        results.append(Comparison(sample.name, ratio, cosine, drift, drift_ratio, explained, tokens, b.faults))
    return results


def rounds(before: Program, after: Program) -> bool:
    """Whether `after` runs a target's kernels on quantized weights: they round, so `before` must as well."""
    return before.stage >= Stage.QUANTIZED and has_target_operators(after)


def close_rows(reference_TV: np.ndarray, actual_TV: np.ndarray, tied_T: np.ndarray) -> tuple[float, int]:
    """(worst tolerance ratio, rows left out): a row out of tolerance is left out if a tie at or before it explains."""
    explained, worst = 0, 0.0
    after_tie_T = np.logical_or.accumulate(tied_T)
    for row in range(len(reference_TV)):
        ratio = metrics.tolerance_ratio(
            reference_TV[row], actual_TV[row], atol=tolerances.FLOAT_ATOL, rtol=tolerances.FLOAT_RTOL
        )
        if ratio > 1.0 and after_tie_T[row] and np.isfinite(actual_TV[row]).all():
            explained += 1
        else:
            worst = max(worst, ratio)
    return worst, explained


def _run(runner: GraphRunner, sample: Sample) -> _Run:
    runner.reset()
    logits, tied = [], []
    faults: list[str] = []
    for start, ids in sample.calls():
        tied_T = np.zeros(len(ids), dtype=bool)

        def observe(node: Node, args: tuple[Any, ...], value: Any, tied_T: np.ndarray = tied_T) -> None:
            gaps_T = selection_gaps_of(node, args)
            if gaps_T is not None and len(gaps_T) == len(tied_T):
                tied_T |= gaps_T < tolerances.TIE_GAP
            faults.extend(_meta_faults(node, value))

        logits.append(runner(ids, start, observe).numpy())
        tied.append(tied_T)
    return _Run(np.concatenate(logits), np.concatenate(tied), tuple(dict.fromkeys(faults)))


def selection_gaps_of(node: Node, args: tuple[Any, ...]) -> np.ndarray | None:
    """Gap between rank k and k + 1 per token, if `node` selects experts (or groups of them); None otherwise."""
    if node.target is torch.ops.aten.topk.default:
        scores, k = args[0], int(args[1])
        if not isinstance(scores, torch.Tensor) or k >= scores.shape[-1]:
            return None
        gaps = metrics.selection_gaps(scores.reshape(-1, scores.shape[-1]).double().numpy(), k)
        tokens = int(np.prod(scores.shape[:-1]))
        return gaps if tokens == len(gaps) else None
    if ops.RoutedMoe.find(node) is not None:
        scores, k = moe_selection_scores(node, args)
        return metrics.selection_gaps(scores.double().numpy(), k)
    return None


def moe_selection_scores(node: Node, args: tuple[Any, ...]) -> tuple[torch.Tensor, int]:
    """What topk sees inside a fused node, float32 [T, E], and k."""
    moe: ops.RoutedMoe[torch.Tensor] = type(ops.RoutedMoe.of(node))(*args)
    return moe.scores(moe.router_input)[0], moe.top_k


def _meta_faults(node: Node, value: Any) -> Iterable[str]:
    """A value that is not what the graph declares: another dtype, rank or fixed size."""
    declared = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(declared, torch.Tensor):
        return
    sizes = [d if isinstance(d, int) else None for d in declared.shape]
    same = len(sizes) == value.dim() and all(d is None or d == s for d, s in zip(sizes, value.shape, strict=True))
    if not same or declared.dtype != value.dtype:
        yield (
            f"{node.name}: the graph declares {declared.dtype} {list(declared.shape)}, "
            f"it computes {value.dtype} {list(value.shape)}"
        )


# --- each rewrite alone ---------------------------------------------------------------------------------------------


def compare_regions(before: Program, after: Program, sample: Sample, cache: WeightCache | None = None) -> list[Region]:
    """Every new region of `after`, run on the values of `before`, compared where its results enter surviving nodes.

    Nodes survive by name and operator: a pass that edits a graph keeps them. When the graph was traced anew nothing can
    be matched, and the list is empty.
    """
    if after.stage == Stage.CANONICAL and before.stage == Stage.EXPORTED:
        return []  # functionalization traces the graph anew: equal names mean nothing
    old = {n.name: n for n in before.graph.nodes if n.op != "placeholder"}
    survivors = {
        n: old[n.name]
        for n in after.graph.nodes
        if n.name in old and n.op == old[n.name].op and n.target == old[n.name].target
    }
    rounded = rounds(before, after)
    frontier = _frontier(before, after, survivors)
    new = _needed(after, [pair[1] for pair in frontier], survivors)
    if not new:
        return []
    wanted = {b for b, _ in frontier if b.op != "placeholder"}
    wanted |= {survivors[i] for n in new for i in n.all_input_nodes if i in survivors}
    overrides = {} if rounded else unrounded_operators()
    cache = cache or WeightCache()
    old_runner = GraphRunner(with_weights_of(before, after), overrides=overrides, cache=cache)
    values = _observed(old_runner, wanted, sample)
    computed = _computed(GraphRunner(after, cache=cache), new, survivors, values, sample, overrides)
    return _region_rows(frontier, values, computed, rounded)


def _frontier(before: Program, after: Program, survivors: Mapping[Node, Node]) -> list[tuple[Node, Node]]:
    """(value before, new value) wherever a surviving node, or the output, reads something else than it used to."""
    pairs: dict[tuple[Node, Node], None] = {}
    for node, twin in survivors.items():
        mine = _flat_inputs(node) if node.op != "output" else _user_outputs(after, node)
        theirs = _flat_inputs(twin) if twin.op != "output" else _user_outputs(before, twin)
        if len(mine) != len(theirs):
            continue
        for a, b in zip(mine, theirs, strict=True):
            if a is None or b is None or a.op == "placeholder" or survivors.get(a) is b:
                continue
            pairs[(b, a)] = None
    return list(pairs)


def _flat_inputs(node: Node) -> list[Node | None]:
    flat, _ = torch.utils._pytree.tree_flatten((node.args, dict(node.kwargs)))
    return [v if isinstance(v, Node) else None for v in flat]


def _user_outputs(program: Program, output: Node) -> list[Node | None]:
    results = output.args[0]
    assert isinstance(results, (tuple, list))
    specs = program.exported.graph_signature.output_specs
    return [
        r if isinstance(r, Node) else None for s, r in zip(specs, results, strict=True) if s.kind.name == "USER_OUTPUT"
    ]


def _needed(after: Program, results: Sequence[Node], survivors: Mapping[Node, Node]) -> list[Node]:
    """The new nodes that `results` depend on, in graph order; the walk stops at survivors and placeholders."""
    found: set[Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node in found or node in survivors or node.op == "placeholder":
            continue
        found.add(node)
        stack.extend(node.all_input_nodes)
    return [n for n in after.graph.nodes if n in found]


def _observed(runner: GraphRunner, wanted: set[Node], sample: Sample) -> dict[str, Any]:
    names = {n.name for n in wanted}
    values: dict[str, Any] = {}

    def observe(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if node.name in names:
            values[node.name] = value.clone() if isinstance(value, torch.Tensor) else value

    runner(sample.ids, 0, observe)
    return values


def _computed(
    runner: GraphRunner,
    new: Sequence[Node],
    survivors: Mapping[Node, Node],
    values: Mapping[str, Any],
    sample: Sample,
    overrides: Mapping[Any, Override],
) -> dict[Node, Any]:
    """The new nodes, computed from the values of the graph before."""
    inputs = [torch.tensor([list(sample.ids)]), torch.tensor([0])]
    computed: dict[Node, Any] = {}

    def resolve(n: Node) -> Any:
        if n.op == "placeholder":
            return runner.value_of(n, inputs)
        return values[survivors[n].name] if n in survivors else computed[n]

    with torch.no_grad():
        for node in new:
            target: Any = overrides.get(node.target, node.target)
            computed[node] = target(*torch.fx.map_arg(node.args, resolve), **torch.fx.map_arg(node.kwargs, resolve))
    return computed


def _region_rows(
    frontier: Sequence[tuple[Node, Node]], values: Mapping[str, Any], computed: Mapping[Node, Any], rounded: bool
) -> list[Region]:
    rows = []
    for b, a in frontier:
        expected, actual = values.get(b.name), computed.get(a, values.get(a.name))
        ratio = _value_ratio(expected, actual)
        if ratio is None:
            continue
        cosine = _min_cosine(expected, actual) if np.isfinite(ratio) else -1.0
        rows.append(Region(a.name, module_path(a) or module_path(b), ratio, cosine, rounded))
    return rows


def _min_cosine(expected: Any, actual: Any) -> float:
    """Lowest cosine of any row; selections and scalars have none, and are equal here."""
    if not isinstance(expected, torch.Tensor) or not expected.is_floating_point() or not expected.dim():
        return 1.0
    width = expected.shape[-1]
    pair = (t.double().reshape(-1, width).numpy() for t in (expected, actual))
    return float(metrics.row_cosines(*pair).min(initial=1.0))


def _value_ratio(expected: Any, actual: Any) -> float | None:
    """Tolerance ratio of two values of a graph; integers (selections) must be equal as sets; None if not comparable."""
    if isinstance(expected, (tuple, list)) and isinstance(actual, (tuple, list)):
        if len(expected) != len(actual):
            return float("inf")
        ratios = [_value_ratio(e, a) for e, a in zip(expected, actual, strict=True)]
        return max((r for r in ratios if r is not None), default=None)
    if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
        return None
    if expected.shape != actual.shape or expected.is_floating_point() != actual.is_floating_point():
        return float("inf")
    if not expected.is_floating_point():
        if expected.dim():
            expected, actual = expected.sort(-1).values, actual.sort(-1).values
        return 0.0 if torch.equal(expected.long(), actual.long()) else float("inf")
    reference, other = expected.double().numpy(), actual.double().numpy()
    return metrics.tolerance_ratio(reference, other, atol=tolerances.FLOAT_ATOL, rtol=tolerances.FLOAT_RTOL)


# --- the checks of one pass -----------------------------------------------------------------------------------------


def pass_checks(
    name: str,
    before: Program,
    after: Program,
    changed: int,
    samples: Sequence[Sample],
    cache: WeightCache | None = None,
    folded: Collection[str] = (),
) -> list[Check]:
    """All checks of one rewrite, named `pass: check`. `folded`: see `PassResult`."""
    faults = structure_faults(before, after, changed, folded)
    checks = []
    if changed or before.digest() != after.digest():
        comparisons = compare_programs(before, after, samples, cache)
        for c in comparisons:
            faults += c.faults
        checks += _end_to_end(name, comparisons, rounds(before, after))
        regions = compare_regions(before, after, samples[0], cache)
        if regions:
            worst = max(regions, key=lambda r: (r.failed, r.ratio))
            where = f"{worst.where} {worst.node}".strip()
            wrong = sum(r.failed for r in regions)
            detail = f"{wrong} of {len(regions)} regions wrong" if wrong else f"{len(regions)} regions"
            checks.append(Check(f"{name}: each rewrite alone", worst.value, worst.tolerance, where, detail))
    if after.last_token is not None and before.last_token is None:
        checks.append(_last_token_check(name, after, after.last_token, samples, cache))
    checks.append(Check(f"{name}: structure", float(len(faults)), tolerances.NO_FAULTS, detail="; ".join(faults[:3])))
    return checks


def _last_token_check(
    name: str, every: Program, last: Program, samples: Sequence[Sample], cache: WeightCache | None
) -> Check:
    """The method for the last token of each call against the last row of all of them."""
    runners = [GraphRunner(program, cache=cache or WeightCache()) for program in (every, last)]
    worst, cosine, place = 0.0, 1.0, ""
    for sample in samples:
        for runner in runners:
            runner.reset()
        for start, ids in sample.calls():
            rows, row = (runner(ids, start).numpy() for runner in runners)
            untied = np.zeros(1, dtype=bool)
            ratio = close_rows(rows[-1:], row, untied)[0] if row.shape == (1, rows.shape[1]) else float("inf")
            cosine = min(cosine, float(metrics.row_cosines(rows[-1:], row).min())) if np.isfinite(ratio) else -1.0
            if ratio >= worst:
                worst, place = ratio, sample.name
    if every.stage >= Stage.QUANTIZED and has_target_operators(
        every
    ):  # kernels that round INT8 rows of the head's input
        return Check(f"{name}: last token", cosine, tolerances.LAYER_MIN_COSINE, place)
    return Check(f"{name}: last token", worst, tolerances.FLOAT_CLOSE, place)


def _end_to_end(name: str, comparisons: Sequence[Comparison], rounded: bool) -> list[Check]:
    if rounded:
        lowest = min(comparisons, key=lambda c: c.median_cosine + c.drift)
        limit = tolerances.beyond_drift(tolerances.MEDIAN_COSINE, lowest.drift)
        return [Check(f"{name}: end to end", lowest.median_cosine, limit, lowest.sample)]
    worst = max(comparisons, key=lambda c: c.ratio / max(c.drift_ratio, 1.0))
    limit = tolerances.deep_float(worst.drift_ratio) if worst.drift_ratio else tolerances.FLOAT_CLOSE
    explained, total = sum(c.explained for c in comparisons), sum(c.tokens for c in comparisons)
    detail = f"{explained} of {total} tokens left out after a tie" if explained else ""
    return [
        Check(f"{name}: end to end", worst.ratio, limit, worst.sample, detail),
        Check(f"{name}: tokens compared", 1 - explained / total, tolerances.COMPARED),
    ]
