"""From a spec to one whose bits fit a given size with the least divergence: measuring, solving, writing.

Measurements are cached (MOEC_CALIBRATION_DIR) under a digest of weights, graph, text and settings, so that another size
takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moec.analysis.bits.parts import (
    Choice,
    Format,
    Part,
    choices_of,
    formats_of,
    measure_parts,
    parts_of,
    relative_errors,
)
from moec.analysis.bits.solve import least_bytes, least_divergence
from moec.analysis.calibration.calibrate import weights_digest
from moec.analysis.calibration.results import cache_folder
from moec.analysis.calibration.texts import calibration_texts
from moec.analysis.plan.memory import file_bytes, memory
from moec.analysis.plan.planner import model_of
from moec.compiler import build
from moec.compiler.architecture import Weight
from moec.compiler.errors import CompileError, UserError
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program
from moec.compiler.progress import Progress
from moec.compiler.quantizer import find_quantizer, last_axis
from moec.compiler.source import Checkpoint
from moec.compiler.spec import Spec
from moec.compiler.spec.device import Device
from moec.compiler.spec.methods import AUTO
from moec.compiler.spec.quantization import (
    Calibration,
    Quantization,
    RoleQuantization,
    WeightScheme,
    WeightType,
    scheme_of_type,
)

FORMAT = 3
BASE: Format = ("int4", 32)  # in which every part is measured
TOKENS = 512  # that parts are measured on, in sequences of LENGTH
LENGTH = 256
_MANIFEST = 32768  # bytes of an artifact beside the program and the files of its tokenizer
_ROLES = ("embedding", "head", "experts", "shared", "attention", "ffn")


@dataclass(frozen=True)
class Sizes:
    """Bytes of an artifact beside the weights whose bits are chosen, and the most that all of it may have."""

    fixed: int
    room: int | None


@dataclass(frozen=True)
class Costs:
    """What each part may be stored as. `names`: of its weights. `base`: its bytes in BASE, which may be no choice: a
    format of as many bytes that diverges less takes its place."""

    names: tuple[tuple[str, ...], ...]
    choices: tuple[tuple[Choice, ...], ...]
    base: tuple[int, ...]


@dataclass(frozen=True)
class Chosen:
    """The result: a choice for each part of `costs`, the spec with them, and the bytes that its artifact has."""

    spec: Spec
    costs: Costs
    choices: tuple[Choice, ...]
    bytes: int

    @property
    def kld(self) -> float:
        """The divergence that the parts' own add up to, in nats."""
        return sum(choice.kld for choice in self.choices)


def check_open(spec: Spec) -> Quantization:
    """The quantization of a spec whose bits can be chosen; UserError for one without."""
    if spec.quantization is None:
        raise UserError("says quantization: none", place=spec.name, remedy="give it a quantization section")
    return spec.quantization


def base_quantization(quantization: Quantization) -> Quantization:
    """Every part in BASE; what the spec keeps in fp32 stays so."""
    kind, size = BASE
    coded = RoleQuantization(weights=kind, group_size=size)  # type: ignore[arg-type]
    given: dict[str, Any] = {"weights": quantization.weights, "group_size": size}
    if quantization.weights != "fp32":
        given["weights"] = coded.weights
    for role in _ROLES:
        override = getattr(quantization, role)
        given[role] = None if override is None else override if override.weights == "fp32" else coded
    kept = {name: o for name, o in quantization.tensors.items() if o.weights == "fp32"}
    return quantization.model_copy(update={**given, "tensors": kept})


