"""The kernels' C API: sizes and formats at random, buffers of nearly or exactly the right length.

A mutant is the random seed of a call. Every buffer ends where an inaccessible page begins, so that an access past its
end kills the process.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Sequence
from pathlib import Path

PAGE = mmap.PAGESIZE
_SIZES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 96, 128)
_WILD = (-1, -(1 << 63), 1 << 31, (1 << 63) - 1, 1 << 40, 100_000)


class Guarded:
    """`size` bytes in front of a page without access."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        pages = -(-size // PAGE)
        self._length = (pages + 1) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._base = self._libc.mmap(None, self._length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        end = self._base + pages * PAGE
        self._libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(PAGE), 0)
        self.address, self.size = end - size, size
        ctypes.memmove(self.address, rng.randbytes(size), size)

    def close(self) -> None:
        self._libc.munmap(ctypes.c_void_p(self._base), ctypes.c_size_t(self._length))


class Kernels:
    name = "kernels"

    def seeds(self, folder: Path) -> Sequence[bytes]:
        from moec.runtime.kernel_api import library

        library()
        return [b""]

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        return rng.randbytes(8)

    def run(self, data: bytes, folder: Path) -> None:
        from moec.runtime.kernel_api import _Buffer, library

        rng, held = random.Random(data), list[Guarded]()

        def size() -> int:
            return rng.choice(_WILD) if rng.random() < 0.03 else rng.choice(_SIZES)

        def buffer(length: int) -> _Buffer:
            near = length + rng.choice((0,) * 20 + (-4, 4, -1, 1, -64))
            if not 0 < near < 1 << 20 or rng.random() < 0.01:
                return _Buffer(None, 0)
            held.append(Guarded(near, rng))
            return _Buffer(held[-1].address, near)

        def packed(n: int, k: int, form: int) -> int:
            length = ctypes.c_uint64()
            return length.value if api.moec_packed_bytes(n, k, form, ctypes.byref(length)) == 0 else 64

        api, t, n, k = library(), size(), size(), size()
        group = rng.choice((32, 32, 64, 31, 0, 1 << 20))
        kind = rng.choice((0, 1, 2, 2, 1, 3))
        form = kind | (rng.choice((0, 1 << 4, 1 << 5, 1 << 6, 3 << 4, 7 << 4)) | group << 8 if kind else 0)
        form = rng.choice((form,) * 30 + (-1, 1 << 30))
        api.moec_set_isa(rng.choice(api.moec_available_isas().split(b",")))
        try:
            which = rng.randrange(5)
            if which == 0:
                api.moec_linear(t, n, k, form, *map(buffer, (t * k * 4, packed(n, k, form), n * 4, t * n * 4)))
            elif which == 1:
                f = rng.choice((n, 16, 32, 64))
                activation = rng.randrange(-1, 7)
                parts = map(buffer, (t * k * 4, packed(2 * f, k, form), t * f * 4))
                api.moec_gated_linear(t, f, k, form, activation, *parts)
            elif which == 2:
                api.moec_embedding(t, n, k, form, *map(buffer, (t * 8, packed(n, k, form), t * k * 4)))
            else:
                count = rng.choice((1, 1, 2, size()))
                codes = n * k * (4 if kind == 0 else 1) // (2 if kind == 1 else 1)
                scales = n * k // max(group, 1) * (4 if form >> 6 & 1 else 2) if kind else 0
                parts = [count * codes, count * scales, count * packed(n, k, form)]
                if which == 3:
                    api.moec_pack(count, n, k, form, *map(buffer, parts))
                else:
                    api.moec_unpack(count, n, k, form, *map(buffer, (parts[2], *parts[:2])))
        finally:
            for part in held:
                part.close()


TARGET = Kernels()
