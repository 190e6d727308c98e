"""expand_complex: real tensors with the same values, or a refusal and the program left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.passes.expand_complex import expand_complex
from moec.passes.pipelines import fusion
from tests.harness import CONTEXT, VOCABULARY, check_equal, check_refused, export_toy, run
from tests.passes.moe_zoo import parameter

D = 12
Step = Callable[[Tensor, Tensor], Tensor]


def pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def turned(angles: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(angles), angles)


def flat(z: Tensor) -> Tensor:
    return torch.view_as_real(z).flatten(-2)


class Toy(nn.Module):
    """x [1, T, D] and angles [1, T, D / 2] by position, through one step."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.embed = parameter(VOCABULARY, D)
        self.step = step

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embed)
        positions = (start_pos + torch.arange(tokens.shape[1])).to(torch.float32)
        return self.step(x, positions[None, :, None] * torch.arange(1, D // 2 + 1) / CONTEXT)


STEPS: dict[str, Step] = {
    "rotary": lambda x, t: flat(pairs(x) * turned(t)),
    "product of four readings": lambda x, t: flat(turned(t) * pairs(x) * pairs(x * 0.5)),
    "scaled": lambda x, t: flat(pairs(x) * (turned(t) * 1.25)),
    "scaled by a tensor, from the left": lambda x, t: flat(t * pairs(x)),
    "conjugate": lambda x, t: flat(pairs(x).conj().resolve_conj() * turned(t)),
    "parts": lambda x, t: torch.cat(((pairs(x) * turned(t)).real, (pairs(x) * turned(t)).imag), -1),
    "of parts": lambda x, t: flat(torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turned(t)),
    "sums": lambda x, t: flat(pairs(x) + turned(t) - pairs(x * 3.0)),
    "negative": lambda x, t: flat(-(pairs(x) * turned(t))),
    "broadcast and back": lambda x, t: flat((pairs(x).unsqueeze(1) * turned(t).unsqueeze(1)).squeeze(1)),
    "transposed": lambda x, t: flat((pairs(x).transpose(1, 2) * turned(t).transpose(1, 2)).transpose(1, 2)),
    "sliced": lambda x, t: flat(pairs(x)[..., 1:3]),
    "selected": lambda x, t: flat((pairs(x) * turned(t))[:, -1:]),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_values_are_kept(name: str) -> None:
    program = export_toy(lambda: Toy(STEPS[name]))
    assert "complex64" in program.text()
    result = run(expand_complex(), program)
    assert result.changed
    assert not result.refusals
    assert "complex" not in result.program.text()
    check_equal(program, result.program)
    assert run(expand_complex(), result.program).changed == 0


REFUSED: dict[str, tuple[Step, str]] = {
    "quotient": (lambda x, t: flat(pairs(x) / turned(t)), "aten.div.Tensor"),
    "absolute value": (lambda x, t: pairs(x).abs(), "aten.abs"),
    "complex number": (lambda x, t: flat(pairs(x) * (1 + 2j)), "aten.mul.Tensor"),
    "matrix product": (
        lambda x, t: flat(pairs(x) @ torch.view_as_complex(torch.ones(D // 2, D // 2, 2))),
        "complex numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_whole(name: str) -> None:
    step, reason = REFUSED[name]
    check_refused(expand_complex(), export_toy(lambda: Toy(step)), reason)


def test_a_real_program_is_left_alone() -> None:
    program = export_toy(lambda: Toy(lambda x, t: torch.cat((x * t.repeat(1, 1, 2), x.real), -1)))
    result = run(expand_complex(), program)
    assert (result.changed, result.refusals) == (0, ())
    assert result.program.text() == program.text()


def test_it_runs_before_the_rules_that_fuse() -> None:
    names = [rule.name for rule in fusion()]
    assert names.index("canonicalize") < names.index("expand_complex") < names.index("fuse_rope")
