"""llama.cpp as a peer in quality: float weights written as GGUF, its own quantizer, its logits for token ids.

Its tools come from the same source as `llama-bench` (`llama_cpp.py`). Its logits come from the library inside pip's
`llama-cpp-python`, in a process of its own that is given ids and not text, so that both sides read the same tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers import llama_cpp

from moec.analysis.verify.quality.texts import LENGTH, Chunk
from moec.compiler.errors import UserError
from moec.compiler.progress import Progress

_ISA = "avx2"  # its newer code paths fail on some machines, and what they compute differs by rounding alone
_READ = """
import json, sys
import numpy as np
from llama_cpp import Llama
file, longest = sys.argv[1], int(sys.argv[2])
model = Llama(file, n_ctx=longest, n_batch=longest, n_ubatch=longest, logits_all=True, verbose=False)
for line in sys.stdin:
    ids = json.loads(line)
    model.reset()
    model.eval(ids)
    sys.stdout.buffer.write(np.ascontiguousarray(model.scores[: len(ids)], np.float32).tobytes())
    sys.stdout.buffer.flush()
"""


def bindings(cache: Path, progress: Progress) -> Path:
    """A folder to import `llama_cpp` from; built the first time, about ten minutes on two cores."""
    folder = cache / "llama-python"
    if (folder / "llama_cpp" / "__init__.py").exists():
        return folder
    with progress.stage("building llama-cpp-python"):
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(folder)]
        env = {**os.environ, "CMAKE_ARGS": " ".join(llama_cpp.AVX2)}
        done = subprocess.run([*command, llama_cpp.SOURCE], env=env, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise UserError(f"llama-cpp-python cannot be built: {' '.join(last)}", remedy="run without --peers")
    return folder


def write_float(gguf_file: Path, tensors: dict[str, Any], out: Path) -> None:
    """`out`: a GGUF file with the metadata of `gguf_file`, of a Llama, and the float32 `tensors` of transformers.

    llama.cpp rotates neighbouring channels where transformers rotates halves, so the rows of q and k are reordered.
    """
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    writer = gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            kind, *of = field.types
            writer.add_key_value(key, field.contents(), kind, of[-1] if of else None)
    heads = {
        "q_proj": int(reader.fields["llama.attention.head_count"].contents()),
        "k_proj": int(reader.fields["llama.attention.head_count_kv"].contents()),
    }
    layers = int(reader.fields["llama.block_count"].contents())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in tensors.items():
        value = tensor.float().numpy()
        for part, count in heads.items():
            if f".{part}." in name:
                value = value.reshape(count, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is None:
            raise UserError(f"llama.cpp has no tensor for {name}")
        writer.add_tensor(known, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance(model: Path, text: Path, out: Path, cache: Path, progress: Progress) -> None:
    """llama.cpp's importance matrix of `model` on the text, whose special tokens count, in its own pieces of 512."""
    binary = llama_cpp.build(cache, progress, isa=_ISA, program="llama-imatrix")
    if not out.exists():
        _run(
            [str(binary), "-m", str(model), "-f", str(text), "-o", str(out), "-c", str(LENGTH), "--parse-special"],
            progress,
        )


def quantize(model: Path, kind: str, out: Path, cache: Path, progress: Progress, *, matrix: Path | None = None) -> None:
    """`out`: `model` in one of llama.cpp's formats, such as Q4_K_M, by its own rules of what becomes which type."""
    binary = llama_cpp.build(cache, progress, isa=_ISA, program="llama-quantize")
    if not out.exists():
        _run([str(binary), *(["--imatrix", str(matrix)] if matrix else []), str(model), str(out), kind], progress)


def _run(command: Sequence[str], progress: Progress) -> None:
    with progress.stage(Path(command[0]).name):
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise UserError(f"{Path(command[0]).name} failed: {' '.join(last)}", remedy=f"run it: {' '.join(command)}")


class LlamaModel:
    """A GGUF file as llama.cpp runs it, float16 cache included; `moec.analysis.verify.quality.fidelity.Model`."""

    def __init__(self, name: str, file: Path, bindings: Path, vocab_size: int) -> None:
        self.name, self.bytes = name, file.stat().st_size
        self._file, self._bindings, self._vocab_size = file, bindings, vocab_size

    def logits(self, chunks: Sequence[Chunk]) -> Iterator[np.ndarray]:
        """Float32 [T, V] of each chunk in order, from an empty context."""
        command = [sys.executable, "-c", _READ, str(self._file), str(LENGTH)]
        env = {**os.environ, "PYTHONPATH": str(self._bindings)}
        with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            for chunk in chunks:
                child.stdin.write(json.dumps(list(chunk.ids)).encode() + b"\n")
                child.stdin.flush()
                count = len(chunk.ids) * self._vocab_size
                data = child.stdout.read(4 * count)
                if len(data) != 4 * count:
                    raise UserError("llama.cpp ended before it had given all logits", place=str(self._file))
                yield np.frombuffer(data, np.float32).reshape(len(chunk.ids), self._vocab_size)
            child.stdin.close()
