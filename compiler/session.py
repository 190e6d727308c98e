"""The base class of every target's session: checks requests, splits prompts into chunks, keeps position and traces.

T tokens, V vocabulary, D width, K experts of a token. A session runs one sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from moec.compiler.errors import RunError
from moec.compiler.spec.targets import targets_that_save_sessions
from moec.compiler.target import MoeTrace, Session


class Writer(Protocol):
    """What makes text of a session: the artifact's tokenizer, chat template and defaults (`moec.assistant`)."""

    @property
    def generate(self) -> Callable[..., Iterator[str]]: ...
    def keep_prefix(self, session: Session, name: str) -> None: ...


class SessionBase(ABC):
    """The `Session` protocol over two methods that a target implements: `_forward` for one chunk, and `close`.

    `place`: the artifact's file, which every fault names. `max_tokens`: the longest chunk that a call takes.
    """

    #: Whether the caches still hold what they held at earlier positions.
    rewinds = False
    #: Whether a token gives the same logits, bit for bit, alone and among others, however a text is cut into calls.
    exact_calls = False
    #: The budget of memory that the session stays within, in 10^6 bytes; None: it has none.
    memory_mb: int | None = None
    #: How many answers were begun on it. One that another has followed cannot go on.
    turn = 0
    #: Made when text is first asked for; None for a program without its artifact.
    writer: Callable[[], Writer] | None = None

    def __init__(self, place: str, *, vocab_size: int, context: int, max_tokens: int) -> None:
        self.vocab_size, self.context, self.max_tokens = vocab_size, context, max_tokens
        self.position = 0
        self._ids: list[int] = []
        self._place = place
        self._tracing = False
        self._traces: list[MoeTrace] = []

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether the model was released."""

    @abstractmethod
    def close(self) -> None:
        """Release the model. Calls after this raise RunError; closing twice is fine."""

    @abstractmethod
    def _forward(self, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> list[MoeTrace]:
        """Append int64 tokens [T <= max_tokens] at position `start`; while tracing, a trace per MoE layer.

        rows: float32, where the logits go: [T, V] of every token, or [1, V] of the last. None: nobody reads them.
        """

    def prefill(self, ids: Sequence[int] | np.ndarray, logits: str = "last") -> np.ndarray:
        """Append tokens. Returns float32 [T, V] for logits="all", [1, V] for "last".

        RunError: the session is closed, no tokens, an id that is not in the vocabulary, or more tokens than the context
        has room for. Nothing has been appended then.
        """
        if logits not in ("all", "last"):
            raise RunError(f'logits="{logits}"', remedy='ask for "all" or "last"')
        tokens = checked_ids(self, ids, closed=self.closed, place=self._place)
        every = logits == "all"
        out = np.empty((len(tokens) if every else 1, self.vocab_size), np.float32)
        chunks: list[list[MoeTrace]] = []
        for begin in range(0, len(tokens), self.max_tokens):
            chunk = tokens[begin : begin + self.max_tokens]
            if every:
                rows: np.ndarray | None = out[begin : begin + len(chunk)]
            else:
                rows = out if begin + len(chunk) == len(tokens) else None
            chunks.append(self._forward(chunk, self.position + begin, rows, every))
        self.position += len(tokens)
        self._ids += tokens.tolist()
        if self._tracing:
            self._traces += [joined_layer(layer) for layer in zip(*chunks, strict=True)]
        return out

    def decode(self, token: int) -> np.ndarray:
        """Append one token; its logits, float32 [V]. RunError as `prefill`."""
        return np.asarray(self.prefill([token])[0])

    def reset(self) -> None:
        """Forget the sequence. What a cache holds is not seen again: attention ends at the current position."""
        self.position = 0
        self._ids.clear()
        self._traces.clear()

    @property
    def tokens(self) -> list[int]:
        """The ids in the session, `position` of them."""
        return list(self._ids)

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` on. What follows gives the logits, bit for bit, of a session that never had
        them.

        RunError: the session is closed, `position` is not in 0 .. self.position, or the model's states do not go back
        (0 they always do).
        """
        self._check_open()
        if not 0 <= position <= self.position:
            raise RunError(
                f"position {position}: the session holds {self.position} tokens",
                place=self._place,
                remedy=f"rewind to 0 .. {self.position}",
            )
        if position in (0, self.position):
            return self.reset() if position == 0 else None
        if not self.rewinds:
            what = "the states of this artifact do not go back to an earlier position"
            raise RunError(what, place=self._place, remedy="reset() the session and prefill the tokens again")
        self.position = position
        del self._ids[position:]
        self._traces.clear()

    def fork(self) -> Session:
        """Another session with the same tokens over the same weights; each goes on without the other.

        RunError: the session is closed, or its target has no sessions that fork.
        """
        raise self._not_here("fork")

    def save(self, path: str | Path) -> None:
        """Write tokens and caches to a file, whole or not at all, in place of a session that is there.

        RunError: the session is closed, the disk refuses, the file is no session that moec saved, or the target saves
        none.
        """
        raise self._not_here("be saved")

    def restore(self, path: str | Path) -> None:
        """Replace tokens and caches by those that `save` wrote; what follows gives the same logits, bit for bit.

        RunError, and the session is as it was: SessionFileError for a file that is missing, damaged or of another
        artifact, NoRoomError where a memory budget has no room for the file's caches beside the session's (one that was
        reset has none), or the session is closed, or the target saves none.
        """
        raise self._not_here("be restored")

    def _not_here(self, what: str) -> RunError:
        remedy = f"compile the spec for {' or '.join(targets_that_save_sessions())}"
        return RunError(f"sessions of this target cannot {what}", place=self._place, remedy=remedy)

    def _check_open(self) -> None:
        if self.closed:
            raise RunError("the session is closed", place=self._place, remedy="load the artifact again")

    def generate(self, prompt: str | Sequence[Mapping[str, Any]] | Sequence[int], **options: Any) -> Iterator[str]:
        """Text that follows a text, a conversation (`[{"role": "user", "content": "Hi"}]`) or ids, in pieces.

        The session then holds exactly this prompt: tokens that it already holds are not computed again, tokens that
        differ are forgotten. Options: those of `moec.assistant.assistant.Assistant.generate`. RunError: no
        tokenizer or chat template, a prompt that does not fit, options out of range. A session has one answer at a
        time: going on with one behind which another was begun is a RunError (`fork` gives each a session).
        """
        return self._writer().generate(self, prompt, **options)

    def keep_prefix(self, name: str) -> None:
        """Keep the tokens and caches of this session under a name, in the folder of `moec.load(..., prefix_cache=DIR)`:
        prompts that begin so are computed from there on, also in another process, with the same bits.

        Other tokens that had the name are forgotten. UserError for what is no name (1 to 64 of A-Z, a-z, 0-9, ".", "_",
        "-"); RunError: no folder was named, the session holds no tokens, or it cannot be saved.
        """
        self._writer().keep_prefix(self, name)

    def _writer(self) -> Writer:
        if self.writer is None:
            what = "a program that was opened without its artifact has no tokenizer"
            raise RunError(what, place=self._place, remedy="open the artifact with moec.load")
        return self.writer()

    def trace(self, enabled: bool) -> None:
        """Record every MoE layer of the calls that follow; `take_traces` collects them."""
        self._tracing = enabled
        if not enabled:
            self._traces.clear()

    def take_traces(self) -> list[MoeTrace]:
        """The traces since the last call of this, in order of execution: layer by layer for each prefill or decode."""
        taken, self._traces = self._traces, []
        return taken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked_ids(session: Session, ids: Sequence[int] | np.ndarray, *, closed: bool, place: str) -> np.ndarray:
    """The ids as int64 [T], contiguous, each in the vocabulary, all within what is left of the context.

    RunError at `place`, the artifact's file: for a closed session, no ids, ids that are no list of integers, an id out
    of the vocabulary, and more tokens than fit.
    """
    if closed:
        raise RunError("the session is closed", place=place, remedy="load the artifact again")
    remedy = "give token ids as a list of integers"
    try:
        given = np.asarray(ids)
    except ValueError:  # rows of different lengths
        raise RunError("token ids must be a list of integers, not lists of lists", place=place, remedy=remedy) from None
    if given.size == 0:
        raise RunError("the prompt is empty", place=place, remedy="give at least one token")
    if given.ndim != 1 or given.dtype.kind not in "iu":
        what = f"token ids must be a list of integers, not {given.dtype} of {given.ndim} dimensions"
        raise RunError(what, place=place, remedy=remedy)
    wrong = given[(given < 0) | (given >= session.vocab_size)]
    if wrong.size:
        raise RunError(
            f"token id {int(wrong[0])} is not in the vocabulary",
            place=place,
            remedy=f"ids are 0 to {session.vocab_size - 1}",
        )
    if given.size > session.context - session.position:
        state = f", {session.position} of which are used" if session.position else ""
        raise RunError(
            f"{given.size} tokens do not fit: the context holds {session.context}{state}",
            place=place,
            remedy="reset() or rewind() the session, or shorten the prompt"
            if session.position
            else "shorten the prompt",
        )
    return np.ascontiguousarray(given, np.int64)


def joined_layer(parts: Sequence[MoeTrace]) -> MoeTrace:
    """One layer's traces of consecutive chunks as one, tokens in the order they ran."""
    if len(parts) == 1:
        return parts[0]
    return MoeTrace(
        layer=parts[0].layer,
        x_TD=np.concatenate([p.x_TD for p in parts]),
        indices_TK=np.concatenate([p.indices_TK for p in parts]),
        weights_TK=np.concatenate([p.weights_TK for p in parts]),
        y_TD=np.concatenate([p.y_TD for p in parts]),
    )
