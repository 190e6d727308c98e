"""What phone cores would do with our kernels, without a phone. `make bench-arm`; bench/README.md says how to read it.

The kernels are compiled for aarch64 and run under qemu, where a plugin counts every instruction of one call: exact and
repeatable. The loops are cut out by what was executed, and llvm-mca gives their cycles on its models of phone cores.
Results: build/bench/arm.json.

examples:
  make bench-arm
  make bench-arm BENCH_ARGS="--isa i8mm --cores neoverse-v2 --layers 128"
  make bench-arm BENCH_ARGS=--check-x86     the same prediction for this machine, beside measured time
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import core_model
import kernel_revisions
import numpy as np
import yaml
from core_model import Core, Profile
from kernel_contenders import Layer, Moec, Shape
from kernel_revisions import Case

from moec.runtime import kernel_api, native
from moec.runtime.moe_config import Kind, WeightFormat

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "runtime" / "kernels"
CORES = ("neoverse-v2", "neoverse-n2", "apple-m4", "cortex-a510")
STANDS_FOR = {
    "neoverse-v2": "Cortex-X4 and X925, which LLVM schedules by the same tables",
    "neoverse-n2": "Cortex-A715 class",
    "apple-m4": "Apple's performance cores; LLVM's tables are those of an older core with 3 vector pipes",
    "cortex-a510": "the little cores of a phone",
}
# the product whose rate is the peak of an instruction set: text for llvm-mca, multiply-accumulates of one
PRODUCTS = {
    "i8mm": ("smmla v{to}.4s, v{a}.16b, v{b}.16b", 32),
    "neon": ("sdot v{to}.4s, v{a}.16b, v{b}.4b[1]", 16),
}
GEMM = r"gemm_(?!f32|float)"  # the functions of the integer products
KNOWS_NOT = (
    "Not known here: caches, memory bandwidth and prefetch, mispredicted branches, clocks under load and heat, "
    "and how a real core differs from LLVM's tables."
)
WIDTH, GROUP = 768, 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=words, default=CORES, help=f"models of llvm-mca (default: {','.join(CORES)})")
    parser.add_argument("--isa", type=words, default=tuple(PRODUCTS), help="instruction sets (default: i8mm,neon)")
    parser.add_argument("--tokens", type=integers, default=(1, 4, 8, 9, 12, 16, 48), help="of single products")
    parser.add_argument("--layers", type=integers, default=(1, 128, 512), help="tokens of whole layers")
    parser.add_argument("--kernels", type=Path, default=KERNELS, help="the kernels' folder, of another revision")
    parser.add_argument("--check-x86", action="store_true", help="predicted beside measured time on this machine")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    given = parser.parse_args()
    core_model.find_mca()
    work = given.out / "arm"
    work.mkdir(parents=True, exist_ok=True)
    if given.check_x86:
        report: dict = {"x86": list(check_x86(work, given.kernels))}
        print_check(report["x86"])
        (given.out / "arm-check-x86.json").write_text(json.dumps(report, indent=1))
        return 0
    report = {"knows_not": KNOWS_NOT, "products": [], "layers": [], "devices": []}
    emulated = Emulated.build(work, given.kernels)
    for isa in given.isa:
        peaks = {core: Core("aarch64", core, "+i8mm,+dotprod,+fullfp16").peak(PRODUCTS[isa][0]) for core in given.cores}
        for case, macs, coded in products(given.tokens):
            profile = emulated.profile(case, isa)
            report["products"] += list(of_product(case, isa, macs, coded, profile, peaks))
        for case, tokens in layers(given.layers):
            report["layers"].append(of_layer(case, tokens, isa, emulated.profile(case, isa), given.cores))
    report["devices"] = list(predictions(report["layers"]))
    print_report(report)
    (given.out / "arm.json").write_text(json.dumps(report, indent=1))
    print(f"\nwritten: {given.out / 'arm.json'}")
    return 0


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def integers(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in words(text))
    if min(values, default=1) < 1:
        raise argparse.ArgumentTypeError("positive numbers, separated by commas")
    return values


# ---------------------------------------------------------------------------------------------------------------- cases


def products(tokens: Sequence[int]) -> Iterator[tuple[Case, int, int]]:
    """Linears of WIDTH x WIDTH with multiply-accumulates and bytes of codes: INT4, INT8 and levels of tables, groups
    along the input or the output, activations with a scale for each 32 inputs."""
    rng = np.random.default_rng(0)
    forms = {
        "INT4": WeightFormat(Kind.INT4, GROUP, int8_activations=True),
        "INT4, blocks": WeightFormat(Kind.INT4, GROUP, int8_activations=True, block_activations=True),
        "INT4, out": WeightFormat(Kind.INT4, GROUP, axis_out=True, int8_activations=True),
        "IQ4_NL": WeightFormat(Kind.IQ4_NL, GROUP, int8_activations=True),
        "NL3": WeightFormat(Kind.NL3, GROUP, int8_activations=True),
        "INT8": WeightFormat(Kind.INT8, GROUP, int8_activations=True),
    }
    bits = {Kind.NL3: 3, Kind.INT8: 8}
    for name, form in forms.items():
        w = kernel_revisions.packed(rng, 1, WIDTH, WIDTH, form)
        for count in tokens if name == "INT4" else [t for t in tokens if t in (1, 8, 48)]:
            x = rng.standard_normal((count, WIDTH), dtype=np.float32)
            call = kernel_revisions.linear(x, w, form, np.empty((count, WIDTH), np.float32))
            arrays = [np.array([count, WIDTH, WIDTH, form.encode()]), x, w]
            coded = WIDTH * WIDTH * bits.get(form.kind, 4) // 8
            yield Case(f"{name}, {count} tokens", call, arrays), count * WIDTH * WIDTH, coded


def layers(tokens: Sequence[int]) -> Iterator[tuple[Case, int]]:
    """Layers of MobileMoE-S shape, INT4 in groups along the input."""
    shape = Shape()
    block = Moec(Layer.random(shape, 0)).block
    rng = np.random.default_rng(1)
    weights = [block.tensors.router_weight, block.tensors.w13, block.tensors.w2]
    shared = [w for w in (block.tensors.shared_w13, block.tensors.shared_w2) if w is not None]
    for count in tokens:
        x = rng.standard_normal((count, shape.d), dtype=np.float32)
        config, params = block.config.encode()
        tables = [np.array([count]), np.array(config, np.int64), np.array(params, np.float64)]
        call = block.bind(x, np.empty_like(x))
        yield Case(f"layer of S, {count} tokens", call, [*tables, *weights, *shared, x]), count


# --------------------------------------------------------------------------------------------------------------- counts


def build_program(work: Path, kernels: Path, compiler: str, processor: str) -> Path:
    """bench/kernel_calls.cpp with the kernels in one static program, whose addresses are those of the file."""
    project = (
        "cmake_minimum_required(VERSION 3.28)\nproject(calls LANGUAGES CXX)\n"
        f"add_subdirectory({kernels.resolve()} kernel)\n"
        f"add_executable(kernel_calls {ROOT / 'bench' / 'kernel_calls.cpp'} $<TARGET_OBJECTS:moec_kernels>)\n"
        "target_compile_definitions(kernel_calls PRIVATE MOEC_LINKED)\n"
        f"target_include_directories(kernel_calls PRIVATE {kernels.resolve()})\n"
        "set_target_properties(kernel_calls PROPERTIES CXX_STANDARD 17 POSITION_INDEPENDENT_CODE OFF)\n"
        "target_link_options(kernel_calls PRIVATE -static -no-pie)\n"
        "target_link_libraries(kernel_calls PRIVATE Threads::Threads)\nfind_package(Threads REQUIRED)\n"
    )
    folder = work / processor
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "CMakeLists.txt").write_text(project)
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=tools)
    if cmake is None:
        raise SystemExit("error: no cmake; `make setup` installs one")
    configure = [cmake, "-S", str(folder), "-B", str(folder / "build"), "-DMOEC_EXECUTORCH=OFF", "-Wno-dev"]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_COMPILER={compiler}"]
    configure += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={processor}"]
    subprocess.run(configure, check=True, stdout=sys.stderr)
    command = [cmake, "--build", str(folder / "build"), "-j2", "--target", "kernel_calls"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / "build" / "kernel_calls"


@dataclass(frozen=True)
class Emulated:
    """Calls under qemu-user, counted by bench/block_counts.c."""

    program: Path
    qemu: str
    plugin: Path
    prefix: str  # of the binutils

    @classmethod
    def build(cls, work: Path, kernels: Path) -> Emulated:
        compiler, qemu = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
        if compiler is None or qemu is None:
            raise SystemExit(
                "error: needs aarch64-linux-gnu-g++ and qemu-aarch64 "
                "(Debian: apt-get install g++-aarch64-linux-gnu qemu-user)"
            )
        program = build_program(work, kernels, compiler, "aarch64")
        prefix = compiler.removesuffix("g++")
        for version in (1, 2, 3, 4, 5, 6):  # of the interface: what a qemu accepts, only it knows
            plugin = work / f"block_counts-{version}.so"
            source = ROOT / "bench" / "block_counts.c"
            c_compiler = shutil.which("cc") or "gcc"
            flags = ["-O2", "-shared", "-fPIC", f"-DPLUGIN_VERSION={version}"]
            subprocess.run([c_compiler, *flags, str(source), "-o", str(plugin)], check=True)
            made = cls(program, qemu, plugin, prefix)
            tried = subprocess.run(
                made.command(work / "none", work / "none"), capture_output=True, text=True, check=False
            )
            if tried.returncode == 2 and "plugin" not in tried.stderr:
                return made
        raise SystemExit(f"error: {qemu} takes no plugin of ours: {tried.stderr.strip()}")

    def command(self, file: Path, out: Path) -> list[str]:
        begin, end = (core_model.symbol(self.program, f"measured_{m}", f"{self.prefix}nm") for m in ("begin", "end"))
        plugin = f"{self.plugin},begin={begin:x},end={end:x},out={out}"
        return [self.qemu, "-cpu", "max", "-plugin", plugin, str(self.program), str(file)]

    def profile(self, case: Case, isa: str) -> Profile:
        file, out = self.plugin.with_name("call"), self.plugin.with_name("counts")
        case.write(file)
        out.unlink(missing_ok=True)
        command = self.command(file, out)
        subprocess.run(command, check=True, env={**os.environ, "MOEC_ISA": isa}, stdout=subprocess.DEVNULL)
        return core_model.read_profile(out, self.program, f"{self.prefix}objdump")


# -------------------------------------------------------------------------------------------------------------- figures


def of_product(
    case: Case, isa: str, macs: int, coded: int, profile: Profile, peaks: dict[str, float]
) -> Iterator[dict]:
    per_product = PRODUCTS[isa][1]
    for name, peak in peaks.items():
        core = Core("aarch64", name, "+i8mm,+dotprod,+fullfp16")
        cycles, loops = profile.cycles(core, GEMM), profile.loop_cycles(core, GEMM)
        yield {
            "case": case.name,
            "isa": isa,
            "core": name,
            "instructions": profile.executed,
            "cycles": cycles,
            "of_peak": macs / per_product / peak / cycles,
            "of_peak_in_loops": macs / per_product / peak / loops,
            "code_bytes_per_cycle": coded / cycles,
            "code_bytes_per_cycle_in_loops": coded / loops,
        }


def of_layer(case: Case, tokens: int, isa: str, profile: Profile, cores: Sequence[str]) -> dict:
    at = {name: Core("aarch64", name, "+i8mm,+dotprod,+fullfp16") for name in cores}
    return {
        "case": case.name,
        "isa": isa,
        "tokens": tokens,
        "instructions": profile.executed,
        "cycles": {name: profile.cycles(core) for name, core in at.items()},
        "products": {name: profile.cycles(core, GEMM) for name, core in at.items()},
    }


def predictions(rows: list[dict]) -> Iterator[dict]:
    """The MoE layers of MobileMoE-S on the device files' phones: threads x clock over cycles, or bytes over bandwidth.

    The clock is the file's integer rate over 4 pipes of 32 operations; the model is apple-m4 for a device with a Metal
    GPU, else neoverse-v2. One token reads top-k experts, the shared expert and the router of every layer.
    """
    spec = yaml.safe_load((ROOT / "specs" / "models" / "mobilemoe-s.yaml").read_text("utf-8"))
    count, shape = spec["model"]["layers"], Shape()
    for file in sorted((ROOT / "specs" / "devices").glob("*.yaml")):
        device = yaml.safe_load(file.read_text("utf-8"))
        isa = next((i for i in ("i8mm", "neon") if i in device["isa"]), None)
        core = "apple-m4" if "metal" in device["isa"] else "neoverse-v2"
        if isa is None:
            continue
        clock, dram = number(device["int8_gop_per_s"]) / 4 / 32, number(device["dram_gb_per_s"])
        for row in rows:
            if row["isa"] != isa or core not in row["cycles"]:
                continue
            threads, tokens = device["cores"]["threads"], row["tokens"]
            compute = count * row["cycles"][core] / (threads * clock * 1e9)
            read = count * shape.weight_bytes(shape.top_k, shared=True) / (dram * 1e9) if tokens == 1 else 0.0
            yield {
                "device": device["name"],
                "isa": isa,
                "core": core,
                "tokens": tokens,
                "tokens_per_s": tokens / max(compute, read),
                "bound": "memory" if read > compute else "core",
                "of_bound_by_core": tokens / compute,
            }


def number(value: object) -> float:
    return float(value["number"] if isinstance(value, dict) else value)  # type: ignore[arg-type]


def print_report(report: dict) -> None:
    names = dict.fromkeys(r["core"] for r in report["products"])
    for name in names:
        print(f"{name}: {STANDS_FOR.get(name, 'a model of llvm-mca')}")
    print(f"{KNOWS_NOT}\n\nproducts of {WIDTH} x {WIDTH}, groups of {GROUP}: share of the peak of smmla (i8mm) or sdot")
    print("(neon) and bytes of codes per cycle: in the loops alone / in the whole product with everything around them")
    print(f"{'':<24}{'isa':>6}{'instructions':>14}" + "".join(f"{name:>26}" for name in names))
    for (case, isa), rows in grouped(report["products"]).items():
        cells = "".join(
            f"{r['of_peak_in_loops']:>8.0%} /{r['of_peak']:>4.0%}"
            f"{r['code_bytes_per_cycle_in_loops']:>6.1f} /{r['code_bytes_per_cycle']:>4.1f}"
            for r in rows
        )
        print(f"{case:<24}{isa:>6}{rows[0]['instructions']:>14,}{cells}")
    print("\nlayers of MobileMoE-S shape: thousands of cycles, in brackets those of the products")
    for r in report["layers"]:
        cells = "".join(f"{c / 1e3:>11.0f} ({r['products'][n] / 1e3:.0f})" for n, c in r["cycles"].items())
        print(f"{r['case']:<24}{r['isa']:>6}{r['instructions']:>14,}{cells}")
    print("\nMoE layers of MobileMoE-S alone (no attention, embedding, head), predicted tokens/s")
    for r in report["devices"]:
        print(
            f"{r['device']:<18}{r['isa']:>6}{r['core']:>14}{r['tokens']:>6} tokens{r['tokens_per_s']:>10.0f}"
            f" ({r['bound']} bound; by the core alone {r['of_bound_by_core']:.0f})"
        )


def grouped(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["case"], row["isa"]), []).append(row)
    return found


# ------------------------------------------------------------------------------------------------------------------ x86


def check_x86(work: Path, kernels: Path) -> Iterator[dict]:
    """The same prediction where time can be measured: instructions by single steps, cycles by chained multiplications
    that is timed around every call. The model is LLVM's of this processor, as the compiler names it."""
    compiler = native.find_compiler()
    program = build_program(work, kernels, compiler, "x86_64")
    stepper = work / "step_counts"
    source = ROOT / "bench" / "step_counts.cpp"
    subprocess.run([compiler, "-O2", "-std=c++17", str(source), "-o", str(stepper)], check=True)
    end = core_model.symbol(program, "measured_end", "nm")
    core = Core("x86_64", model_of_this_processor())
    file, out = work / "call", work / "counts"
    for isa in [i for i in ("avx2", "avxvnni", "avx512vnni") if i in kernel_api.available_isas()]:
        environment = {**os.environ, "MOEC_ISA": isa}
        for case, _, _ in products((1, 8)):
            case.write(file)
            stepped = [str(stepper), f"{end:x}", str(out), str(program), str(file)]
            subprocess.run(stepped, check=True, env={**environment, "MOEC_STEPPED": "1"}, stdout=subprocess.DEVNULL)
            predicted = core_model.read_profile(out, program, "objdump").cycles(core)
            timed = subprocess.run([str(program), str(file), "301"], env=environment, capture_output=True, check=True)
            median, tenth = (float(word) for word in timed.stdout.split())
            yield {
                "case": case.name,
                "isa": isa,
                "core": core.cpu,
                "predicted": predicted,
                "median": median,
                "p10": tenth,
            }


def model_of_this_processor() -> str:
    text = subprocess.run([core_model.find_mca(), "--version"], capture_output=True, text=True, check=True).stdout
    name = next(line.split(":")[1].strip() for line in text.splitlines() if "Host CPU" in line)
    # LLVM's name for a processor that it does not recognise exactly may lack what the kernels use
    flags = Path("/proc/cpuinfo").read_text().split()
    return "sapphirerapids" if "amx_int8" in flags else name


def print_check(rows: list[dict]) -> None:
    print(f"{'':<24}{'isa':>12}{'predicted':>12}{'measured':>12}{'p10':>10}{'predicted / measured':>22}")
    for r in rows:
        ratio = r["predicted"] / r["median"]
        print(
            f"{r['case']:<24}{r['isa']:>12}{r['predicted']:>12,.0f}{r['median']:>12,.0f}{r['p10']:>10,.0f}{ratio:>22.2f}"
        )
    ratios = [r["predicted"] / r["median"] for r in rows]
    print(f"\nmodel {rows[0]['core']}; cycles. predicted / measured: median {statistics.median(ratios):.2f},", end=" ")
    print(f"{min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    sys.exit(main())
