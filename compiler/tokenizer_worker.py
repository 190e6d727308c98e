"""The process behind `TextTokenizer`: `python -m moec.compiler.tokenizer_worker`, messages on stdin and stdout."""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from typing import Any, BinaryIO

from moec.compiler.tokenizer import send

_MEMORY = 8 << 30  # bytes of address space; the largest vocabularies in use need 1 GB of it


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    from tokenizers import Tokenizer

    tokenizer: Any = None
    while header := requests.read(8):
        message = json.loads(requests.read(struct.unpack("<Q", header)[0]))
        try:
            if "load" in message:
                tokenizer = Tokenizer.from_buffer(requests.read(message["load"]))
                tokenizer.no_truncation()
                tokenizer.no_padding()
            value = _answer(tokenizer, message)
        except BaseException as error:  # the library panics, which is no Exception
            lines = str(error).splitlines() or [type(error).__name__]
            send(replies, {"fault": "".join(c if c.isprintable() else "?" for c in lines[0])[:300]})
        else:
            send(replies, {"value": value})


def _answer(tokenizer: Any, message: dict[str, Any]) -> Any:
    if "load" in message:
        return tokenizer.get_vocab_size()
    if "encode" in message:
        return list(tokenizer.encode(message["encode"], add_special_tokens=message["special"]).ids)
    if "decode" in message:
        return tokenizer.decode(message["decode"], skip_special_tokens=message["skip"])
    return tokenizer.token_to_id(message["id"])


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform.startswith("linux"):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what native code prints must not be taken for a reply
    try:
        serve(sys.stdin.buffer, out)
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(0)
