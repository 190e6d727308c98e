"""The pass that calibrates: weights of a Program get codes by a method that observes inputs.

    W            ->  the same weight with `stored` codes, which quantize_weights carries into the graph
    gain, W, ... ->  weights whose channels were scaled (`balance.py`): the float model is the same

The graph does not change, and nothing is computed before a weight is read: then the whole model is calibrated, once,
and the results are kept (`results.py`). `method: auto` computes several and keeps the one of least divergence from the
float model on text that was held out.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moec.analysis.calibration import results
from moec.analysis.calibration.balance import links_of, stacks_in_out, with_factors
from moec.analysis.calibration.distill import distill, settings
from moec.analysis.calibration.engine import Coverage, Engine, Method
from moec.analysis.calibration.results import Results, Writer
from moec.analysis.calibration.streaming import LayerStream
from moec.analysis.calibration.texts import Texts, calibration_texts
from moec.compiler.errors import CompileError
from moec.compiler.ops import fused_moe
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Program, Role, Stage
from moec.compiler.progress import Progress
from moec.compiler.quantizer import find_quantizer, format_of, last_axis
from moec.compiler.spec.methods import AUTO
from moec.compiler.spec.quantization import Calibration, Quantization
from moec.compiler.weights import LazyWeight, Provenance, StoredCodes
from moec.passes.quantize_weights import Read, reads

CANDIDATES = ("rtn", "weighted", "gptq", "awq", "awq_gptq")
_HELD_OUT = 8  # one of so many sequences judges the candidates of `auto`, and calibrates none
_JUDGED_LOGITS = 1 << 26  # logits kept to judge: 256 MB
_PARTS = 1 << 20  # tensors are hashed in pieces


def needs_calibration(quantization: Quantization | None) -> bool:
    """Whether the method of a spec observes inputs."""
    if quantization is None:
        return False
    return quantization.method == AUTO or find_quantizer(quantization.method).observes is not None


def calibrate_weights(
    quantization: Quantization, encode: Callable[[Program], Callable[[str], list[int]]], progress: Progress
) -> Pass:
    """FUSED -> FUSED. `encode` gives the tokenizer of the program's model."""
    return Pass(
        "calibrate_weights", lambda p: _run(p, quantization, encode, progress), needs=Stage.FUSED, gives=Stage.FUSED
    )


def _run(
    program: Program,
    quantization: Quantization,
    encode: Callable[[Program], Callable[[str], list[int]]],
    progress: Progress,
) -> PassResult:
    planned = {r.name: r for r in reads(program, quantization) if program.weights[r.name].stored is None}
    if not planned:
        return PassResult(program, 0)
    work = _Calibrated(program, quantization, encode, progress)
    weights = dict(program.weights)
    for name in _scalable(program):
        weights[name] = work.scaled(name)
    for name, read in planned.items():
        weights[name] = replace(work.scaled(name), stored=work.codes(read))
    return PassResult(replace(program, weights=weights, calibration=work.report), 0)


def _is_open(program: Program, name: str) -> bool:
    """Whether a weight has no codes yet."""
    return program.weights[name].stored is None


def _scalable(program: Program) -> set[str]:
    """Float weights that the scaling of channels may touch, beside those that become codes."""
    names: set[str] = set()
    for link in links_of(program):
        names |= set(link.outs)
        for node in link.readers:
            names |= {n for a in node.all_input_nodes if (n := program.weight_of(a)) is not None}
    for node in program.graph.nodes:
        if node.target is fused_moe:
            names |= {n for a in node.all_input_nodes if (n := program.weight_of(a)) is not None}
    return names


def _refined(quantization: Quantization) -> str | None:
    """The method whose codes that of a spec begins with."""
    return None if quantization.method == AUTO else find_quantizer(quantization.method).refines


