"""Guesses change how many calls a text takes, and nothing of the text.

V is the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from moec.assistant.generate import Generation
from moec.assistant.load import load, load_draft
from moec.assistant.sampling import Sampling
from moec.assistant.speculate import Drafter, DraftLength, ModelDrafter, Pays, PromptLookup, Steps
from moec.checkpoints.synthesize import synthesize
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.errors import RunError
from moec.compiler.session import SessionBase
from moec.compiler.spec import Spec, load_spec
from moec.compiler.target import MoeTrace

TINY = Path(__file__).parents[2] / "specs" / "models" / "mobilemoe-tiny.yaml"
V = 16


class Cyclic(SessionBase):
    """Says the tokens of a text of its own, wherever it stands in it: logits depend on the last two tokens."""

    def __init__(self, context: int = 200, *, exact: bool = True, period: int = 7) -> None:
        super().__init__("cyclic", vocab_size=V, context=context, max_tokens=64)
        self.rewinds, self.exact_calls, self.period = True, exact, period
        self.calls: list[int] = []

    closed = False

    def close(self) -> None: ...

    def _forward(self, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> list[MoeTrace]:
        self.calls.append(len(tokens))
        if rows is not None:
            for row, token in zip(rows, tokens[-len(rows) :], strict=True):
                row[:] = np.random.default_rng(int(token)).standard_normal(V)
                row[(token + 1) % self.period] += 4
        return []


class Clock:
    """A second for a token alone, two for a call of several."""

    def __init__(self, session: Cyclic) -> None:
        self._session = session

    def __call__(self) -> float:
        return float(sum(1 if size == 1 else 2 for size in self._session.calls))


def run(session: SessionBase, count: int, drafter: Drafter | None, sampling: Sampling | None = None) -> list[int]:
    session.reset()
    return list(Generation(session, [1, 2, 3], count, sampling or Sampling(), drafter=drafter))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_a_text_is_the_same_with_guesses(temperature: float) -> None:
    session = Cyclic()
    for seed in range(5):
        sampling = Sampling(temperature=temperature, seed=seed)
        alone = run(session, 100, None, sampling)
        assert run(session, 100, PromptLookup(), sampling) == alone
        # the last token of an answer is not computed, and no guess stays behind
        assert session.tokens == [1, 2, 3, *alone[:-1]]


def steps_of(session: Cyclic, drafter: Drafter | None, count: int) -> tuple[list[int], Steps]:
    session.reset()
    session.prefill([1, 2, 3])
    session.calls.clear()
    steps = Steps(session, drafter, Clock(session))
    said = [4]
    for _ in range(count):
        said.append(int(steps.next(said[-1]).argmax()))
    steps.close()
    return said, steps


def test_a_text_that_repeats_takes_fewer_calls() -> None:
    session = Cyclic()
    alone, _ = steps_of(session, None, 100)
    assert len(session.calls) == 100
    found, steps = steps_of(session, PromptLookup(), 100)
    assert found == alone
    assert Clock(session)() < 60  # a check takes as long as two single steps, of which `alone` took 100
    assert steps.speculation.acceptance > 0.9
    assert session.position == steps.position == 103


class Wrong:
    def __init__(self) -> None:
        self.asked = 0

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        self.asked += 1
        return [V - 1] * most


def test_guesses_that_are_wrong_rest() -> None:
    session, wrong = Cyclic(context=2000), Wrong()
    alone, _ = steps_of(session, None, 1000)
    found, steps = steps_of(session, wrong, 1000)
    assert found == alone
    assert steps.speculation.kept == 0
    # 16, 32, 64 ... steps lie between two guesses, each of which costs one second more than a step
    assert wrong.asked <= 8
    assert Clock(session)() <= 1008


def test_no_guess_where_it_could_change_a_bit() -> None:
    session, wrong = Cyclic(exact=False), Wrong()
    steps_of(session, wrong, 50)
    assert wrong.asked == 0


class Failing(Cyclic):
    """Fails on a token that only guesses hold, as a model does whose logits are NaN behind it."""

    def _forward(self, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> list[MoeTrace]:
        if V - 1 in tokens:
            self.calls.append(0)
            raise RunError("the logits are not numbers")
        return super()._forward(tokens, start, rows, every)


def test_a_guess_that_the_model_fails_on_ends_guessing_and_not_the_answer() -> None:
    session, wrong = Failing(), Wrong()
    alone = run(session, 60, None)
    assert run(session, 60, wrong) == alone
    assert (wrong.asked, session.calls.count(0)) == (1, 1)
    assert session.tokens == [1, 2, 3, *alone[:-1]]

    class Broken(Wrong):
        def draft(self, tokens: Sequence[int], most: int) -> list[int]:
            super().draft(tokens, most)
            raise RunError("the drafter's logits are not numbers")

    broken = Broken()
    assert run(session, 60, broken) == alone
    assert broken.asked == 1


def test_an_answer_behind_which_another_was_begun_does_not_go_on() -> None:
    session = Cyclic()
    alone = run(session, 40, None)
    session.reset()
    first, second = (iter(Generation(session, [1, 2, 3], 40)) for _ in range(2))
    said = [next(first) for _ in range(25)]
    assert said == alone[:25]
    found = [next(second) for _ in range(25)]
    with pytest.raises(RunError, match="another answer has begun on this session"):
        next(first)
    third = iter(Generation(session, [1, 2, 3], 40))
    held = [next(third) for _ in range(30)]
    second.close()  # type: ignore[attr-defined]  # its guesses are gone; those of the third stay
    assert held + list(third) == alone
    assert found == alone[:25]
    # and one whose session was changed by hand
    last = iter(Generation(session, [1, 2, 3], 40))
    next(last), next(last)
    session.reset()
    with pytest.raises(RunError, match="or it was changed"):
        list(last)
    assert session.tokens == []


def test_guesses_stay_within_the_context() -> None:
    session = Cyclic(context=60)
    ids = run(session, 500, PromptLookup())
    assert ids == run(session, 500, None)
    assert len(ids) == 58  # the last one is said and not appended


def test_a_stop_in_the_middle_of_guesses_leaves_what_was_said() -> None:
    session = Cyclic()
    for count in range(20, 60):
        ids = run(session, count, PromptLookup())
        assert session.tokens == [1, 2, 3, *ids[:-1]]
    session.reset()
    text = iter(Generation(session, [1, 2, 3], 50))
    said = [next(text) for _ in range(30)]
    text.close()  # type: ignore[attr-defined]
    assert session.tokens == [1, 2, 3, *said[:-1]]


def test_prompt_lookup() -> None:
    lookup = PromptLookup()
    assert lookup.draft([1, 2, 3, 4, 5], 4) == []
    assert lookup.draft([1, 2, 3, 4, 5, 1, 2, 3], 4) == [4, 5, 1, 2]
    assert lookup.draft([1, 2, 3, 4, 5, 1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]  # the latest occurrence
    assert lookup.draft([1, 2, 3, 4, 5, 1, 2, 3, 9, 1, 2, 3, 7, 4, 5], 4) == [1, 2]  # two tokens speak for two
    assert lookup.draft([7, 8], 4) == []  # another text
    assert lookup.draft([7, 8, 9, 7, 8, 9], 4) == [7, 8, 9]


def lengths(cost: dict[int, float], right: list[bool], count: int = 60) -> list[int]:
    """The lengths of drafts whose checks take `cost` and whose tokens are right by turns of `right`."""
    found, length, at = [], DraftLength(), 0
    for _ in range(count):
        found.append(drafted := length.value())
        tokens = 1
        while tokens <= drafted and right[at % len(right)]:
            tokens, at = tokens + 1, at + 1
        at += 1
        length.checked(tokens, drafted, cost[1 + drafted])
    return found


def test_the_length_of_drafts_follows_what_they_cost_and_bring() -> None:
    flat = {n: 1 + 0.02 * (n - 1) for n in range(1, 17)}
    steps = {n: 1.2 * -(-n // 4) for n in range(1, 17)}  # a kernel that computes four tokens in the time of one
    assert lengths(flat, [True])[10:] == [15] * 50
    assert lengths(flat, [True, False])[30] < 8
    assert sorted(lengths({n: 1 + 0.2 * (n - 1) for n in flat}, [False])[10:])[25] == 1
    tried = lengths(steps, [True, True, True, False])
    assert sorted(tried[20:])[20] == 3
    # what a call of the machine's own took once does not rule a length out for ever
    disturbed, length = dict(flat), DraftLength()
    for turn in range(400):
        drafted = length.value()
        length.checked(1 + drafted, drafted, disturbed[1 + drafted] * (20 if turn < 8 else 1))
    assert length.value() == 15


def test_pays() -> None:
    pays = Pays()
    assert not pays.now()
    pays.stepped(1.0)
    assert pays.now()
    pays.checked(5, 2.0)
    assert pays.now()
    for _ in range(9):
        if pays.now():
            pays.checked(1, 3.0)
    assert not pays.now()


def test_a_model_guesses() -> None:
    session, small = Cyclic(), Cyclic()
    alone = run(session, 60, None)
    drafter = ModelDrafter(small, session)
    assert drafter.draft([1, 2, 3], 4) == alone[:4]
    assert run(session, 60, drafter) == alone
    other = Cyclic(period=5)  # guesses otherwise at every fifth token
    assert run(session, 60, ModelDrafter(other, session)) == alone
    small.rewinds = False
    with pytest.raises(RunError, match="do not go back"):
        ModelDrafter(small, session)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("speculate")
    spec = load_spec(TINY)
    synthesize(spec, folder / "checkpoint", seed=1)
    return build.compile(spec, checkpoint=folder / "checkpoint", out=folder / "artifact")


class Guessing:
    """Right guesses of a known text, and wrong ones at random."""

    def __init__(self, text: Sequence[int], seed: int) -> None:
        self._text, self._random = list(text), np.random.default_rng(seed)

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        right = self._text[len(tokens) : len(tokens) + most]
        return [t if self._random.random() < 0.8 else int(self._random.integers(0, 100)) for t in right]


@pytest.fixture
def opened(artifact: Artifact) -> Iterator[SessionBase]:
    session = load(artifact)
    assert isinstance(session, SessionBase)
    yield session
    session.close()


def test_an_artifact_says_the_same(opened: SessionBase) -> None:
    assert opened.exact_calls
    prompt = list(range(5, 45))
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3), Sampling(temperature=0.8, top_k=20, seed=4)):
        opened.reset()
        plain = Generation(opened, prompt, 120, sampling, drafter=None, top_scores=3)
        alone = list(plain)
        for seed in range(3):
            opened.reset()
            guided = Generation(opened, prompt, 120, sampling, drafter=Guessing(prompt + alone, seed), top_scores=3)
            assert list(guided) == alone
            assert guided.scores == plain.scores  # every log-probability, to the last bit
            assert guided.stats.accepted_tokens > 0


def test_drafts_that_do_not_fit(artifact: Artifact, opened: SessionBase, tmp_path: Path) -> None:
    with load_draft(artifact, artifact, opened) as draft:  # type: ignore[attr-defined]
        assert run(opened, 40, ModelDrafter(draft, opened)) == run(opened, 40, None)
    raw = load_spec(TINY).model_dump(mode="json")
    raw["model"]["vocab_size"] //= 2
    spec = Spec.model_validate(raw)
    synthesize(spec, tmp_path / "checkpoint", seed=1)
    other = build.compile(spec, checkpoint=tmp_path / "checkpoint", out=tmp_path / "artifact")
    with pytest.raises(RunError, match=r"artifact: has another tokenizer than .*; draft with a model of the same"):
        load_draft(other, artifact, opened)
    opened.exact_calls = False
    with pytest.raises(RunError, match="a draft could change its text"):
        load_draft(artifact, artifact, opened)
