"""The text that a calibrated quantizer observes, as token ids: shipped domains, a file of text, or JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moec.analysis.profile.prompts import read_prompts
from moec.compiler.errors import UserError
from moec.compiler.spec.quantization import Calibration
from moec.compiler.texts import Prompt, shipped_prompts

_LENGTH = 512  # tokens of one sequence: long enough for attention to have something to attend to


@dataclass(frozen=True)
class Texts:
    """Sequences of token ids, each from an empty cache, and how many tokens are of which domain."""

    sequences: tuple[tuple[int, ...], ...]
    domains: dict[str, int]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


def calibration_texts(
    given: Calibration, encode: Callable[[str], Sequence[int]], *, bos_id: int | None, context: int
) -> Texts:
    """At most `given.tokens` tokens, domains in turn, in sequences that fit the context.

    UserError for a file that cannot be read, a domain that is not there, and a text without tokens.
    """
    by_domain: dict[str, list[list[int]]] = {}
    for prompt in _prompts(given):
        ids = list(encode(prompt.text))
        if bos_id is not None and ids and ids[0] != bos_id:
            ids.insert(0, bos_id)
        length = min(_LENGTH, context)
        by_domain.setdefault(prompt.domain, []).extend(ids[i : i + length] for i in range(0, len(ids), length))
    chosen: list[tuple[int, ...]] = []
    counts = dict.fromkeys(by_domain, 0)
    left = given.tokens
    queues = {domain: iter(pieces) for domain, pieces in by_domain.items()}
    while left > 0 and queues:
        for domain in list(queues):
            piece = next(queues[domain], None)
            if piece is None:
                del queues[domain]
            elif left > 0:
                chosen.append(tuple(piece[:left]))
                counts[domain] += len(chosen[-1])
                left -= len(chosen[-1])
    if not sum(counts.values()):
        raise UserError("there is no token in the calibration text", remedy="give a longer text")
    return Texts(tuple(chosen), {domain: n for domain, n in counts.items() if n})


def _prompts(given: Calibration) -> list[Prompt]:
    file = given.text or given.jsonl
    if file is not None:
        return _of_file(file, lines=given.jsonl is not None)
    prompts = shipped_prompts()
    known = tuple(dict.fromkeys(p.domain for p in prompts))
    wanted = given.domains or known
    for domain in wanted:
        if domain not in known:
            raise UserError(f"there is no shipped text of domain {domain!r}", remedy=f"known: {', '.join(known)}")
    return [p for p in prompts if p.domain in wanted]


def _of_file(file: Path, *, lines: bool) -> list[Prompt]:
    if lines and file.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        raise UserError("is not a file of JSON lines", place=str(file), remedy="name it .jsonl, or give it as text")
    return read_prompts(file)
