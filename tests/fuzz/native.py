"""Coverage-guided targets in C++: tests/fuzz/native/NAME_fuzz.cpp under libFuzzer, ASan and UBSan, if there is clang.

Comments at the top of a target's file name what it needs: `// sources: A B`, the files to compile with it, and
`// seeds: NAME`, a target in Python whose `parts` are its first inputs.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
from functools import cache
from pathlib import Path

from tests.fuzz import harness

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "native"
FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]


def names() -> list[str]:
    return sorted(file.stem.removesuffix("_fuzz") for file in FOLDER.glob("*_fuzz.cpp"))


@cache
def compiler() -> tuple[str | None, str]:
    """clang with libFuzzer, or why there is none."""
    for name in ("clang++-14", "clang++", "clang++-15", "clang++-16", "clang++-17", "clang++-18", "clang++-19"):
        found = shutil.which(name)
        if found is None:
            continue
        source = "#include <cstddef>\n#include <cstdint>\n"
        source += 'extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t) { return 0; }'
        tried = subprocess.run(
            [found, *FLAGS, "-x", "c++", "-", "-o", "/dev/null"],
            input=source,
            text=True,
            capture_output=True,
            check=False,
        )
        if tried.returncode == 0:
            return found, ""
    return None, "needs clang with libFuzzer (Debian: clang-14 and libclang-rt-14-dev)"


def build(name: str, folder: Path) -> Path:
    """The program of a target."""
    found, reason = compiler()
    if found is None:
        raise RuntimeError(reason)
    file = FOLDER / f"{name}_fuzz.cpp"
    sources = [str(ROOT / source) for source in _named(name, "sources")]
    program = folder / f"{name}_fuzz"
    subprocess.run([found, *FLAGS, f"-I{ROOT}/runtime/runner", str(file), *sources, "-o", str(program)], check=True)
    return program


def _named(name: str, what: str) -> list[str]:
    lines = (FOLDER / f"{name}_fuzz.cpp").read_text("utf-8").splitlines()
    return next((line for line in lines if line.startswith(f"// {what}: ")), "").removeprefix(f"// {what}: ").split()


def _seeds(name: str, folder: Path) -> list[str]:
    """Folders of inputs to begin with: accepted ones, and those that were found before."""
    made = folder / "seeds"
    made.mkdir(exist_ok=True)
    for target in _named(name, "seeds"):
        for i, data in enumerate(importlib.import_module(f"tests.fuzz.targets.{target}").TARGET.parts(folder)):
            (made / f"{target}-{i}").write_bytes(data)
    return [str(path) for path in (made, harness.CORPUS / name) if path.is_dir()]


def run(name: str, folder: Path, seconds: float, seed: int) -> int:
    """1 if an input failed, 0 if none did or there is no compiler."""
    found, reason = compiler()
    if found is None:
        print(f"{name}: skipped: {reason}", flush=True)
        return 0
    program, grown = build(name, folder), folder / "corpus"
    grown.mkdir(exist_ok=True)
    command = [
        str(program),
        str(grown),
        *_seeds(name, folder),
        f"-max_total_time={max(1, round(seconds))}",
        f"-seed={seed % 2**31}",
    ]
    command += ["-timeout=5", "-rss_limit_mb=2048", "-print_final_stats=1", f"-artifact_prefix={folder}/failure-"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    runs = next((line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line), "?")
    print(
        f"{name}: {runs} inputs, coverage-guided: {'none failed' if done.returncode == 0 else done.stderr[-2000:]}",
        flush=True,
    )
    return int(done.returncode != 0)
