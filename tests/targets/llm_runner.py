"""ExecuTorch's own TextLLMRunner on an artifact: MODEL.pte TOKENIZER.json COUNT PROMPT -> one line of JSON.

A process of its own: the runner logs to stdout and keeps its operators until the end.
"""

from __future__ import annotations

import ctypes
import json
import sys

from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

from moec.runtime import kernel_api
from moec.runtime.native import kernels_library


def main(model: str, tokenizer: str, count: str, prompt: str) -> None:
    runner = TextLLMRunner(model, tokenizer)
    ctypes.CDLL(str(kernels_library()), mode=ctypes.RTLD_GLOBAL)  # registers our operators, as linking them does
    calls: list[object] = []
    kernel_api.set_trace(lambda x, indices, *rest: calls.append(indices.tolist()))
    pieces: list[str] = []
    config = GenerationConfig(echo=False, max_new_tokens=int(count), temperature=0.0, num_bos=0, num_eos=0)
    runner.generate(prompt, config, pieces.append)
    print("\n" + json.dumps({"experts": calls, "text": "".join(pieces)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
