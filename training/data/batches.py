"""Batches from a corpus as a pure function of (seed, step, rank, world), so that resuming needs only the step.

*Which domain.* Rows are numbered through the whole run; a fixed pattern of domains, as even as the shares allow,
repeats along them. Row i of all rows is row k of its domain, and k is a count in that pattern, not a state.

*Text.* In every epoch the documents of a domain are put end to end in an order drawn from (seed, domain, epoch), cut
into rows of T tokens, and the rows are read in an order drawn likewise: the rows of one batch come from many
documents. Read in sequence, a long document would fill whole batches, and experts cannot be balanced on a single file.
What remains at the end of an epoch, less than a row, is not read in it. The last token of a document (EOS) has no
target: nothing is predicted across documents.

*Instructions.* Whole examples are packed into rows once (drawn from the seed), and the rows are reordered every epoch.
Only tokens of responses are targets. What is left of a row is padding: EOS, no target, a document of its own. Tokens
have equal weight, or, with `response_weight` "response", the examples of a row do, so that an answer of a page does not
outweigh one of a word. A row's weight is the number of its targets in either case.

Letters: B rows, T tokens of a row (the context), N tokens of a shard.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moec.compiler.spec.training import ResponseWeight
from moec.training.data.shards import Corpus, DataError, Shard, check_ids

_PATTERN = 10_000  # rows until the pattern of domains repeats: shares are met to 1 in 10,000
_OPEN_ROWS = 32  # rows that packing fills at the same time; more wastes less and mixes lengths less
_HELDOUT_ROWS = 8


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what to predict at each.

    tokens_BT int64; targets_BT int64, the next token of the same document (0 where loss_mask_BT is 0); loss_mask_BT
    float32, the weight of each position's loss, 0 where it has none; documents_BT int32, the number of the document
    within the row, from 0, for attention that stays inside a document; domains_B names each row's domain.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    loss_mask_BT: Tensor
    documents_BT: Tensor
    domains_B: tuple[str, ...]


class Batches:
    """The training batches of a stage. `batch_tokens // context` rows a step, shared evenly by the ranks.

    mixture: shares by domain, any positive scale; domains with share 0 are not read. DataError for a domain that the
    corpus lacks or that has no tokens in `split`, and for numbers that make no batch.
    """

    def __init__(
        self,
        corpus: str | Path | Corpus,
        mixture: Mapping[str, float],
        context: int,
        batch_tokens: int,
        seed: int,
        split: str = "train",
        response_weight: ResponseWeight = "token",
    ) -> None:
        opened = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus)
        self.rows = batch_tokens // context if context > 0 else 0
        if self.rows < 1:
            raise DataError(
                f"a batch of {batch_tokens} tokens holds no row of {context}",
                remedy="raise batch_tokens or lower context",
            )
        shares = {name: share for name, share in sorted(mixture.items()) if share > 0}
        if not shares:
            raise DataError("the mixture has no domain with a share above 0", remedy="give at least one domain a share")
        self.corpus, self.context, self.seed = opened, context, seed
        self._streams = {name: _stream(opened, name, split, context, seed, response_weight) for name in shares}
        self._names = tuple(shares)
        self._pattern, self._before = _pattern(tuple(shares.values()), seed)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows `rank`, `rank + world`, ... of step `step` (from 0). DataError if the ranks cannot share the rows."""
        if self.rows % world:
            raise DataError(
                f"{world} processes cannot share {self.rows} rows of {self.context} tokens evenly",
                remedy="choose batch_tokens as a multiple of context times the number of processes",
            )
        assert 0 <= rank < world
        assert step >= 0
        chosen = [self._row_of(step * self.rows + row) for row in range(rank, self.rows, world)]
        batch = _batch([self._streams[name].row(k) for name, k in chosen], tuple(name for name, _ in chosen))
        return _checked(batch, self.corpus)

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each domain is read in `steps` steps, in epochs."""
        total = steps * self.rows
        rounds, rest = divmod(total, _PATTERN)
        counts = self._before[-1] * rounds + self._before[rest]
        return {name: counts[i] / self._streams[name].rows_per_epoch for i, name in enumerate(self._names)}

    @property
    def skipped(self) -> dict[str, int]:
        """Instruction examples longer than a row, by domain: they are never read."""
        return {name: stream.skipped for name, stream in self._streams.items()}

    def _row_of(self, number: int) -> tuple[str, int]:
        rounds, place = divmod(number, _PATTERN)
        domain = int(self._pattern[place])
        return self._names[domain], int(rounds * self._before[-1, domain] + self._before[place, domain])


def heldout(corpus: str | Path | Corpus, domain: str, context: int, limit_tokens: int | None = None) -> Iterator[Batch]:
    """Evaluation batches of one domain's held-out documents, always the same: each document once, in a fixed order.

    At most `limit_tokens` tokens (whole rows, at least one; None: all). The last row is filled up with padding.
    DataError if the domain has no held-out documents.
    """
    opened = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus)
    stream = _stream(opened, domain, "heldout", context, seed=0)
    rows = stream.epoch_rows
    if limit_tokens is not None:
        rows = min(rows, max(1, limit_tokens // context))
    for first in range(0, rows, _HELDOUT_ROWS):
        numbers = range(first, min(first + _HELDOUT_ROWS, rows))
        yield _checked(_batch([stream.row(k, once=True) for k in numbers], (domain,) * len(numbers)), opened)


def _checked(batch: Batch, corpus: Corpus) -> Batch:
    """DataError for an id that the vocabulary does not have: a damaged shard, found where it is read."""
    for ids_BT in (batch.tokens_BT, batch.targets_BT):
        check_ids(ids_BT.numpy(), corpus.vocab_size, f"{corpus.folder}, {', '.join(dict.fromkeys(batch.domains_B))}")
    return batch


# --- rows ------------------------------------------------------------------------------------------------------------

_Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # tokens, targets, loss mask, documents: each [T]


def _batch(rows: list[_Row], domains: tuple[str, ...]) -> Batch:
    tokens, targets, mask, documents = (np.stack(part) for part in zip(*rows, strict=True))
    return Batch(
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy(targets.astype(np.int64)),
        torch.from_numpy(mask.astype(np.float32)),
        torch.from_numpy(documents.astype(np.int32)),
        domains,
    )


class _Stream(Protocol):
    """One domain's rows, numbered without end; `epoch_rows` of them hold an epoch (the last may be shared)."""

    epoch_rows: int
    rows_per_epoch: float
    skipped: int

    def row(self, k: int, *, once: bool = False) -> _Row: ...


