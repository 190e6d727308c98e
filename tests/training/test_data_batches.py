"""Batches: pure, complete, inside documents, and shared by ranks without loss or overlap. Corpora are random."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.training.data.batches import Batch, Batches, heldout
from moec.training.data.shards import Corpus, DataError, write_tokens

VOCAB, EOS = 5000, 1
FIELDS = ("tokens_BT", "targets_BT", "loss_mask_BT", "documents_BT")


def random_documents(seed: int, count: int, longest: int) -> list[list[int]]:
    """Documents whose tokens name them: document i holds only id 10 + i, except for the last, EOS."""
    lengths = np.random.default_rng(seed).integers(1, longest, count)
    return [[10 + i] * int(n - 1) + [EOS] for i, n in enumerate(lengths)]


@contextmanager
def corpus_of(seed: int, count: int = 40, longest: int = 50) -> Iterator[Corpus]:
    """Two text domains and one of instructions whose responses are the second half of each example."""
    with tempfile.TemporaryDirectory() as folder:
        texts = {
            name: {
                "train": random_documents(seed + i, count, longest),
                "heldout": random_documents(seed + i, 7, longest),
            }
            for i, name in enumerate(("web", "code", "chat"))
        }
        halves = {
            split: [[int(2 * at >= len(ids)) for at in range(len(ids))] for ids in texts["chat"][split]]
            for split in ("train", "heldout")
        }
        yield write_tokens(Path(folder, "c"), texts, vocab_size=VOCAB, eos_id=EOS, masks={"chat": halves})


def equal(a: Batch, b: Batch) -> bool:
    return a.domains_B == b.domains_B and all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 62),
    context=st.integers(1, 70),
    rows=st.integers(1, 9),
    step=st.integers(0, 10_000),
)
def test_a_batch_depends_on_its_arguments_alone(seed: int, context: int, rows: int, step: int) -> None:
    with corpus_of(3) as corpus:
        mixture = {"web": 3.0, "code": 1.0} | ({"chat": 0.5} if context >= 50 else {})
        first = Batches(corpus, mixture, context, rows * context, seed)
        for other in range(max(0, step - 3), step):
            first.batch(other)  # what was read before must not matter
        again = Batches(corpus.folder, mixture, context, rows * context + context - 1, seed)
        assert equal(first.batch(step), again.batch(step))


@settings(max_examples=25, deadline=None)
@given(world=st.integers(1, 4), each=st.integers(1, 4), step=st.integers(0, 500), seed=st.integers(0, 99))
def test_ranks_together_have_the_batch_of_one_process(world: int, each: int, step: int, seed: int) -> None:
    with corpus_of(5) as corpus:
        batches = Batches(corpus, {"web": 1, "chat": 1}, 64, 64 * world * each, seed)
        whole = batches.batch(step)
        parts = [batches.batch(step, rank, world) for rank in range(world)]
        for field in FIELDS:
            joined = torch.stack([getattr(part, field) for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(joined, getattr(whole, field))
        assert tuple(d for row in zip(*(p.domains_B for p in parts), strict=True) for d in row) == whole.domains_B


def test_ranks_that_cannot_share_evenly_are_refused() -> None:
    with corpus_of(5) as corpus, pytest.raises(DataError, match="cannot share 3 rows"):
        Batches(corpus, {"web": 1}, 8, 24, 0).batch(0, 0, 2)


@settings(max_examples=20, deadline=None)
@given(context=st.integers(1, 80), seed=st.integers(0, 1 << 40))
def test_an_epoch_of_text_reads_no_token_twice_and_leaves_less_than_a_row(context: int, seed: int) -> None:
    with corpus_of(7) as corpus:
        shard = corpus.shard("web")
        rows = int(shard.starts[-1]) // context
        batches = Batches(corpus, {"web": 1}, context, context, seed)
        assert batches.epochs(rows) == {"web": 1.0}
        for epoch in (0, 1, 4):
            read = torch.cat([batches.batch(row).tokens_BT[0] for row in range(epoch * rows, (epoch + 1) * rows)])
            assert Counter(read.tolist()) <= Counter(shard.tokens_N.tolist())
            assert len(shard.tokens_N) - len(read) < context


def test_text_shorter_than_a_row_is_repeated() -> None:
    with corpus_of(7, count=3, longest=9) as corpus:
        shard = corpus.shard("web")
        total = int(shard.starts[-1])
        batches = Batches(corpus, {"web": 1}, 4 * total, 4 * total, 0)
        for row in range(3):
            read = Counter(batches.batch(row).tokens_BT[0].tolist())
            assert read == {token: 4 * count for token, count in Counter(shard.tokens_N.tolist()).items()}


def test_the_rows_of_a_batch_come_from_many_documents() -> None:
    """A document of half the tokens would fill whole batches, were rows read in sequence."""
    with tempfile.TemporaryDirectory() as folder:
        texts = {"web": {"train": [[10] * 4095 + [EOS], *([11 + i % 50] * 63 + [EOS] for i in range(64))]}}
        corpus = write_tokens(Path(folder, "c"), texts, vocab_size=VOCAB, eos_id=EOS)
        batches = Batches(corpus, {"web": 1}, 64, 64 * 16, 0)
        for step in range(8):
            long = sum(int(row[0]) == 10 for row in batches.batch(step).tokens_BT)
            assert 2 <= long <= 14  # 8 expected of 16 drawn among 128; beyond these in under 0.1% of draws


@settings(max_examples=20, deadline=None)
@given(context=st.integers(2, 80), seed=st.integers(0, 1 << 40), step=st.integers(0, 60))
def test_targets_follow_their_tokens_and_stay_inside_documents(context: int, seed: int, step: int) -> None:
    with corpus_of(9) as corpus:
        batch = Batches(corpus, {"web": 1, "code": 2}, context, 5 * context, seed).batch(step)
        on = batch.loss_mask_BT[:, :-1] == 1
        assert torch.equal(batch.targets_BT[:, :-1][on], batch.tokens_BT[:, 1:][on])
        same = batch.documents_BT[:, 1:] == batch.documents_BT[:, :-1]
        assert torch.equal(on, same)  # predicted exactly where the next token is of the same document
        assert torch.equal(~same, batch.tokens_BT[:, :-1] == EOS)
        # in these corpora an id names its document: within one there is one id and perhaps EOS
        for row in range(5):
            for number in range(int(batch.documents_BT[row].max()) + 1):
                ids = set(batch.tokens_BT[row][batch.documents_BT[row] == number].tolist())
                assert len(ids - {EOS}) <= 1


@settings(max_examples=20, deadline=None)
@given(context=st.integers(20, 120), seed=st.integers(0, 1 << 40))
def test_examples_are_packed_whole_and_only_responses_count(context: int, seed: int) -> None:
    with corpus_of(11, count=60) as corpus:
        shard = corpus.shard("chat")
        batches = Batches(corpus, {"chat": 1}, context, context, seed)
        rows = round(1 / batches.epochs(1)["chat"])
        expected = Counter(int(i) + 10 for i in np.flatnonzero(shard.lengths <= context) if shard.lengths[i] > 1)
        for epoch in range(2):
            seen: Counter[int] = Counter()
            losses = 0
            for row in range(epoch * rows, (epoch + 1) * rows):
                batch = batches.batch(row)
                for number in range(int(batch.documents_BT.max()) + 1):
                    inside = batch.documents_BT[0] == number
                    ids = set(batch.tokens_BT[0][inside].tolist()) - {EOS}
                    if not ids:
                        continue
                    (name,) = ids
                    seen[name] += 1
                    length = int(shard.lengths[name - 10])
                    assert int(inside.sum()) == length
                    flags = shard.mask_N[shard.starts[name - 10] : shard.starts[name - 9]]
                    assert batch.loss_mask_BT[0][inside].tolist() == [*flags[1:].tolist(), 0]
                losses += int(batch.loss_mask_BT.sum())
            assert seen == expected
            assert losses > 0
        assert batches.skipped["chat"] == int((shard.lengths > context).sum())


@settings(max_examples=20, deadline=None)
@given(context=st.integers(20, 120), seed=st.integers(0, 1 << 40))
def test_responses_of_a_row_can_count_alike(context: int, seed: int) -> None:
    """The same batches but for weights: equal sums for the examples of a row, and the row's own sum unchanged."""
    with corpus_of(11, count=60) as corpus:
        tokens = Batches(corpus, {"chat": 1, "web": 1}, context, 4 * context, seed)
        evenly = Batches(corpus, {"chat": 1, "web": 1}, context, 4 * context, seed, response_weight="response")
        uneven = 0
        for step in range(4):
            a, b = tokens.batch(step), evenly.batch(step)
            assert torch.equal(a.tokens_BT, b.tokens_BT)
            assert torch.equal(a.targets_BT, b.targets_BT)
            assert torch.equal(a.loss_mask_BT > 0, b.loss_mask_BT > 0)
            for row, domain in enumerate(a.domains_B):
                plain, weighted, numbers = a.loss_mask_BT[row], b.loss_mask_BT[row], a.documents_BT[row].long()
                if domain == "web":
                    assert torch.equal(plain, weighted)
                    continue
                count = torch.bincount(numbers, weights=plain)
                sums = torch.bincount(numbers, weights=weighted)
                even = plain.sum() / (count > 0).sum()
                # float32 sums of at most 120 terms
                torch.testing.assert_close(sums, torch.where(count > 0, even, 0.0), rtol=1e-5, atol=0)
                uneven += int((count[count > 0] != count.max()).any())
        assert uneven, "every example of these corpora is as long as every other: nothing was tested"


