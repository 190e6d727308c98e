"""The parts of a model whose bits are chosen, and what each format costs: divergence and bytes.

A part is a weight, or all weights of a fused MoE layer, which one kernel reads. Its divergence is measured: the float
model runs on text, and beside it a copy for each part that reads this part's codes instead, from the part's layer on.
The copies go through the layers together, so one layer is in memory (`streaming.py`). Other formats of the part are
judged from the one that was measured by their squared errors: for small errors the divergence grows as they do.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from moec.analysis.calibration.streaming import Call, LayerStream, Stretch
from moec.compiler.ops import fused_moe
from moec.compiler.program import Program
from moec.compiler.progress import Progress
from moec.compiler.quantizer import GROUP_SIZES, codes_of, last_axis
from moec.compiler.spec.quantization import Quantization, WeightType, scheme_of_type
from moec.compiler.weights import LazyWeight
from moec.passes.quantize_weights import Read, reads

TYPES: tuple[WeightType, ...] = ("nl3", "int4", "iq4_nl", "int8")
Format = tuple[WeightType, int]  # of codes: type and group size
_SAMPLE = 1 << 16  # elements of a weight whose rounding error stands for all
_LEAST = 1e-9  # nats: a part that does not show still costs more in a coarser format


@dataclass(frozen=True)
class Part:
    """Weights that are stored alike, by name with their reads, and where they are read first."""

    name: str
    weights: tuple[Read, ...]
    nodes: frozenset[Node]


@dataclass(frozen=True)
class Choice:
    """A format of a part: its type and group size, the divergence it is expected to cost in nats, its bytes."""

    weights: WeightType
    group_size: int
    kld: float
    bytes: int

    def __str__(self) -> str:
        return f"{self.weights} g{self.group_size}"


def parts_of(program: Program, quantization: Quantization) -> list[Part]:
    """Every part of `program` (stage FUSED) that `quantization` computes codes for, in the order of the graph."""
    planned = [r for r in reads(program, quantization) if program.weights[r.name].stored is None]
    by_name: dict[str, list[Read]] = {}
    for read in planned:
        key = read.node.name if read.node.target is fused_moe else read.name
        by_name.setdefault(key, []).append(read)
    found = []
    for together in by_name.values():
        own = tuple({r.name: r for r in together}.values())
        found.append(Part(own[0].name, own, frozenset(r.node for r in together)))
    return found


def formats_of(part: Part, program: Program) -> list[Format]:
    """Types and group sizes that the part's widths allow."""
    widths = []
    for read in part.weights:
        shape = program.weights[read.name].shape
        widths.append(shape[-1] if last_axis(read.orientation) == read.scheme.axis else shape[-2])
    return [(kind, size) for kind in TYPES for size in GROUP_SIZES if all(w % size == 0 for w in widths)]


def relative_errors(part: Part, program: Program, formats: Sequence[Format]) -> dict[Format, float]:
    """The squared rounding error of each format, summed over a sample of the part's weights."""
    total = dict.fromkeys(formats, 0.0)
    for read in part.weights:
        w = program.weights[read.name].load()
        if last_axis(read.orientation) != read.scheme.axis:
            w = w.transpose(-1, -2)
        rows = w.reshape(-1, w.shape[-1])
        share = max(1, rows.numel() // _SAMPLE)
        sample = rows[::share].to(torch.float32)
        weight = LazyWeight(tuple(sample.shape), torch.float32, lambda sample=sample: sample)  # type: ignore[misc]
        for kind, size in formats:
            coded = codes_of(weight, scheme_of_type(kind, size, "in"), method="search").dequantize()
            total[kind, size] += share * float((coded - sample).square().sum())
    return total


def measure_parts(
    program: Program,
    parts: Sequence[Part],
    coded: Callable[[str], Tensor],
    texts: Sequence[Sequence[int]],
    progress: Progress,
) -> list[float]:
    """KL(float || with this part's codes) in nats, the mean over all tokens of `texts`, for each part alone.

    coded: the values that a weight's codes stand for, as the float program reads it.
    """
    stream = LayerStream(program, texts, result=True)
    stretches = list(stream)
    branches: list[tuple[Part, list[Call]]] = []
    with torch.no_grad(), progress.stage("measure parts", len(stretches)) as step:
        for stretch in stretches[:-1]:
            branches += [(p, stream.branch()) for p in parts if _begins(p, stretch, stretches)]
            plain: dict[str, Tensor] = {}
            _advance(stream, stretch, stream.calls, plain)
            for part, calls in branches:
                _advance(stream, stretch, calls, _overridden(part, stretch, coded, plain))
            step(f"{len(branches)} of {len(parts)} parts")
        last, plain = stretches[-1], {}
        branches += [(p, stream.branch()) for p in parts if _begins(p, last, stretches)]
        _advance(stream, last, stream.calls, plain)
        expected = [functional.log_softmax(logits_TV, -1) for logits_TV in stream.results()]
        found = {}
        for part, calls in branches:
            _advance(stream, last, calls, _overridden(part, last, coded, plain))
            found[part.name] = _divergence(expected, [functional.log_softmax(x, -1) for x in stream.results(calls)])
            calls.clear()
        step(f"{len(parts)} parts")
    return [found[part.name] for part in parts]


def _begins(part: Part, stretch: Stretch, stretches: Sequence[Stretch]) -> bool:
    """Whether this is the first stretch that reads the part."""
    return next(s for s in stretches if part.nodes & set(s.nodes)) is stretch


def _overridden(
    part: Part, stretch: Stretch, coded: Callable[[str], Tensor], plain: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    own = {r.name: coded(r.name) for r in part.weights} if part.nodes & set(stretch.nodes) else {}
    return {**plain, **own}


def _advance(stream: LayerStream, stretch: Stretch, calls: list[Call], weights: dict[str, Tensor]) -> None:
    if stream.joint(stretch) is None:
        stream.run(stretch, lambda node, args: None, calls=calls, weights=weights)
    else:
        stream.run_joint(stretch, calls=calls, weights=weights)


def _divergence(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    total = sum(
        float(functional.kl_div(q, p, log_target=True, reduction="sum")) for p, q in zip(expected, found, strict=True)
    )
    return total / sum(map(len, expected))


def choices_of(
    kld: float,
    errors: Mapping[Format, float],
    bytes_of: Callable[[WeightType, int], int],
    measured: Format,
    held: Sequence[Format],
) -> tuple[Choice, ...]:
    """What each format of a part costs, the fewest bytes first; what costs more in both is left out.

    kld: of the format `measured`. held: the formats that the target's kernels for the part read.
    """
    base = max(errors[measured], 1e-30)
    every = [
        Choice(kind, size, max(kld, _LEAST) * error / base, bytes_of(kind, size))
        for (kind, size), error in errors.items()
        if (kind, size) in held
    ]
    kept: list[Choice] = []
    for choice in sorted(every, key=lambda c: (c.bytes, c.kld)):
        if not kept or choice.kld < kept[-1].kld:
            kept.append(choice)
    return tuple(kept)
