"""llama.cpp as a peer: built from the source inside pip's `llama-cpp-python`, run through its own `llama-bench`.

The models are random weights of our shapes in llama.cpp's own default 4-bit format (Q4_0, embedding included):
a MobileMoE as `glm4moe` (the same layer structure: sigmoid router with selection bias, normalised top-k with a scale,
one shared expert, pre-norm attention), a dense one as `llama`. Speed does not depend on the values, but routing does:
router and activations are scaled so that tokens spread over the experts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.errors import MissingExtra, UserError
from moec.compiler.progress import Progress
from moec.sources.decoder.config import DecoderConfig

SOURCE = "llama-cpp-python==0.3.36"
GGUF = "llama-2.gguf"  # the number changes with the weights that `write_gguf` draws: older files are not used
BLOCK = 32  # Q4_0: one float16 scale and 32 nibbles


AVX2 = ("-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_BMI2=ON")


def build(cache: Path, progress: Progress, *, isa: str = "native", program: str = "llama-bench") -> Path:
    """Path of a binary such as `llama-bench`; downloads and builds it (about ten minutes on two cores) the first time.

    `isa`: "native" lets ggml use everything the machine has; "avx2" holds it to AVX2 + FMA + F16C.
    """
    binary = cache / f"llama-{isa}" / "bin" / program
    if binary.exists():
        return binary
    cache.mkdir(parents=True, exist_ok=True)
    with progress.stage(f"building {program} of llama.cpp ({isa})"):
        source = _source(cache)
        flags = list(AVX2) if isa == "avx2" else ["-DGGML_NATIVE=ON"]
        bin_dir = Path(sys.executable).parent
        env = {**os.environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
        out = cache / f"llama-{isa}"
        off = ["LLAMA_CURL", "LLAMA_OPENSSL", "BUILD_SHARED_LIBS", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_SERVER"]
        flags += ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in off)]
        configure = ["cmake", "-S", str(source), "-B", str(out), "-G", "Ninja", *flags]
        for command in (configure, ["cmake", "--build", str(out), "--target", program]):
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                tail = (done.stderr or done.stdout).strip().splitlines()[-1:]
                raise UserError(
                    f"building llama.cpp failed: {' '.join(tail)}",
                    place=str(out),
                    remedy="see the output of cmake there",
                )
    return binary


def _source(cache: Path) -> Path:
    found = sorted(cache.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if found:
        return found[0]
    with tempfile.TemporaryDirectory(dir=cache) as temp:
        # --no-build-isolation: pip asks the source for its metadata; scikit-build-core answers from the `bench` extra
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
        ]
        done = subprocess.run([*command, "-d", temp, SOURCE], capture_output=True, text=True)
        archives = list(Path(temp).glob("*.tar.gz"))
        if done.returncode or not archives:
            raise UserError(
                f"cannot download the source of {SOURCE}",
                remedy="check the package index, or put its folder in " + str(cache),
            )
        with tarfile.open(archives[0]) as archive:
            # Pythons before 3.11.4 have no filters
            filtered: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(cache, **filtered)
    return next(iter(sorted(cache.glob("llama_cpp_python-*/vendor/llama.cpp"))))


def write_gguf(config: DecoderConfig, path: Path, *, seed: int = 0) -> None:
    """Random Q4_0 weights of `config`'s shape, norms and router in float32, streamed tensor by tensor."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra(
            "writing a model for llama.cpp needs the package gguf", remedy="pip install 'moec[bench]'"
        ) from None

    rng = np.random.default_rng(seed)
    moe = config.moe
    arch = "glm4moe" if moe else "llama"
    writer = gguf.GGUFWriter(path, arch, use_temp_file=False)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.layers)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope.theta))
    writer.add_layer_norm_rms_eps(float(config.norm_eps))
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if moe:
        writer.add_feed_forward_length(moe.expert_width * moe.top_k)
        writer.add_expert_count(moe.experts)
        writer.add_expert_used_count(moe.top_k)
        writer.add_expert_feed_forward_length(moe.expert_width)
        writer.add_expert_shared_count(moe.shared_width // moe.expert_width)
        writer.add_expert_weights_scale(float(moe.scale))
        writer.add_expert_weights_norm(True)
        writer.add_leading_dense_block_count(0)
    else:
        writer.add_feed_forward_length(config.ffn_width)

    d, heads, kv, hd = config.d_model, config.heads, config.kv_heads, config.head_dim
    quantized: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (config.vocab_size, d))]
    plain: list[tuple[str, np.ndarray]] = [("output_norm.weight", np.ones(d, np.float32))]
    for i in range(config.layers):
        b = f"blk.{i}"
        plain += [(f"{b}.attn_norm.weight", np.ones(d, np.float32))]
        quantized += [(f"{b}.attn_q.weight", (heads * hd, d)), (f"{b}.attn_k.weight", (kv * hd, d))]
        quantized += [(f"{b}.attn_v.weight", (kv * hd, d)), (f"{b}.attn_output.weight", (d, heads * hd))]
        if not moe:
            plain += [(f"{b}.ffn_norm.weight", np.ones(d, np.float32))]
            quantized += [
                (f"{b}.ffn_gate.weight", (config.ffn_width, d)),
                (f"{b}.ffn_up.weight", (config.ffn_width, d)),
            ]
            quantized += [(f"{b}.ffn_down.weight", (d, config.ffn_width))]
            continue
        plain += [(f"{b}.post_attention_norm.weight", np.ones(d, np.float32))]
        plain += [(f"{b}.ffn_gate_inp.weight", (rng.standard_normal((moe.experts, d)) / np.sqrt(d)).astype(np.float32))]
        plain += [(f"{b}.exp_probs_b.bias", (0.01 * rng.standard_normal(moe.experts)).astype(np.float32))]
        f, s = moe.expert_width, moe.shared_width
        quantized += [
            (f"{b}.ffn_gate_exps.weight", (moe.experts, f, d)),
            (f"{b}.ffn_up_exps.weight", (moe.experts, f, d)),
        ]
        quantized += [(f"{b}.ffn_down_exps.weight", (moe.experts, d, f))]
        quantized += [
            (f"{b}.ffn_gate_shexp.weight", (s, d)),
            (f"{b}.ffn_up_shexp.weight", (s, d)),
            (f"{b}.ffn_down_shexp.weight", (d, s)),
        ]

    q4_0 = gguf.GGMLQuantizationType.Q4_0
    for name, shape in quantized:
        stored = (*shape[:-1], shape[-1] // BLOCK * 18)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=q4_0)
    for name, value in plain:
        writer.add_tensor_info(name, value.shape, value.dtype, value.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape in quantized:
        writer.write_tensor_data(_random_q4_0(rng, shape))
    for _, value in plain:
        writer.write_tensor_data(value)
    writer.close()


def _random_q4_0(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [..., 18 * K / 32]: nibbles uniform in [-7, 7], scales such that a row has variance 1 / K.

    With -8 among them their mean would not be 0: each product would stretch the direction of equal numbers by a
    multiple, all tokens would soon be that direction, and select the same few experts.
    """
    blocks = int(np.prod(shape)) // BLOCK
    nibbles = rng.integers(1, 16, size=(2, blocks, 18), dtype=np.uint8)  # stored with 8 added
    data = nibbles[0] | nibbles[1] << 4
    # a uniform number of -7, ..., 7 has standard deviation 4.32
    scale = np.float16(1.0 / (4.32 * np.sqrt(shape[-1])))
    data[:, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    return data.reshape(*shape[:-1], -1)


@dataclass(frozen=True)
class Run:
    """One llama-bench process: tokens per second, the process's peak resident memory, its whole time in seconds."""

    tokens_per_s: float
    peak_rss_mb: float
    wall_s: float


def run(
    binary: Path,
    model: Path,
    *,
    prefill: int = 0,
    decode: int = 0,
    context: int = 0,
    threads: int = 2,
    warm_up: bool = True,
    repeats: int = 1,
    repack: bool = True,
    within: Callable[[list[str]], list[str]] | None = None,
) -> Run:
    """`prefill` or `decode` tokens (not both) after `context` tokens in the cache: the median of the repeats.

    repack: let it copy weights into an order of its own, out of the mapped file. within: makes another command of it.
    """
    command = [
        str(binary),
        "-m",
        str(model),
        "-t",
        str(threads),
        "-p",
        str(prefill),
        "-n",
        str(decode),
        "-d",
        str(context),
    ]
    command += ["-lm", "mmap", *([] if warm_up else ["--no-warmup"]), *([] if repack else ["--repack", "0"])]
    command += ["-r", str(repeats), "-o", "json"]
    if within is not None:
        command = within(command)
    with tempfile.TemporaryFile() as out:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:  # a group that it is in is removed next
            child.kill()
            child.wait()
            raise
        wall_s = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode()
    if child.returncode:
        raise UserError(
            f"llama-bench ended with status {child.returncode}",
            place=str(model),
            remedy="run it by hand: " + " ".join(command),
        )
    (row,) = json.loads(text)
    return Run(tokens_per_s=statistics.median(row["samples_ts"]), peak_rss_mb=usage.ru_maxrss / 1024, wall_s=wall_s)
