"""llama.cpp as a peer: built from the source inside pip's `llama-cpp-python`, run through its own `llama-bench`.

`gguf_models.py` writes the models.
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

from moec.compiler.errors import UserError
from moec.compiler.progress import Progress

SOURCE = "llama-cpp-python==0.3.36"


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


def routing_counter(binary: Path) -> Path:
    """The program of `llama_routing.cpp`, linked with the libraries that `binary` was built from."""
    out = binary.parent.parent
    program, source = binary.parent / "llama_routing", Path(__file__).with_name("llama_routing.cpp")
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    home = _source(out.parent)
    ggml = (out / "ggml" / "src" / f"libggml{part}.a" for part in ("", "-cpu", "-base"))
    include = ["-I", home / "include", "-I", home / "ggml" / "include"]
    command = ["c++", "-O1", "-std=c++17", *include, source, "-o", program, out / "src" / "libllama.a", *ggml]
    done = subprocess.run([*map(str, command), "-fopenmp", "-lpthread", "-ldl"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"building {source.name} failed: {done.stderr.strip().splitlines()[-1:]}", place=str(out))
    return program


def routing(counter: Path, model: Path, tokens: int) -> list[list[int]]:
    """How often random tokens select each expert of each MoE layer: [layer][expert], up to the last one selected."""
    done = subprocess.run([str(counter), str(model), str(tokens)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"llama.cpp refuses it: {done.stderr.strip()[-300:]}", place=str(model))
    return list(json.loads(done.stdout))


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