def measured(spec: Spec, store: Checkpoint, target: str, progress: Progress) -> Costs:
    """The choices of every part, measured or found again. CompileError where codes are stored already."""
    quantization = base_quantization(check_open(spec))
    if quantization.method != AUTO and (refines := find_quantizer(quantization.method).refines) is not None:
        # what fitting all parts together gains says nothing about one
        quantization = quantization.model_copy(update={"method": refines})
    base = spec.model_copy(update={"quantization": quantization})
    program, passes = build.program_and_passes(base, store, target, progress)
    names = [p.name for p in passes]
    end = names.index("quantize_weights")
    begin = names.index("calibrate_weights") if "calibrate_weights" in names else end
    floats = run_passes(program, passes[:begin])
    stored = next((name for name, w in floats.weights.items() if w.stored is not None), None)
    if stored is not None:
        raise CompileError(
            "the checkpoint stores codes, so their bits cannot be chosen",
            place=stored,
            remedy="give the float checkpoint",
        )
    parts = parts_of(floats, quantization)
    texts = _texts(quantization, floats, store)
    footprint, options = build_footprint(spec, target)
    file = cache_folder() / f"parts-{_key(floats, quantization, texts, (target, repr(options)), progress)}.json"
    if (known := _read(file)) is not None:
        return known
    coded = run_passes(floats, passes[begin : end + 1])

    def values(name: str) -> Tensor:
        held = coded.quantized[name]
        value = held.dequantize(coded.weights)
        return value if held.unscaled is None else held.unscaled(value)

    klds = measure_parts(floats, parts, values, texts, progress)
    choices, in_base = [], []
    for part, kld in progress.each("compare formats", list(zip(parts, klds, strict=True))):
        errors = relative_errors(part, floats, formats_of(part, floats))
        held = [
            (kind, size)
            for kind, size in errors
            if all(footprint.holds(w, s, options) for w, s in _stored(part, floats, kind, size))
        ]

        def bytes_of(kind: WeightType, size: int, part: Part = part) -> int:
            return sum(footprint.weight_bytes(w, s, options) for w, s in _stored(part, floats, kind, size))

        choices.append(choices_of(kld, errors, bytes_of, BASE, held))
        in_base.append(bytes_of(*BASE))
    costs = Costs(tuple(tuple(r.name for r in p.weights) for p in parts), tuple(choices), tuple(in_base))
    _write(file, costs)
    return costs


def build_footprint(spec: Spec, target: str) -> tuple[Any, Any]:
    """What a target says of its sizes, and the spec's options for it. UserError for a target without."""
    name, options = build.chosen_target(spec, target)
    model = model_of(spec, name, options)
    return model.footprint, model.options


def _stored(part: Part, program: Program, kind: WeightType, size: int) -> list[tuple[Weight, WeightScheme]]:
    """The part's weights as the planner counts them."""
    found = []
    for read in part.weights:
        *stack, a, b = program.weights[read.name].shape
        rows, columns = (a, b) if last_axis(read.orientation) == "in" else (b, a)
        role = program.roles[read.name].value
        weight = Weight(role, read.name, stack[0] if stack else 1, rows, columns)
        found.append((weight, scheme_of_type(kind, size, read.scheme.axis)))
    return found


def sizes(
    spec: Spec, store: Checkpoint, target: str, costs: Costs, *, most: int | None, device: Device | None
) -> Sizes:
    """Bytes beside the parts, and the room for the whole artifact: `most` bytes, or what a device leaves for it."""
    base = spec.model_copy(update={"quantization": base_quantization(check_open(spec))})
    name, options = build.chosen_target(spec, target)
    model = model_of(base, name, options)
    coded = sum(costs.base)
    fixed = file_bytes(model) - coded + build.companion_bytes(store) + _MANIFEST
    rooms = [] if most is None else [most]
    if device is not None:
        whole = memory(model, model.architecture.context)
        # what runs beside the weights is the same whatever their bits
        rooms.append(fixed + coded + device.budget - whole.peak)
    return Sizes(fixed, min(rooms) if rooms else None)


def choose(spec: Spec, costs: Costs, given: Sizes, *, max_kld: float | None = None) -> Chosen:
    """The best choices within the room; without one, the fewest bytes whose divergence is expected within `max_kld`.

    UserError where no mixture fits, with the least that is possible.
    """
    if given.room is not None:
        found = least_divergence(costs.choices, given.room - given.fixed)
        if found is None:
            least = given.fixed + sum(choices[0].bytes for choices in costs.choices)
            raise UserError(
                f"no mixture of bits makes it {given.room / 1e6:.1f} MB: the smallest has {least / 1e6:.1f} MB",
                place=spec.name,
                remedy=f"give at least {_up(least)} MB, or a smaller model",
            )
    else:
        assert max_kld is not None
        found = least_bytes(costs.choices, max_kld)
        if found is None:
            least_kld = sum(choices[-1].kld for choices in costs.choices)
            raise UserError(
                f"no mixture of bits is expected to stay within {max_kld:g} nats: the finest costs {least_kld:.4f}",
                place=spec.name,
                remedy="allow more, or keep roles in fp32",
            )
    total = given.fixed + sum(choice.bytes for choice in found)
    chosen = with_choices(check_open(spec), costs, found)
    return Chosen(spec.model_copy(update={"quantization": chosen}), costs, tuple(found), total)


