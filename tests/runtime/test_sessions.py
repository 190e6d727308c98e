"""Sessions over one model: forked, rewound, saved and restored ones give an unbroken one's logits, bit for bit."""

from __future__ import annotations

import gc
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moec.compiler.errors import RunError
from moec.targets.xnnpack.session import CpuSession
from tests.runtime import runtime_model as m
from tests.variants import quick

HEADER, PIECE = 120, 1 << 16  # bytes, session_file.h
LEAST_MAPPED, PAGE = 32 << 10, 16 << 10  # bytes, shared_pages.h
PART = m.S * m.KV * m.HEAD * 4  # bytes of one of the two caches of the model with fp32 caches


@pytest.fixture(scope="module", params=quick(["f32", "int8", "window", "int8-window"], ("f32", "int8-window")))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sessions") / "model.pte"
    kind = str(request.param)
    m.write_pte(path, int8_cache="int8" in kind, window=20 if "window" in kind else 0)
    return path


@pytest.fixture
def session(model: Path) -> Iterator[CpuSession]:
    with CpuSession(model, threads=2) as opened:
        yield opened


def _ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, m.V, count).tolist()


def _go_on(session: CpuSession, ids: list[int]) -> np.ndarray:
    """Logits of a chunk, then of single tokens."""
    return np.concatenate([session.prefill(ids[:10], "all"), *(session.decode(i)[None] for i in ids[10:])])


def _unbroken(model: Path, prefix: list[int], rest: list[int]) -> np.ndarray:
    with CpuSession(model, threads=2) as session:
        session.prefill(prefix)
        return _go_on(session, rest)


def test_a_fork_goes_on_as_its_parent_would_have(model: Path, session: CpuSession) -> None:
    prefix, a, b = _ids(45), _ids(20, 1), _ids(20, 2)
    session.prefill(prefix)
    with session.fork() as fork:
        assert (fork.position, fork.tokens) == (45, prefix)
        np.testing.assert_array_equal(_go_on(fork, b), _unbroken(model, prefix, b))
        np.testing.assert_array_equal(_go_on(session, a), _unbroken(model, prefix, a))
        assert (session.tokens, fork.tokens) == (prefix + a, prefix + b)


def test_forks_take_turns_token_by_token(model: Path, session: CpuSession) -> None:
    prefix = _ids(33)
    session.prefill(prefix)
    rests = [_ids(15, seed) for seed in range(5)]
    forks = [session.fork() for _ in rests]
    found = [[] for _ in rests]  # type: list[list[np.ndarray]]
    for step in range(15):
        for i, fork in enumerate(forks):
            found[i].append(fork.decode(rests[i][step]))
    for i, rest in enumerate(rests):
        with CpuSession(model, threads=2) as alone:
            alone.prefill(prefix)
            np.testing.assert_array_equal(np.stack(found[i]), np.stack([alone.decode(t) for t in rest]))
        forks[i].close()
    assert session.position == 33


def test_a_fork_outlives_its_parent_and_its_model(model: Path, session: CpuSession) -> None:
    prefix, rest = _ids(30), _ids(15, 1)
    with CpuSession(model, threads=2) as parent:
        parent.prefill(prefix)
        fork = parent.fork()
    assert parent.closed
    with pytest.raises(RunError, match="closed"):
        parent.fork()
    second = fork.fork()
    fork.close()
    np.testing.assert_array_equal(_go_on(second, rest), _unbroken(model, prefix, rest))
    second.close()


def test_forks_in_threads(model: Path, session: CpuSession) -> None:
    prefix = _ids(40)
    session.prefill(prefix)
    rests = [_ids(18, seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda rest: _go_on(session.fork(), rest), rests))
    for rest, logits in zip(rests, found, strict=True):
        np.testing.assert_array_equal(logits, _unbroken(model, prefix, rest))


def test_weights_are_there_once(model: Path, session: CpuSession) -> None:
    """Sixteen forks map the file no more often than one session, and take the caches of their own positions."""
    session.prefill(_ids(10))
    gc.collect()  # what other tests of this file left open of it
    maps = Path("/proc/self/maps").read_text().count(str(model))
    forks = [session.fork() for _ in range(16)]
    for fork in forks:
        fork.decode(1)
    assert Path("/proc/self/maps").read_text().count(str(model)) == maps > 0
    for fork in forks:
        fork.close()