@settings(max_examples=20, deadline=None)
@given(shares=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2), seed=st.integers(0, 99))
def test_shares_of_the_mixture_are_met_on_the_way(shares: list[float], seed: int) -> None:
    with corpus_of(13) as corpus:
        mixture = dict(zip(("web", "code"), shares, strict=True))
        batches = Batches(corpus, mixture, 4, 4 * 8, seed)
        seen: Counter[str] = Counter()
        for step in range(1, 121):
            seen.update(batches.batch(step - 1).domains_B)
            # evenly spread: a domain is never more than two rows (one at either end of the stretch) off its share,
            # plus 1 in 10,000 for the rounding of the pattern
            share = shares[0] / sum(shares)
            assert abs(seen["web"] - share * 8 * step) <= 2 + 1e-4 * 8 * step


def test_a_share_of_nothing_is_not_read_and_an_unknown_domain_is_named() -> None:
    with corpus_of(15) as corpus:
        assert set(Batches(corpus, {"web": 1, "code": 0}, 4, 400, 0).batch(0).domains_B) == {"web"}
        with pytest.raises(DataError, match="no domain 'prose'"):
            Batches(corpus, {"prose": 1}, 4, 4, 0)
        with pytest.raises(DataError, match="no domain with a share"):
            Batches(corpus, {"web": 0}, 4, 4, 0)
        with pytest.raises(DataError, match="holds no row"):
            Batches(corpus, {"web": 1}, 8, 7, 0)


