"""The C API of applications (`runtime/include/moec.h`) for tests: ids in Python, faults as `AppError`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from moec.runtime.native import runtime_library

I32, I64, F64, TEXT = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_char_p
PLAIN, AS_TEXT, SPECIAL, SEGMENTS, TOOLS = 1, 2, 4, 8, 16
STOPPED = ("running", "stop token", "stop string", "length", "context", "cancelled", "failed", "complete")
PIECE = ctypes.CFUNCTYPE(I32, ctypes.c_void_p, ctypes.c_char_p, I64)


ALLOWED = ctypes.CFUNCTYPE(I32, ctypes.c_void_p, ctypes.c_void_p, I64)
TAKE = ctypes.CFUNCTYPE(I32, ctypes.c_void_p, I32)
REASON = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)  # gives the address of a text


class AppError(Exception):
    """What `moec_app_error` says."""


class OpenOptions(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32), ("threads", I32), ("memory_bytes", I64)]


class Info(ctypes.Structure):
    _fields_ = [
        *[("size", ctypes.c_uint32), ("has_chat", I32), ("vocabulary", I64), ("context", I64), ("threads", I64)],
        *[("rewinds", I32), ("has_calls", I32), ("thinks", I32), ("speculates", I32)],
        *[("has_tools", I32), ("reserved", I32)],
    ]


class Message(ctypes.Structure):
    _fields_ = [("role", TEXT), ("content", TEXT)]


class Call(ctypes.Structure):
    _fields_ = [("name", TEXT), ("arguments", TEXT)]


class Turn(ctypes.Structure):
    _fields_ = [
        *[("size", ctypes.c_uint32), ("reserved", I32), ("role", TEXT), ("content", TEXT)],
        *[("calls", ctypes.POINTER(Call)), ("call_count", I64)],
    ]


class Bias(ctypes.Structure):
    _fields_ = [("token", I32), ("reserved", I32), ("bias", F64)]


class Options(ctypes.Structure):
    _fields_ = [
        *[("size", ctypes.c_uint32), ("top_k", I32), ("temperature", F64), ("top_p", F64), ("min_p", F64)],
        *[("repeat_penalty", F64), ("presence_penalty", F64), ("frequency_penalty", F64), ("seed", ctypes.c_uint64)],
        *[("max_new_tokens", I64), ("stops", ctypes.POINTER(TEXT)), ("stop_count", I64)],
        *[("biases", ctypes.POINTER(Bias)), ("bias_count", I64), ("speculate", I32), ("segments", I32)],
        *[("constraint", ctypes.c_void_p), ("top_scores", I32), ("on_full", I32), ("keep_first", I64), ("draft", I64)],
    ]


class Score(ctypes.Structure):
    _fields_ = [("token", I32), ("rank", I32), ("log_probability", F64), ("text_bytes", I64)]


class Constraint(ctypes.Structure):
    _fields_ = [
        *[("size", ctypes.c_uint32), ("reserved", I32), ("user", ctypes.c_void_p)],
        *[("allowed", ALLOWED), ("take", TAKE), ("error", REASON)],
    ]


class Segment(ctypes.Structure):
    _fields_ = [
        *[("size", ctypes.c_uint32), ("kind", I32), ("text", TEXT), ("bytes", I64), ("name", TEXT), ("arguments", TEXT)]
    ]


class Stats(ctypes.Structure):
    _fields_ = [
        *[("size", ctypes.c_uint32), ("stopped", I32), ("prompt_tokens", I64), ("reused_tokens", I64)],
        *[("new_tokens", I64), ("prefill_seconds", F64), ("decode_seconds", F64)],
        *[("drafted_tokens", I64), ("accepted_tokens", I64), ("dropped_tokens", I64)],
    ]


@cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(runtime_library()))
    ids = ctypes.POINTER(I32)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "error": (TEXT, []),
        "open": (I64, [TEXT, ctypes.c_void_p]),
        "close": (I32, [I64]),
        "describe": (I32, [I64, ctypes.c_void_p]),
        "stop_tokens": (I64, [I64, ids, I64]),
        "tokenize": (I64, [I64, TEXT, I64, I32, ids, I64]),
        "detokenize": (I64, [I64, ids, I64, I32, ctypes.c_char_p, I64]),
        "chat": (I64, [I64, ctypes.POINTER(Message), I64, ids, I64]),
        "chat_with_tools": (I64, [I64, TEXT, ctypes.POINTER(Turn), I64, ids, I64]),
        "fitting_chat": (I64, [I64, TEXT, ctypes.POINTER(Turn), I64, I64, ids, I64, ctypes.POINTER(I64)]),
        "session": (I64, [I64]),
        "fork": (I64, [I64]),
        "tokens": (I64, [I64, ids, I64]),
        "rewind": (I32, [I64, I64]),
        "save": (I32, [I64, TEXT]),
        "restore": (I32, [I64, TEXT]),
        "prefix_folder": (I32, [I64, TEXT]),
        "keep_prefix": (I32, [I64, TEXT]),
        "forget_prefix": (I32, [I64, TEXT]),
        "prefix_tokens": (I64, [I64, TEXT]),
        "prefix_warning": (I64, [I64, ctypes.c_char_p, I64]),
        "system_prompt": (I64, [I64, TEXT, TEXT, ids, I64]),
        "defaults": (I32, [I64, ctypes.c_void_p]),
        "generate": (I64, [I64, ids, I64, ctypes.c_void_p]),
        "next": (I32, [I64, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(I64)]),
        "cancel": (I32, [I64]),
        "run": (I32, [I64, PIECE, ctypes.c_void_p]),
        "splitter": (I64, [I64, ids, I64, I32]),
        "split": (I32, [I64, TEXT, I64]),
        "next_segment": (I32, [I64, ctypes.c_void_p]),
        "stats_of": (I32, [I64, ctypes.c_void_p]),
        "scores": (I64, [I64, I64, ctypes.POINTER(Score), I64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, f"moec_app_{name}")
        function.restype, function.argtypes = result, arguments
    return found


def call(name: str, *arguments: Any) -> int:
    """What a function gives; AppError where it fails."""
    found = int(getattr(library(), f"moec_app_{name}")(*arguments))
    if found < 0:
        raise AppError(library().moec_app_error().decode())
    assert library().moec_app_error() == b""
    return found


def open_artifact(folder: Path, *, threads: int = 1) -> int:
    return call("open", str(folder).encode(), ctypes.byref(OpenOptions(ctypes.sizeof(OpenOptions), threads, 0)))


def many(name: str, *arguments: Any) -> list[int]:
    """Ids of a function that writes them: asked for their number first."""
    count = call(name, *arguments, None, 0)
    ids = (I32 * max(count, 1))()
    assert call(name, *arguments, ids, count) == count
    return ids[:count]


def tokenize(artifact: int, text: str, flags: int = 0) -> list[int]:
    raw = text.encode()
    return many("tokenize", artifact, raw, len(raw), flags)


def detokenize(artifact: int, ids: Sequence[int], flags: int = 0) -> str:
    given = (I32 * max(len(ids), 1))(*ids)
    count = call("detokenize", artifact, given, len(ids), flags, None, 0)
    out = ctypes.create_string_buffer(count + 1)
    assert call("detokenize", artifact, given, len(ids), flags, out, count) == count
    return out.raw[:count].decode()


def chat(artifact: int, messages: Sequence[tuple[str, str]]) -> list[int]:
    given = (Message * len(messages))(*[Message(role.encode(), content.encode()) for role, content in messages])
    return many("chat", artifact, given, len(messages))


def turn(role: str, content: str | None, calls: Sequence[tuple[str, str | None]] = ()) -> Turn:
    given = [Call(name.encode(), None if arguments is None else arguments.encode()) for name, arguments in calls]
    text = None if content is None else content.encode()
    return Turn(ctypes.sizeof(Turn), 0, role.encode(), text, (Call * max(len(given), 1))(*given), len(given))


def chat_with_tools(artifact: int, tools: str | bytes | None, turns: Sequence[Turn]) -> list[int]:
    given = tools.encode() if isinstance(tools, str) else tools
    return many("chat_with_tools", artifact, given, (Turn * max(len(turns), 1))(*turns), len(turns))


def fitting_chat(artifact: int, tools: str | None, turns: Sequence[Turn], room: int) -> tuple[list[int], int]:
    """Ids, and how many turns were left out."""
    given, dropped = (Turn * max(len(turns), 1))(*turns), I64(-1)
    asked = artifact, None if tools is None else tools.encode(), given, len(turns), room
    count = call("fitting_chat", *asked, None, 0, None)
    ids = (I32 * max(count, 1))()
    assert call("fitting_chat", *asked, ids, count, ctypes.byref(dropped)) == count
    return ids[:count], dropped.value


def prefix_warning(artifact: int) -> str:
    count = call("prefix_warning", artifact, None, 0)
    out = ctypes.create_string_buffer(count + 1)
    assert call("prefix_warning", artifact, out, count) == count
    return out.raw[:count].decode()


def options(
    artifact: int, *, stops: Sequence[str] = (), biases: Sequence[tuple[int, float]] = (), **values: Any
) -> Options:
    """The model's defaults with other values."""
    found = Options(size=ctypes.sizeof(Options))
    call("defaults", artifact, ctypes.byref(found))
    for name, value in values.items():
        setattr(found, name, value)
    found.stops, found.stop_count = (TEXT * max(len(stops), 1))(*[s.encode() for s in stops]), len(stops)
    found.biases = (Bias * max(len(biases), 1))(*[Bias(token, 0, bias) for token, bias in biases])
    found.bias_count = len(biases)
    return found


def begin(session: int, prompt: Sequence[int], given: Options | None) -> int:
    ids = (I32 * max(len(prompt), 1))(*prompt)
    return call("generate", session, ids, len(prompt), None if given is None else ctypes.byref(given))


def pieces(generation: int, each: Callable[[str], bool] = lambda _: True) -> list[str]:
    """All pieces, by the callback, which ends the generation where `each` says so; every one is UTF-8."""
    found: list[str] = []

    def take(_: Any, piece: bytes, size: int) -> int:
        assert len(piece) == size
        found.append(piece.decode())
        return 0 if each(found[-1]) else 1

    call("run", generation, PIECE(take), None)
    return found


def stats(generation: int) -> Stats:
    found = Stats(size=ctypes.sizeof(Stats))
    call("stats_of", generation, ctypes.byref(found))
    return found


def scores(generation: int, first: int = 0) -> list[Score]:
    count = call("scores", generation, first, None, 0)
    found = (Score * max(count, 1))()
    assert call("scores", generation, first, found, count) == count
    return list(found[:count])