def weights_digest(program: Program, progress: Progress) -> bytes:
    """SHA-256 of the graph and of every weight, all of which are read."""
    digest = hashlib.sha256(program.text().encode())
    with progress.stage("hash weights", 1):
        for name in sorted(program.weights):
            if program.roles.get(name) is not Role.CACHE:
                digest.update(name.encode())
                flat = program.weights[name].load().contiguous().view(-1).view(torch.uint8)
                for part in flat.split(_PARTS):
                    digest.update(part.numpy())
    return digest.digest()


def _least(measured: Mapping[str, float], model: str) -> str:
    """The method of the least divergence. CompileError if none has a finite one: no number can tell them apart."""
    finite = {name: kld for name, kld in measured.items() if math.isfinite(kld)}
    if finite:
        return min(finite, key=finite.__getitem__)
    raise CompileError(
        "no method's divergence from the float model is finite",
        place=f"{model}: quantization.method: auto",
        remedy="name one method, and look at what the model gives for the calibration text",
    )


class _Calibrated:
    """The results of one calibration, computed or found when the first weight is read."""

    def __init__(
        self,
        program: Program,
        quantization: Quantization,
        encode: Callable[[Program], Callable[[str], list[int]]],
        progress: Progress,
    ) -> None:
        self._program, self._quantization, self._encode, self._progress = program, quantization, encode, progress
        self._given = quantization.calibration or Calibration()
        self._in_out = stacks_in_out(program)

    def codes(self, read: Read) -> StoredCodes:
        """The codes of a weight, to be computed."""
        return StoredCodes(
            format_of(read.scheme),
            lambda: self._results.codes(read.name),
            Provenance("computed", self._quantization.method),
            transposed=last_axis(read.orientation) != read.scheme.axis,
            unscaled=lambda value: self._unscaled(read, value),
        )

    def _unscaled(self, read: Read, value: Tensor) -> Tensor:
        rows, columns = (None if f is None else 1.0 / f for f in self._results.factors(read.name))
        return with_factors(value, rows, columns, in_out=read.orientation == "in_out")

    def scaled(self, name: str) -> LazyWeight:
        """The float weight, its channels scaled as the chosen method wants it."""
        original = self._program.weights[name]
        in_out = name in self._in_out

        def load() -> Tensor:
            return with_factors(original.load(), *self._results.factors(name), in_out=in_out)

        return replace(original, load=load, stored=None)

    def report(self) -> Mapping[str, Any]:
        """What was observed, and how the method was chosen."""
        return {"method": self._results.method, **self._results.report}

    @cached_property
    def _results(self) -> Results:
        program = self._program
        texts = calibration_texts(
            self._given, self._encode(program), bos_id=program.info.bos_id, context=program.info.context
        )
        return self._found(self._quantization, texts)

    def _found(self, quantization: Quantization, texts: Texts) -> Results:
        """The results of an earlier run, or those that are computed now."""
        key = self._key(quantization, texts)
        if (known := results.find(key)) is not None:
            return known
        refines = _refined(quantization)
        if refines is None:
            self._compute(key, texts)
        else:
            first = self._found(quantization.model_copy(update={"method": refines}), texts)
            self._refine(key, first, texts)
        results.forget_old()
        found = results.find(key)
        assert found is not None
        return found

    def _refine(self, key: str, first: Results, texts: Texts) -> None:
        """The codes of `first`, with scales and gains fitted to the predictions of the float model."""
        planned = {r.name: r for r in reads(self._program, self._quantization) if _is_open(self._program, r.name)}
        with results.new(key) as folder:
            writer = Writer.after(first, folder)
            done = distill(self._program, planned, first, writer, texts.sequences, self._progress)
            writer.close(self._quantization.method, {**first.report, "distilled": done})

    @cached_property
    def _digest(self) -> bytes:
        return weights_digest(self._program, self._progress)

    def _key(self, quantization: Quantization, texts: Texts) -> str:
        """A digest of everything that the results depend on; every weight is read."""
        digest = hashlib.sha256()
        given = quantization.model_dump(mode="json")
        # what may stay uncalibrated decides whether there are results at all
        given["calibration"] = {
            "least": self._given.tokens_per_expert,
            "uncalibrated": sorted(self._given.uncalibrated),
        }
        if _refined(quantization) is not None:
            given["distilled"] = settings()
        digest.update(json.dumps([results.FORMAT, given, texts.sequences], sort_keys=True).encode())
        digest.update(self._digest)
        return digest.hexdigest()[:32]

    def _compute(self, key: str, texts: Texts) -> None:
        auto = self._quantization.method == AUTO
        names = CANDIDATES if auto else (self._quantization.method,)
        judged = texts.sequences[_HELD_OUT - 1 :: _HELD_OUT] if auto else ()
        judged = judged or (texts.sequences[:1] if auto else ())
        used = tuple(s for s in texts.sequences if s not in judged) or texts.sequences
        coverage = Coverage(self._given.tokens_per_expert, frozenset(self._given.uncalibrated))
        with results.new(key) as folder:
            methods = []
            for name in names:
                (folder / name).mkdir()
                methods.append(Method(find_quantizer(name), Writer(folder / name)))
            engine = Engine(self._program, self._quantization, used, methods, coverage, self._progress)
            engine.run()
            report = {"domains": texts.domains, **engine.report}
            for name, method in zip(names, methods, strict=True):
                method.writer.close(name, report)
            if auto:
                report["measured"] = self._measured({n: Results(folder / n) for n in names}, judged)
                best = _least(report["measured"], self._program.info.name)
            else:
                best = names[0]
            methods[names.index(best)].writer.close(best, report)
            for file in (folder / best).iterdir():
                file.rename(folder / file.name)
            for name in names:
                shutil.rmtree(folder / name)

    @torch.no_grad()
    def _measured(self, candidates: Mapping[str, Results], texts: tuple[tuple[int, ...], ...]) -> dict[str, float]:
        """Mean divergence KL(float || quantized) in nats on held-out text, by method; weights alone are rounded."""
        room, kept = _JUDGED_LOGITS // self._program.info.vocab_size, []
        for sequence in texts:
            kept.append(sequence[: max(0, room)])
            room -= len(kept[-1])
        kept = [s for s in kept if s]
        reference = list(_logits(self._program, kept))
        found = {}
        with self._progress.stage("compare methods", len(candidates)) as step:
            for name, candidate in candidates.items():
                total = count = 0.0
                for float_TV, given_TV in zip(reference, _logits(self._with(candidate), kept), strict=True):
                    p, q = functional.log_softmax(float_TV, -1), functional.log_softmax(given_TV, -1)
                    total += float(functional.kl_div(q, p, log_target=True, reduction="sum"))
                    count += len(float_TV)
                found[name] = round(total / count, 5)
                step(name)
        return found

    def _with(self, candidate: Results) -> Program:
        """The float program with the dequantized codes of a candidate."""
        program = self._program
        weights = dict(program.weights)
        planned = {r.name: r for r in reads(program, self._quantization) if program.weights[r.name].stored is None}
        for name in _scalable(program) - set(planned):
            weights[name] = _lazy(
                weights[name],
                lambda n=name: with_factors(  # type: ignore[misc]
                    program.weights[n].load(), *candidate.factors(n), in_out=n in self._in_out
                ),
            )
        for name, read in planned.items():
            turned = last_axis(read.orientation) != read.scheme.axis

            def load(name: str = name, turned: bool = turned) -> Tensor:
                value = candidate.codes(name).dequantize()
                return value.transpose(-1, -2) if turned else value

            weights[name] = _lazy(weights[name], load)
        return replace(program, weights=weights)


def _lazy(weight: LazyWeight, load: Callable[[], Tensor]) -> LazyWeight:
    return LazyWeight(weight.shape, weight.dtype, load)


def _logits(program: Program, texts: list[tuple[int, ...]]) -> list[Tensor]:
    stream = LayerStream(program, texts, result=True)
    for stretch in stream:
        if stream.joint(stretch) is None:
            stream.run(stretch, lambda node, args: None)
        else:
            stream.run_joint(stretch)
    return list(stream.results())