def test_order_changes_with_epoch_and_seed() -> None:
    with corpus_of(17) as corpus:
        total = int(corpus.shard("web").starts[-1])
        one = Batches(corpus, {"web": 1}, total, total, 0)
        two = Batches(corpus, {"web": 1}, total, total, 1)
        rows = [one.batch(0).tokens_BT, one.batch(1).tokens_BT, two.batch(0).tokens_BT]
        assert not any(torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])


@pytest.mark.parametrize("domain", ["web", "chat"])
def test_heldout_reads_each_document_once_in_a_fixed_order(domain: str) -> None:
    with corpus_of(19) as corpus:
        shard = corpus.shard(domain, "heldout")
        batches = list(heldout(corpus, domain, 60))
        assert all(equal(a, b) for a, b in zip(batches, heldout(corpus.folder, domain, 60), strict=True))
        predicted = sum(int(b.loss_mask_BT.sum()) for b in batches)
        if domain == "web":
            cut = sum(len(b.domains_B) for b in batches) - 1  # a row's end inside a document keeps its target
            assert predicted == len(shard.tokens_N) - shard.documents
            assert cut >= 0
        else:
            firsts = shard.mask_N[shard.starts[:-1]].sum()  # a response that begins an example has nothing before it
            assert predicted == int(shard.mask_N.sum()) - int(firsts)
        assert sum(len(b.domains_B) for b in heldout(corpus, domain, 60, limit_tokens=130)) == 2


def test_what_a_reader_sees_of_damage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no corpus here"):
        Corpus.open(tmp_path)
    with corpus_of(21) as corpus:
        file = corpus.folder / "web" / "train.tokens"
        file.write_bytes(file.read_bytes()[:-2])
        with pytest.raises(DataError, match="disagree"):
            Corpus.open(corpus.folder).shard("web")
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(DataError, match="truncated"):
            Corpus.open(corpus.folder).shard("web")
        file.unlink()
        with pytest.raises(DataError, match="missing"):
            Corpus.open(corpus.folder).shard("web")
        for text in ("{", "[" * 100_000):
            (corpus.folder / "corpus.json").write_text(text)
            with pytest.raises(DataError, match="damaged"):
                Corpus.open(corpus.folder)


def test_a_large_vocabulary_takes_wide_tokens(tmp_path: Path) -> None:
    ids = [99_999, 70_000, 1]
    corpus = write_tokens(tmp_path / "c", {"web": {"train": [ids]}}, vocab_size=100_000, eos_id=1)
    assert Batches(corpus, {"web": 1}, 3, 3, 0).batch(0).tokens_BT.tolist() == [ids]
    with pytest.raises(DataError, match="outside"):
        write_tokens(tmp_path / "d", {"web": {"train": [[100_000]]}}, vocab_size=100_000, eos_id=1)
    assert not (tmp_path / "d").exists()


def test_ids_that_the_vocabulary_lacks_are_found_where_they_are_read(tmp_path: Path) -> None:
    documents = {"web": {"train": random_documents(1, 40, 60), "heldout": random_documents(2, 5, 60)}}
    write_tokens(tmp_path / "corpus", documents, vocab_size=VOCAB, eos_id=EOS)
    file = tmp_path / "corpus" / "web" / "train.tokens"
    raw = bytearray(file.read_bytes())
    raw[20:40] = b"\xff" * 20
    file.write_bytes(raw)
    damaged = Corpus.open(tmp_path / "corpus")
    with pytest.raises(DataError, match="damaged: token 65535 in a vocabulary of"):
        damaged.check()
    batches = Batches(damaged, {"web": 1.0}, 64, 256, seed=1)
    with pytest.raises(DataError, match="damaged: token 65535"):
        _ = [batches.batch(step) for step in range(200)]
