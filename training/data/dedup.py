"""Documents that repeat an earlier one, exactly or nearly, found in one pass with a fixed amount of memory for each.

Exactly: equal after lower-casing and joining runs of white space (a 128-bit digest each). Nearly: the share of common
five-word shingles (Jaccard) is estimated to be at least 0.8, by MinHash with one permutation and optimal densification
(Shrivastava 2017), 128 bins; bands of 8 bins find the candidates (Leskovec et al., ch. 3), all bins decide. A pair at
0.8 is found with probability 1 - (1 - 0.8^8)^16 = 0.95, one at 0.5 becomes a candidate with 0.06, and is then judged on
128 bins. Texts below 20 words are compared exactly only: so few shingles say nothing about likeness.
"""

from __future__ import annotations

import re
from hashlib import blake2b

import numpy as np

_WORDS = re.compile(r"\w+")
_SHINGLE = 5
_FEWEST_WORDS = 20
_BINS, _BAND = 128, 8
_LIKE = 0.8
_U64 = np.uint64


class Deduplicator:
    """`is_new(text)` for one document after the other. `exact` and `near` count what was turned away."""

    def __init__(self) -> None:
        self.exact = self.near = 0
        self._digests: set[bytes] = set()
        self._words: dict[str, int] = {}
        self._signatures: list[np.ndarray] = []
        self._bands: list[dict[bytes, int]] = [{} for _ in range(_BINS // _BAND)]

    def is_new(self, text: str, *, near: bool = True) -> bool:
        """Whether no earlier document equals `text` or, if `near`, is nearly equal to it. New ones are remembered."""
        words = _WORDS.findall(text.lower())
        plain = " ".join(text.lower().split())
        digest = blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._digests:
            self.exact += 1
            return False
        self._digests.add(digest)
        if not near or len(words) < _FEWEST_WORDS:
            return True
        signature = self._signature(words)
        keys = [band.tobytes() for band in signature.reshape(-1, _BAND)]
        candidates = {found for key, table in zip(keys, self._bands, strict=True) if (found := table.get(key, -1)) >= 0}
        if any(float((self._signatures[i] == signature).mean()) >= _LIKE for i in candidates):
            self.near += 1
            return False
        for key, table in zip(keys, self._bands, strict=True):
            table.setdefault(key, len(self._signatures))
        self._signatures.append(signature)
        return True

    def _signature(self, words: list[str]) -> np.ndarray:
        """uint32 [128]: per bin the least hash of the shingles that fall into it."""
        ids = np.fromiter((self._word(word) for word in words), _U64, len(words))
        count = len(ids) - _SHINGLE + 1
        shingles = np.zeros(count, _U64)
        for place in range(_SHINGLE):
            shingles = shingles * _U64(0x9E3779B97F4A7C15) + ids[place : place + count]
        hashes = _mixed(shingles)
        least = np.full(_BINS, np.iinfo(np.uint32).max, np.uint32)
        np.minimum.at(least, (hashes >> _U64(57)).astype(np.int64), (hashes & _U64(0xFFFFFFFE)).astype(np.uint32))
        return _densified(least)

    def _word(self, word: str) -> int:
        found = self._words.get(word)
        if found is None:
            found = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
            if len(self._words) < 1 << 20:  # bounds the memory; rarer words are hashed again
                self._words[word] = found
        return found


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def _probes() -> np.ndarray:
    """For each bin the others in an order of its own, int64 [bins, bins]: where an empty bin borrows its value."""
    return np.argsort(_mixed(np.arange(_BINS * _BINS, dtype=_U64).reshape(_BINS, _BINS)), axis=1)


_PROBES = _probes()


def _densified(least: np.ndarray) -> np.ndarray:
    empty = least == np.iinfo(np.uint32).max
    if not empty.any():
        return least
    full_first = (~empty)[_PROBES[empty]].argmax(axis=1)
    filled = least.copy()
    filled[empty] = least[_PROBES[empty, full_first]]
    return filled