def _stream(
    corpus: Corpus, domain: str, split: str, context: int, seed: int, response_weight: ResponseWeight = "token"
) -> _Stream:
    shard = corpus.shard(domain, split)
    if shard.documents == 0:
        raise DataError(
            f"domain {domain!r} has no {split} documents", place=str(corpus.folder), remedy="add text to it"
        )
    if corpus.kind(domain) == "instruction":
        return _PackedExamples(shard, domain, context, seed, corpus.eos_id, response_weight)
    return _RunningText(shard, domain, context, seed, corpus.eos_id)


class _RunningText:
    """Documents end to end, cut into rows. Text shorter than a row is repeated without end, in ever new order."""

    skipped = 0

    def __init__(self, shard: Shard, domain: str, context: int, seed: int, eos_id: int) -> None:
        self._shard, self._context, self._eos_id = shard, context, eos_id
        self._length = int(shard.starts[-1])
        whole = self._length // context
        self.rows_per_epoch = whole or self._length / context
        self.epoch_rows = -(-self._length // context)
        self._epoch = lru_cache(maxsize=2)(lambda epoch: self._order(_key(domain), seed, epoch))
        # epochs of documents and of rows draw from different words: 2e and 2e + 1 of one sequence
        self._rows = lru_cache(maxsize=2)(lambda epoch: _permutation(whole, seed, _key(domain), 2 * epoch + 1))
        self._whole = whole

    def _order(self, key: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in order, and where each begins in the epoch's stream."""
        order = _permutation(self._shard.documents, seed, key, 2 * epoch)
        ends = np.cumsum(self._shard.lengths[order])
        return order, ends - self._shard.lengths[order]

    def _begin(self, k: int, *, once: bool) -> int:
        """Where row k begins in the endless stream of epochs."""
        if once or not self._whole:
            return k * self._context
        epoch, place = divmod(k, self._whole)
        return epoch * self._length + int(self._rows(epoch)[place]) * self._context

    def row(self, k: int, *, once: bool = False) -> _Row:
        tokens = np.full(self._context, self._eos_id, np.int64)
        targets = np.zeros(self._context, np.int64)
        mask = np.zeros(self._context, np.float32)
        documents = np.zeros(self._context, np.int32)
        filled, number, begin = 0, 0, self._begin(k, once=once)
        while filled < self._context:
            epoch, offset = divmod(begin + filled, self._length)
            if once and epoch > 0:  # the end of an evaluation: padding, as a document of its own
                documents[filled:] = number
                break
            order, begins = self._epoch(epoch)
            place = int(np.searchsorted(begins, offset, side="right")) - 1
            document = int(order[place])
            start = int(self._shard.starts[document]) + offset - int(begins[place])
            end = int(self._shard.starts[document + 1])
            count = min(end - start, self._context - filled)
            here = slice(filled, filled + count)
            tokens[here] = self._shard.tokens_N[start : start + count]
            documents[here] = number
            predicted = min(end - start - 1, count)  # the document's last token predicts nothing
            targets[filled : filled + predicted] = self._shard.tokens_N[start + 1 : start + 1 + predicted]
            mask[filled : filled + predicted] = 1
            filled, number = filled + count, number + 1
        return tokens, targets, mask, documents


class _PackedExamples:
    """Whole examples packed into rows."""

    def __init__(
        self, shard: Shard, domain: str, context: int, seed: int, eos_id: int, response_weight: ResponseWeight
    ) -> None:
        self._even = response_weight == "response"
        self._shard, self._context, self._eos_id, self._seed = shard, context, eos_id, seed
        self._key = _key(domain)
        order = _permutation(shard.documents, seed, self._key, 0)
        fits = shard.lengths[order] <= context
        self.skipped = int((~fits).sum())
        self._rows = _pack(order[fits], shard.lengths, context)
        if not self._rows:
            raise DataError(
                f"every example of {domain!r} is longer than {context} tokens", remedy="raise the stage's context"
            )
        self.epoch_rows = len(self._rows)
        self.rows_per_epoch = float(self.epoch_rows)
        self._epoch = lru_cache(maxsize=2)(lambda epoch: _permutation(len(self._rows), seed, self._key, 1 + epoch))

    def row(self, k: int, *, once: bool = False) -> _Row:
        epoch, place = divmod(k, len(self._rows))
        assert not (once and epoch)
        tokens = np.full(self._context, self._eos_id, np.int64)
        targets = np.zeros(self._context, np.int64)
        mask = np.zeros(self._context, np.float32)
        examples = self._rows[int(self._epoch(epoch)[place])]
        documents = np.full(self._context, len(examples), np.int32)
        filled = 0
        assert self._shard.mask_N is not None
        for number, example in enumerate(examples):
            start, end = int(self._shard.starts[example]), int(self._shard.starts[example + 1])
            here = slice(filled, filled + end - start)
            tokens[here] = self._shard.tokens_N[start:end]
            documents[here] = number
            targets_here = slice(filled, filled + end - start - 1)
            responses = self._shard.mask_N[start + 1 : end]
            targets[targets_here] = np.where(responses, self._shard.tokens_N[start + 1 : end], 0)
            mask[targets_here] = responses
            filled += end - start
        if self._even:
            lengths = np.bincount(documents, weights=mask)  # targets of each example
            each = mask.sum() / max(1, np.count_nonzero(lengths))
            mask *= (each / np.maximum(lengths, 1))[documents].astype(np.float32)
        return tokens, targets, mask, documents


def _pack(order: np.ndarray, lengths: np.ndarray, context: int) -> list[tuple[int, ...]]:
    """Examples, in order, into rows of at most `context` tokens: each goes into the fullest open row that holds it."""
    rows: list[tuple[int, ...]] = []
    open_rows: list[tuple[int, list[int]]] = []  # room left, examples; the fullest first
    for example in order.tolist():
        length = int(lengths[example])
        place = next((i for i, (room, _) in enumerate(open_rows) if room >= length), None)
        new: tuple[int, list[int]] = (context, [])
        if place is None and len(open_rows) == _OPEN_ROWS:
            rows.append(tuple(open_rows.pop(0)[1]))
        room, members = new if place is None else open_rows.pop(place)
        members.append(example)
        room -= length
        at = next((i for i, (other, _) in enumerate(open_rows) if other > room), len(open_rows))
        open_rows.insert(at, (room, members))
    return rows + [tuple(members) for _, members in open_rows]


def _pattern(shares: tuple[float, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which domain each of `_PATTERN` rows reads, int16, and how many rows of each domain stand before each row.

    Counts by largest remainder, at least one each; a domain's rows are spread evenly, so that every stretch of rows
    has nearly the shares of the whole.
    """
    exact = np.asarray(shares, np.float64) / np.sum(shares, dtype=np.float64) * _PATTERN
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while counts.sum() != _PATTERN:
        step = 1 if counts.sum() < _PATTERN else -1
        distance = np.where((counts > 1) | (step > 0), (exact - counts) * step, -np.inf)
        counts[int(distance.argmax())] += step
    shifts = _uniform(len(shares), seed, 0, 0)
    places = np.concatenate([(np.arange(n) + shift) / n for n, shift in zip(counts, shifts, strict=True)])
    pattern = np.repeat(np.arange(len(shares), dtype=np.int16), counts)[np.argsort(places, kind="stable")]
    before = np.zeros((_PATTERN + 1, len(shares)), np.int64)
    before[1:] = np.cumsum(pattern[:, None] == np.arange(len(shares)), axis=0)
    return pattern, before


# --- randomness: raw words of Philox, whose stream is the same in every version of NumPy ------------------------------


def _words(count: int, seed: int, key: int, epoch: int) -> np.ndarray:
    mixed = np.random.SeedSequence([seed, key, epoch]).generate_state(2, np.uint64)
    return np.random.Philox(key=mixed).random_raw(count)


def _permutation(count: int, seed: int, key: int, epoch: int) -> np.ndarray:
    return np.argsort(_words(count, seed, key, epoch), kind="stable")


def _uniform(count: int, seed: int, key: int, epoch: int) -> np.ndarray:
    return (_words(count, seed, key, epoch) >> np.uint64(11)).astype(np.float64) / (1 << 53)


def _key(domain: str) -> int:
    return 1 + zlib.crc32(domain.encode())