@pytest.mark.parametrize("position", [0, 1, 15, 16, 31, 59, 60])
def test_rewound_anywhere(model: Path, session: CpuSession, position: int) -> None:
    prefix, rest = _ids(60), _ids(20, 1)
    session.prefill(prefix)
    session.rewind(position)
    assert (session.position, session.tokens) == (position, prefix[:position])
    with CpuSession(model, threads=2) as fresh:
        if position:
            fresh.prefill(prefix)  # in the same chunks
            fresh.rewind(position)
        np.testing.assert_array_equal(_go_on(session, rest), _go_on(fresh, rest))
    with pytest.raises(RunError, match=rf"position {position + 21}: the session holds {position + 20} tokens"):
        session.rewind(position + 21)
    with pytest.raises(RunError, match="position -1"):
        session.rewind(-1)


def test_rewound_to_the_end_of_a_chunk_is_as_if_the_rest_had_never_been(model: Path, session: CpuSession) -> None:
    prefix, rest = _ids(48), _ids(20, 1)
    session.prefill(prefix)
    session.prefill(_ids(100, 3))
    session.rewind(48)
    np.testing.assert_array_equal(_go_on(session, rest), _unbroken(model, prefix, rest))


def test_saved_and_restored(model: Path, session: CpuSession, tmp_path: Path) -> None:
    prefix, rest = _ids(45), _ids(20, 1)
    session.prefill(prefix)
    session.save(tmp_path / "one.session")
    expected = _go_on(session, rest)
    session.restore(tmp_path / "one.session")
    assert (session.position, session.tokens) == (45, prefix)
    np.testing.assert_array_equal(_go_on(session, rest), expected)
    with CpuSession(model, threads=2) as other:
        other.prefill(_ids(100, 7))
        other.restore(tmp_path / "one.session")
        np.testing.assert_array_equal(_go_on(other, rest), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["one.session"]


RESTORE = """
import sys
from pathlib import Path
import numpy as np
from moec.targets.xnnpack.session import CpuSession
model, saved, out = sys.argv[1:4]
with CpuSession(Path(model), threads=1) as session:
    session.restore(saved)
    rest = [int(i) for i in sys.argv[4:]]
    np.save(out, np.stack([session.decode(i) for i in rest]))
"""


def test_restored_in_another_process(model: Path, session: CpuSession, tmp_path: Path) -> None:
    session.prefill(_ids(37))
    session.save(tmp_path / "s")
    rest = _ids(8, 1)
    command = [sys.executable, "-c", RESTORE, str(model), str(tmp_path / "s"), str(tmp_path / "out.npy")]
    subprocess.run([*command, *map(str, rest)], check=True, timeout=120)
    expected = np.stack([session.decode(i) for i in rest])
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


@pytest.mark.parametrize("count", [0, 1, m.S])
def test_an_empty_and_a_full_session(session: CpuSession, tmp_path: Path, count: int) -> None:
    if count:
        session.prefill(_ids(count))
    session.save(tmp_path / "s")
    fork = session.fork()
    session.reset()
    session.restore(tmp_path / "s")
    assert session.position == fork.position == count
    for full in (session, fork):
        if count == m.S:
            with pytest.raises(RunError, match=f"do not fit: the context holds {m.S}"):
                full.decode(1)
            full.rewind(m.S - 1)
    np.testing.assert_array_equal(session.decode(1), fork.decode(1))
    fork.close()


def test_what_a_file_takes_is_its_tokens(session: CpuSession, tmp_path: Path) -> None:
    sizes = []
    for count in (10, 20):
        session.reset()
        session.prefill(_ids(count))
        session.save(tmp_path / "s")
        sizes.append((tmp_path / "s").stat().st_size - HEADER)
    assert sizes[1] == 2 * sizes[0] > 0


def _header(data: bytearray, offset: int, value: bytes) -> None:
    """Change a header and make its digest fit, as whoever forges one would."""
    data[offset : offset + len(value)] = value
    data[112:120] = struct.pack("<Q", xxh64(bytes(data[:112])))


def xxh64(data: bytes | bytearray) -> int:
    """XXH64, seed 0, from its specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md): one slow line a step."""
    p1, p2, p3, p4, p5 = (
        0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5,
    )  # fmt: skip
    word = (1 << 64) - 1

    def rotate(x: int, n: int) -> int:
        return (x << n | x >> (64 - n)) & word

    def lane(acc: int, value: int) -> int:
        return rotate((acc + value * p2) & word, 31) * p1 & word

    whole = len(data) // 32 * 32
    if whole:
        acc = [(p1 + p2) & word, p2, 0, -p1 & word]
        for at in range(0, whole, 32):
            acc = [lane(a, v) for a, v in zip(acc, struct.unpack_from("<4Q", data, at), strict=True)]
        h = sum(rotate(a, n) for a, n in zip(acc, (1, 7, 12, 18), strict=True)) & word
        for a in acc:
            h = ((h ^ lane(0, a)) * p1 + p4) & word
    else:
        h = p5
    h, rest = (h + len(data)) & word, data[whole:]
    while len(rest) >= 8:
        h, rest = (rotate(h ^ lane(0, struct.unpack_from("<Q", rest)[0]), 27) * p1 + p4) & word, rest[8:]
    if len(rest) >= 4:
        h, rest = (rotate(h ^ struct.unpack_from("<I", rest)[0] * p1 & word, 23) * p2 + p3) & word, rest[4:]
    for byte in rest:
        h = rotate(h ^ byte * p5 & word, 11) * p1 & word
    h = (h ^ h >> 33) * p2 & word
    h = (h ^ h >> 29) * p3 & word
    return h ^ h >> 32


def states_of(data: bytes | bytearray, parts: int) -> list[slice]:
    """Where the states of a saved session lie whose `parts` are of one size, as session_file.h and shared_pages.h
    describe it; the tests' models have caches whose sizes are multiples of a page in one arena."""
    tokens, total = struct.unpack_from("<2Q", data, 88)
    size, at, found = total // parts, HEADER + 4 * tokens, []
    for part in range(parts):
        if size >= LEAST_MAPPED:
            at += (part * PART - at) % PAGE
        found.append(slice(at, at + size))
        at += size
    return found


def file_digest(data: bytes | bytearray, parts: int = 2) -> int:
    """Of a saved session's tokens and states."""
    states = b"".join(data[place] for place in states_of(data, parts))
    pieces = (xxh64(states[at : at + PIECE]) for at in range(0, len(states), PIECE))
    tokens = data[HEADER : HEADER + 4 * struct.unpack_from("<Q", data, 88)[0]]
    return xxh64(tokens + b"".join(struct.pack("<Q", piece) for piece in pieces))


def test_the_digests_are_xxh64(session: CpuSession, tmp_path: Path) -> None:
    """Of every length modulo the block of 32 bytes, and of several pieces: another reader finds the same."""
    assert (xxh64(b""), xxh64(b"a"), xxh64(b"abc")) == (0xEF46DB3751D8E999, 0xD24EC4F1A98C6E5B, 0x44BC2CF5AD770999)
    for count in (1, 3, 7, 8):
        session.reset()
        session.prefill(_ids(count))
        session.save(tmp_path / "s")
        data = (tmp_path / "s").read_bytes()
        assert struct.unpack_from("<2Q", data, 104) == (file_digest(data), xxh64(data[:112]))


@pytest.mark.parametrize("model", ["f32"], indirect=True)
@pytest.mark.parametrize("byte", [0, PIECE - 1, PIECE, -1])
def test_damage_is_found_in_every_piece(session: CpuSession, tmp_path: Path, byte: int) -> None:
    session.prefill(_ids(251))
    session.save(tmp_path / "s")
    data = bytearray((tmp_path / "s").read_bytes())
    places = states_of(data, 2)
    where = [at for place in places for at in range(place.start, place.stop)]
    assert len(where) > PIECE
    assert places[-1].stop == len(data)
    assert struct.unpack_from("<Q", data, 104)[0] == file_digest(data)
    data[where[byte]] ^= 1
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(RunError, match="damaged: its contents differ from its digest"):
        session.restore(tmp_path / "s")


DAMAGES: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "empty": (lambda d: d.clear(), "is not a session that moec saved"),
    "another kind": (lambda d: d.__setitem__(0, 0), "is not a session that moec saved"),
    "cut header": (lambda d: d.__delitem__(slice(100, None)), "is not a session that moec saved"),
    "cut": (lambda d: d.pop(), "damaged: .* bytes are not what its header announces"),
    "longer": (lambda d: d.append(0), "damaged: .* bytes are not what its header announces"),
    "a bit of the header": (lambda d: d.__setitem__(90, d[90] ^ 1), "damaged: its header differs from its digest"),
    "a bit of a token": (lambda d: d.__setitem__(HEADER, d[HEADER] ^ 1), "damaged: its contents differ"),
    "a bit of the states": (lambda d: d.__setitem__(-1, d[-1] ^ 1), "damaged: its contents differ"),
    "version": (lambda d: _header(d, 8, struct.pack("<I", 1)), r"was saved by another version of moec \(format 1\)"),
    "artifact": (lambda d: _header(d, 16, b"f" * 64), "was saved with another artifact"),
    "context": (lambda d: _header(d, 80, struct.pack("<Q", 512)), "damaged: its states are not those of this model"),
    "tokens": (lambda d: _header(d, 88, struct.pack("<Q", 1 << 61)), "holds 2305843009213693952 tokens; the context"),
    "states": (lambda d: _header(d, 96, struct.pack("<Q", 1 << 61)), "damaged: .* bytes are not what its header"),
    "an id": (
        lambda d: d.__setitem__(slice(HEADER, HEADER + 4), b"\xff\xff\xff\x7f"),
        "damaged: token id 2147483647 is not",
    ),
    "a negative id": (lambda d: d.__setitem__(slice(HEADER, HEADER + 4), b"\xff" * 4), "damaged: token id -1 is not"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_the_session_is_as_it_was(
    session: CpuSession, tmp_path: Path, damage: str
) -> None:
    change, message = DAMAGES[damage]
    session.prefill(_ids(20))
    session.save(tmp_path / "s")
    data = bytearray((tmp_path / "s").read_bytes())
    change(data)
    (tmp_path / "s").write_bytes(data)
    session.reset()
    kept, rest = _ids(30, 4), _ids(15, 5)
    session.prefill(kept)
    with session.fork() as twin:
        with pytest.raises(RunError, match=rf"^\S*/s: {message}") as raised:
            session.restore(tmp_path / "s")
        assert raised.value.remedy
        assert "\n" not in str(raised.value)
        assert session.tokens == kept
        np.testing.assert_array_equal(_go_on(session, rest), _go_on(twin, rest))


def test_a_session_of_another_model(session: CpuSession, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pte"
    m.write_pte(other, delegate=True)
    session.prefill(_ids(20))
    session.save(tmp_path / "s")
    with CpuSession(other, threads=2) as foreign, pytest.raises(RunError, match="was saved with another artifact"):
        foreign.restore(tmp_path / "s")


@pytest.mark.parametrize("what", ["missing", "folder", "pipe", "device", "null byte"])
def test_no_file_to_restore(session: CpuSession, tmp_path: Path, what: str) -> None:
    place = {"device": Path("/dev/zero"), "null byte": Path("a\0b")}.get(what, tmp_path / what)
    if what == "folder":
        place.mkdir()
    if what == "pipe":
        os.mkfifo(place)
    with pytest.raises(RunError, match=r"cannot be read|is not a regular file|null byte"):
        session.restore(place)


def test_files_that_are_not_ours_are_not_replaced(session: CpuSession, tmp_path: Path) -> None:
    session.prefill([1, 2])
    (tmp_path / "notes.txt").write_text("a user's")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "notes.txt")
    for name in ("notes.txt", "folder", "link"):
        with pytest.raises(RunError, match=f"{name}: exists and is not a session that moec saved; name another file"):
            session.save(tmp_path / name)
    with pytest.raises(RunError, match="cannot be written: No such file or directory"):
        session.save(tmp_path / "none" / "s")
    assert (tmp_path / "notes.txt").read_text() == "a user's"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link", "notes.txt"]


def test_a_full_disk_leaves_the_old_file(model: Path, tmp_path: Path) -> None:
    """The limit on a file's length gives what a full disk gives: a write that stops in the middle."""
    script = f"""
import resource, signal, sys
from pathlib import Path
from moec.compiler.errors import RunError
from moec.targets.xnnpack.session import CpuSession
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = Path({str(tmp_path / "s")!r})
with CpuSession(Path({str(model)!r}), threads=1) as session:
    session.prefill([1, 2, 3])
    session.save(file)
    session.prefill([4] * 200)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        session.save(file)
    except RunError as error:
        assert "cannot be written: File too large" in str(error), error
    else:
        sys.exit("saved")
    session.restore(file)
    assert session.tokens == [1, 2, 3]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_program_that_says_nothing_of_its_states(tmp_path: Path) -> None:
    """Older artifacts: forks and files carry all of every state, and only the start can be gone back to."""
    old = tmp_path / "old.pte"
    m.write_pte(old, says_states=False)
    prefix, rest = _ids(30), _ids(15, 1)
    with CpuSession(old, threads=2) as session:
        session.prefill(prefix)
        session.save(tmp_path / "s")
        with session.fork() as fork:
            expected = _unbroken(old, prefix, rest)
            np.testing.assert_array_equal(_go_on(fork, rest), expected)
            fork.restore(tmp_path / "s")
            np.testing.assert_array_equal(_go_on(fork, rest), expected)
        with pytest.raises(RunError, match="do not go back to an earlier position; reset"):
            session.rewind(10)
        session.rewind(30)
        session.rewind(0)
        np.testing.assert_array_equal(session.prefill(prefix), _first(old, prefix))


def _first(model: Path, ids: list[int]) -> np.ndarray:
    with CpuSession(model, threads=2) as session:
        return session.prefill(ids)


def test_a_closed_session(session: CpuSession, tmp_path: Path) -> None:
    session.close()
    for call in (
        session.fork,
        lambda: session.rewind(0),
        lambda: session.save(tmp_path / "s"),
        lambda: session.restore("s"),
    ):
        with pytest.raises(RunError, match="closed"):
            call()
