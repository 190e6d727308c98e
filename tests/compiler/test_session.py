"""What every target's session does alike, over a session whose logits tell what it was fed."""

from __future__ import annotations

import numpy as np
import pytest

from moec.compiler.errors import RunError
from moec.compiler.session import SessionBase
from moec.compiler.target import MoeTrace

VOCABULARY, CONTEXT, CHUNK = 11, 12, 3


class Echo(SessionBase):
    """The logits of a token are its id and its position, in the first two columns; one MoE layer that passes both."""

    def __init__(self) -> None:
        super().__init__("model.pte", vocab_size=VOCABULARY, context=CONTEXT, max_tokens=CHUNK)
        self.calls: list[tuple[int, int, bool, bool]] = []  # tokens, start, whether logits are read, of every token
        self.stops_at: int | None = None
        self._open = True

    @property
    def closed(self) -> bool:
        return not self._open

    def close(self) -> None:
        self._open = False

    def _forward(self, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> list[MoeTrace]:
        if start == self.stops_at:
            raise RunError("stopped")
        self.calls.append((len(tokens), start, rows is not None, every))
        logits = np.zeros((len(tokens), VOCABULARY), np.float32)
        logits[:, 0], logits[:, 1] = tokens, start + np.arange(len(tokens))
        if rows is not None:
            rows[:] = logits if every else logits[-1:]
        return [MoeTrace(0, logits, tokens[:, None].astype(np.int32), logits[:, :1], logits)] if self._tracing else []


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 12])
def test_a_prompt_goes_in_chunks(length: int) -> None:
    ids = [(5 * n) % VOCABULARY for n in range(length)]
    session = Echo()
    every = session.prefill(ids, "all")
    assert every.shape == (length, VOCABULARY)
    assert every[:, 0].tolist() == ids
    assert every[:, 1].tolist() == list(range(length))
    assert max(call[0] for call in session.calls) <= CHUNK
    assert [call[1] for call in session.calls] == list(range(0, length, CHUNK))
    last = Echo()
    np.testing.assert_array_equal(last.prefill(ids), every[-1:])
    assert [call[2] for call in last.calls] == [False] * (len(last.calls) - 1) + [True]  # only the end is read


def test_calls_go_on_where_the_last_one_ended() -> None:
    session = Echo()
    session.prefill([3, 4])
    assert session.decode(9)[:2].tolist() == [9, 2]
    assert session.position == 3
    session.reset()
    assert session.decode(9)[:2].tolist() == [9, 0]


def test_traces_are_a_layer_a_call() -> None:
    session = Echo()
    session.prefill([1])
    session.trace(True)
    session.prefill([1, 2, 3, 4])
    session.decode(5)
    prompt, step = session.take_traces()
    assert prompt.indices_TK.ravel().tolist() == [1, 2, 3, 4]
    assert step.indices_TK.ravel().tolist() == [5]
    assert session.take_traces() == []
    session.decode(6)
    session.trace(False)
    assert session.take_traces() == []


def test_a_call_that_stops_appends_nothing() -> None:
    session = Echo()
    session.trace(True)
    session.stops_at = CHUNK
    with pytest.raises(RunError, match="stopped"):
        session.prefill([1, 2, 3, 4])
    assert (session.position, session.take_traces()) == (0, [])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt is empty"),
        ([VOCABULARY], f"token id {VOCABULARY} is not in the vocabulary; ids are 0 to {VOCABULARY - 1}"),
        ([-1], "token id -1 is not"),
        ([0.5], "list of integers, not float64"),
        ([[1]], "of 2 dimensions"),
        ([0] * (CONTEXT + 1), f"{CONTEXT + 1} tokens do not fit: the context holds {CONTEXT}; shorten the prompt"),
    ],
)
def test_refuses(ids: list, message: str) -> None:
    session = Echo()
    with pytest.raises(RunError, match=message):
        session.prefill(ids)
    assert (session.position, session.calls) == (0, [])


def test_refuses_another_form_of_logits() -> None:
    with pytest.raises(RunError, match='ask for "all" or "last"'):
        Echo().prefill([1], "first")


def test_a_closed_session_says_so() -> None:
    with Echo() as session:
        session.decode(1)
    with pytest.raises(RunError, match=r"model\.pte: the session is closed; load the artifact again"):
        session.decode(1)


def test_what_a_target_without_sessions_says() -> None:
    session = Echo()
    session.prefill([1, 2, 3])
    assert session.tokens == [1, 2, 3]
    with pytest.raises(
        RunError, match=r"model\.pte: sessions of this target cannot fork; compile the spec for xnnpack"
    ):
        session.fork()
    with pytest.raises(RunError, match="do not go back to an earlier position"):
        session.rewind(2)
    session.rewind(3)
    assert session.position == 3
    session.rewind(0)
    assert (session.position, session.tokens) == (0, [])
