"""The process behind `TextTokenizer`: `python -m moec.compiler.tokenizer_worker`, messages on stdin and stdout."""

from __future__ import annotations

import os
from typing import Any

from moec.compiler.worker import serve


class _Answers:
    def __init__(self) -> None:
        self._tokenizer: Any = None

    def __call__(self, message: dict[str, Any], data: bytes) -> Any:
        from tokenizers import Tokenizer

        if "load" in message:
            tokenizer = self._tokenizer = Tokenizer.from_buffer(data)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer.get_vocab_size()
        tokenizer = self._tokenizer
        if "encode" in message:
            tokenizer.encode_special_tokens = message["as_text"]
            return list(tokenizer.encode(message["encode"], add_special_tokens=message["special"]).ids)
        if "decode" in message:
            return tokenizer.decode(message["decode"], skip_special_tokens=message["skip"])
        if "special" in message:
            return {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        if "token" in message:
            return tokenizer.id_to_token(message["token"])
        if "normalize" in message:
            change = tokenizer.normalizer
            return [change.normalize_str(text) if change else text for text in message["normalize"]]
        return tokenizer.token_to_id(message["id"])


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    serve(_Answers())
