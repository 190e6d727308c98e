"""Runs the native files of an aarch64 wheel under qemu, on an artifact that this machine compiled.

    python tools/try_wheel_arm.py dist --executorch FOLDER [--work build/wheel-arm]

FOLDER holds the aarch64 wheel of executorch, unpacked. The wheel is unpacked beside it, as pip would put them; nothing
tells the loader where ExecuTorch is. The runner generates with every instruction set, and the application library, by
its header and the program of docs/app.md, answers in text; both say what they say on this machine. No Python of that
machine is run: the commands `moec ...` are not tried here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from try_wheel import TEMPLATE, Failed, newest

ROOT = Path(__file__).resolve().parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
SYSTEM = "/usr/aarch64-linux-gnu"  # where Debian puts that machine's C library
SETS = ("i8mm", "neon", "scalar")
IDS = " ".join(str(2 + 31 * i % 4000) for i in range(40))
QUESTION = "Name a city."


def run(command: Sequence[str | Path], *, stdin: str = "", **env: str) -> str:
    """What the command wrote to stdout. Failed unless its status is 0."""
    done = subprocess.run(
        [str(part) for part in command],
        input=stdin,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=900,
        check=False,
    )
    if done.returncode:
        raise Failed(f"$ {' '.join(map(str, command))}\nstatus {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def artifact(work: Path) -> Path:
    """The tiny model with a chat template, compiled here."""
    moec = Path(sys.executable).parent / "moec"
    spec, weights, out = ROOT / "specs" / "models" / "mobilemoe-tiny.yaml", work / "weights", work / "artifact"
    run([moec, "checkpoint", "synthesize", spec, "--out", weights, "--qat"])
    (weights / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    run([moec, "compile", spec, "--checkpoint", weights, "--out", out])
    return out


def installed(wheel: Path, executorch: Path, work: Path) -> Path:
    """The folder of packages with the wheel's files, the programs executable, and ExecuTorch beside them."""
    site = work / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        for entry in archive.infolist():
            (site / entry.filename).chmod(entry.external_attr >> 16 & 0o777)
    (site / "executorch").symlink_to(executorch.resolve() / "executorch")
    return site / "moec" / "runtime"


def generated(runner: Sequence[str | Path], model: Path, **env: str) -> list[int]:
    """Twelve ids after forty."""
    said = run([*runner, model, "--tokens", "-", "--decode", "12", "--threads", "1", "--json"], stdin=IDS, **env)
    return list(json.loads(said)["generated"])


def answer(compiler: str, emulator: Sequence[str], runtime: Path, build: Path, work: Path, model: Path) -> str:
    """What the program of docs/app.md answers, linked with the library in `build`."""
    source = (ROOT / "docs" / "app.md").read_text("utf-8").split("```c\n", 1)[1].split("```", 1)[0]
    (work / "app.c").write_text(source)
    program = work / f"app-{Path(compiler).name}"
    command = [compiler, "-std=c99", "-I", runtime / "include", work / "app.c", build / "libmoec_runtime.so"]
    run([*command, f"-Wl,-rpath,{build}", "-Wl,--allow-shlib-undefined", "-o", program])
    return run([*emulator, program, model, QUESTION])


def check(wheel: Path, executorch: Path, work: Path) -> None:
    from moec.runtime import native

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    runtime = installed(wheel, executorch, work)
    build = runtime / "shipped"
    folder = artifact(work)
    model = folder / "model.pte"
    emulator = [EMULATOR, "-cpu", "max", "-L", SYSTEM]
    here = generated([native.runner_binary()], model)
    for name in SETS:
        there = generated([*emulator, build / "moec_runner"], model, MOEC_ISA=name)
        if there != here:
            raise Failed(f"the runner generates {there} with {name}, and {here} on this machine")
        print(f"  moec_runner, {name}: the ids of this machine", flush=True)
    # not compared with this machine: last bits of fp32 sums differ between instruction sets (scalar and AVX2 answer
    # otherwise on one x86-64 machine, too), and random weights make another text of them
    said = [answer(COMPILER, emulator, runtime, build, work, folder) for _ in range(2)]
    if not said[0].strip() or said[0] != said[1]:
        raise Failed(f"the application library answers {said[0]!r}, and then {said[1]!r}")
    print("  the program of docs/app.md: an answer, twice the same", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="a wheel, or a folder of them")
    parser.add_argument("--executorch", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wheel-arm")
    given = parser.parse_args()
    try:
        if missing := [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]:
            raise Failed(f"{missing[0]} is missing (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)")
        wheel = newest(given.wheel, "aarch64")
        check(wheel, given.executorch, given.work.resolve())
    except Failed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    print(f"{wheel.name}: its native files work under emulation; Python was not run there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
