"""How a rewrite is tested: `check_rule` for what must match, `check_refused` for what must not.

A golden text is the program after the rule, as `Program.text()` prints it, in tests/golden/NAME.txt. After a wanted
change rewrite them all with

    MOEC_UPDATE_GOLDEN=1 python -m pytest tests/passes

and read the difference before committing it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moec.analysis.verify.weights import adversarial_weights
from moec.compiler.dialect import check_dialect
from moec.compiler.export import assemble, export_module, zeros
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import LazyWeight, ModelInfo, Program, Role
from moec.passes.canonicalize import canonicalize
from tests.interpreter import Interpreter

GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("MOEC_UPDATE_GOLDEN") == "1"

# A rewrite reorders fp32 sums: values of order one differ by a few units of 2^-23 per sum of up to a hundred terms. The
# same bounds that the finished artifact must meet; a wrong formula is off by more than 1e-2 with these weights.
ATOL, RTOL = 1e-5, 1e-4

# (tokens, start position): a prompt, single steps, a chunk, and a second sequence that begins anew
CALLS = ((7, 0), (1, 7), (2, 8), (1, 10), (2, 0), (1, 2))

CONTEXT = 24
MAX_TOKENS = 8
VOCABULARY = 40


def export_toy(build: Callable[[], nn.Module], roles: Mapping[str, Role] | None = None, *, seed: int = 0) -> Program:
    """Export a module `forward(tokens [1, T], start_pos [1])` with adversarial random weights, at stage CANONICAL.

    Roles are by name, a cache is a buffer whose name ends in `cache`; other buffers keep their values as constants.
    """
    roles = dict(roles or {})
    real = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = build()
    exported = export_module(module, context=CONTEXT, max_tokens=MAX_TOKENS)
    shapes = {n: tuple(p.shape) for n, p in real.named_parameters()}
    weights = adversarial_weights(shapes, roles, seed=seed)
    for name, parameter in real.named_parameters():
        if parameter.dtype != torch.float32:
            weights[name] = _cast(weights[name], parameter.dtype)
    for name, buffer in real.named_buffers():
        cache = name.endswith("cache")
        roles.setdefault(name, Role.CACHE if cache else Role.CONSTANT)
        shape = tuple(buffer.shape)
        weights[name] = zeros(shape) if cache else LazyWeight(shape, buffer.dtype, lambda b=buffer: b)  # type: ignore[misc]
    info = ModelInfo("toy", VOCABULARY, CONTEXT, MAX_TOKENS)
    return run(canonicalize(), assemble(exported, weights, roles, info)).program


def _cast(weight: LazyWeight, dtype: torch.dtype) -> LazyWeight:
    return LazyWeight(weight.shape, dtype, lambda: weight.load().to(dtype))


def run(rule: Pass, program: Program) -> PassResult:
    """One pass, without the loop's checks."""
    return rule.run(program)


def outputs(program: Program, *, seed: int = 0) -> list[Tensor]:
    """What `program` returns for random tokens in every call of `CALLS`; its caches live on between the calls."""
    generator = torch.Generator().manual_seed(seed)
    interpreter = Interpreter(program)
    results = []
    for tokens, start in CALLS:
        ids = torch.randint(0, program.info.vocab_size, (1, tokens), generator=generator)
        results.append(interpreter(ids, torch.tensor([start])))
    return results


def check_equal(before: Program, after: Program, *, atol: float = ATOL, rtol: float = RTOL) -> None:
    """Both programs give the same values, for every token count and start position of `CALLS`."""
    for (tokens, start), wanted, got in zip(CALLS, outputs(before), outputs(after), strict=True):
        assert torch.isfinite(wanted).all(), "the example overflows: it proves nothing"
        assert wanted.dtype == got.dtype
        where = f"{tokens} tokens from {start}: "
        torch.testing.assert_close(got, wanted, atol=atol, rtol=rtol, msg=lambda text, where=where: where + text)


def check_rule(
    rule: Pass,
    program: Program,
    *,
    count: int,
    golden: str | None = None,
    contains: Sequence[str] = (),
    atol: float = ATOL,
    rtol: float = RTOL,
) -> Program:
    """The rule rewrites `program` `count` times, correctly; returns the result.

    Checked: the number of rewrites, no refusals, the golden text, values before and after, that every node's declared
    type and fixed sizes are kept at the output, a second run changes nothing, the dialect, and that the input program
    was left alone.
    """
    untouched = program.text()
    result = run(rule, program)
    assert not result.refusals, [f"{r.node}: {r.reason}" for r in result.refusals]
    assert result.changed == count, f"{result.changed} rewrites, {count} expected"
    after = result.program
    assert program.text() == untouched, "the rule edited the program that it was given"
    check_dialect(after, after=rule.name)
    again = run(rule, after)
    assert again.program.text() == after.text(), "a second run of the rule changes the program"
    for text in contains:
        assert text in after.text(), f"{text!r} is not in\n{after.text()}"
    if golden is not None:
        check_golden(golden, after.text())
    check_equal(program, after, atol=atol, rtol=rtol)
    return after


def check_golden(name: str, text: str) -> None:
    """`text` is what tests/golden/NAME.txt holds."""
    file = GOLDEN / f"{name}.txt"
    if UPDATE:
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.exists(), f"no golden text {file.name}: make it with MOEC_UPDATE_GOLDEN=1"
    assert text == file.read_text(), f"{file.name} differs; see tests/harness.py for how to update it"


def check_refused(rule: Pass, program: Program, reason: str, *, count: int = 0) -> PassResult:
    """The rule leaves `program` alone (but for `count` rewrites), and a refusal matches the pattern `reason`."""
    result = run(rule, program)
    assert result.changed == count, f"{result.changed} rewrites, {count} expected"
    if count == 0:
        assert result.program.text() == program.text()
    reasons = [f"{r.node}: {r.reason}" for r in result.refusals]
    assert any(re.search(reason, text) for text in reasons), f"{reason!r} is not among {reasons}"
    return result


def replace_steps(module: nn.Module, steps: Mapping[str, Callable[..., Any]]) -> None:
    """Functions of (module, ...) take the place of its methods of the same names, in this module alone."""
    for name, step in steps.items():
        assert hasattr(type(module), name), name
        setattr(module, name, MethodType(step, module))