def _up(size: int) -> str:
    return f"{-(-size // 100_000) / 10:.1f}"


def with_choices(quantization: Quantization, costs: Costs, choices: Sequence[Choice]) -> Quantization:
    """`quantization` with the choices as exceptions by name."""
    base = base_quantization(quantization)
    tensors: dict[str, RoleQuantization] = {}
    for pattern, choice in patterns(costs.names, choices):
        if (choice.weights, choice.group_size) != BASE or "*" not in pattern:
            given = {"weights": choice.weights, "group_size": choice.group_size}
            tensors[pattern] = RoleQuantization.model_validate(given)
    return base.model_copy(update={"tensors": {**tensors, **base.tensors}})


def patterns(names: Sequence[Sequence[str]], choices: Sequence[Choice]) -> list[tuple[str, Choice]]:
    """Patterns of names, of which the last that matches decides: one for the weight of all layers, then exceptions."""
    kinds: dict[str, list[tuple[str, Choice]]] = {}
    for own, choice in zip(names, choices, strict=True):
        for name in own:
            kinds.setdefault(_kind(name), []).append((name, choice))
    general, single = [], []
    for kind, members in kinds.items():
        counted: dict[Format, list[Choice]] = {}
        for _, choice in members:
            counted.setdefault((choice.weights, choice.group_size), []).append(choice)
        usual = max(counted.values(), key=len)[0]
        general.append((kind, usual))
        single += [(n, c) for n, c in members if (c.weights, c.group_size) != (usual.weights, usual.group_size)]
    return [*general, *single]


def _kind(name: str) -> str:
    return ".".join("*" if word.isdigit() else word for word in name.split("."))


# --- what is kept -----------------------------------------------------------------------------------------------------


def _texts(quantization: Quantization, program: Program, store: Checkpoint) -> list[tuple[int, ...]]:
    """Beginnings of sequences of the calibration text, evenly from all of it, together about TOKENS."""
    given = quantization.calibration or Calibration()
    encode = build.text_encoder(store)(program)
    found = calibration_texts(given, encode, bos_id=program.info.bos_id, context=program.info.context)
    count = max(1, TOKENS // LENGTH)
    long = [s for s in found.sequences if len(s) >= LENGTH] or list(found.sequences)
    chosen = [long[(2 * i + 1) * len(long) // (2 * count)] for i in range(min(count, len(long)))]
    return [s[:LENGTH] for s in chosen]


def _key(
    program: Program,
    quantization: Quantization,
    texts: Sequence[Sequence[int]],
    target: tuple[str, str],
    progress: Progress,
) -> str:
    """A digest of everything that divergences and bytes depend on. target: its name and options."""
    digest = hashlib.sha256()
    said = [FORMAT, *target, quantization.model_dump(mode="json"), [list(t) for t in texts]]
    digest.update(json.dumps(said, sort_keys=True).encode())
    digest.update(weights_digest(program, progress))
    return digest.hexdigest()[:32]


def _read(file: Path) -> Costs | None:
    try:
        raw = json.loads(file.read_text("utf-8"))
        names = tuple(tuple(map(str, n)) for n in raw["names"])
        choices = tuple(tuple(Choice(**c) for c in part) for part in raw["choices"])
        base = tuple(map(int, raw["base"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Costs(names, choices, base)


def _write(file: Path, costs: Costs) -> None:
    part = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(asdict(costs)), "utf-8")
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        what = f"what was measured cannot be kept: {error.strerror}"
        raise UserError(what, place=str(file), remedy="set MOEC_CALIBRATION_DIR to a folder with room") from error
