"""`moec device list | show | measure`: what is known of devices, and the figures of this machine."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.compiler.errors import UserError

if TYPE_CHECKING:
    from moec.compiler.progress import Progress
    from moec.compiler.spec.device import Device

# A model with small tensors: the time of a step beyond reading its weights is the cost of its instructions.
PROBE = """
name: probe
model:
  architecture: mobilemoe
  layers: 8
  d_model: 64
  heads: 2
  kv_heads: 1
  head_dim: 32
  vocab_size: 512
  context: 256
  qk_norm: true
  rope: {theta: 10000.0, interleaved: true}
  moe: {experts: 8, top_k: 2, expert_width: 32, shared_width: 64}
quantization: {weights: int4}
"""


def register(app: typer.Typer) -> None:
    devices = typer.Typer(no_args_is_help=True, help="Devices: what is known of them, and this machine's figures.")
    devices.command("list")(list_devices)
    devices.command("show")(show)
    devices.command("measure")(measure)
    app.add_typer(devices, name="device")


def list_devices(
    as_json: Annotated[bool, typer.Option("--json", help="Print the devices as JSON.")] = False,
) -> None:
    """List the shipped devices.

    Example: [bold]moec device list[/bold]
    """
    from moec.analysis.plan.devices import load_device
    from moec.cli.output import emit_json, table
    from moec.compiler.spec.device import device_files

    devices = [load_device(name) for name in device_files()]
    if as_json:
        emit_json(devices)
        return
    rows = [
        (
            d.name,
            d.backend,
            f"{d.memory_budget_mb.number:,.0f}",
            f"{d.cores.big}+{d.cores.little}",
            f"{d.dram_gb_per_s.number:g}",
            f"{d.int8_gop_per_s.number:g}",
            "measured" if d.kernels is not None else "",
            d.title,
        )
        for d in devices
    ]
    columns = ["device", "backend", "budget, MB", "cores", "DRAM, GB/s", "INT8, GOP/s a thread", "kernels", ""]
    table("", columns, rows, right=[2, 3, 4, 5])


def show(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="A device's name or file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the device as JSON.")] = False,
) -> None:
    """Show a device: every figure with its spread and its source.

    Example: [bold]moec device show galaxy-s25[/bold]
    """
    from moec.analysis.plan.devices import load_device
    from moec.cli.output import emit_json

    loaded = load_device(device)
    if as_json:
        emit_json(loaded)
        return
    _show(loaded)


def _show(d: Device) -> None:
    from moec.cli.output import say, table
    from moec.compiler.spec.device import Figure, KernelRates

    say(f"{d.name}: {d.title}\nbackend {d.backend}; {', '.join(d.isa)}")
    rows: list[tuple[str, str, str, str]] = [
        ("cores", f"{d.cores.big} big, {d.cores.little} little, {d.cores.threads} threads", "", d.cores.source)
    ]
    sections = [("", d), *([("kernels: ", d.kernels)] if d.kernels is not None else [])]
    for prefix, section in sections:
        assert isinstance(section, (type(d), KernelRates))
        for key in type(section).model_fields:
            value = getattr(section, key)
            if isinstance(value, Figure):
                low, high = value.spread
                spread = f"{low:g} to {high:g}" if value.low is not None else ""
                rows.append((prefix + key, f"{value.number:g}", spread, value.source))
    table("", ["figure", "", "spread", "source"], rows, right=[1])


def measure(
    out: Annotated[Path | None, typer.Option(help="Device file to write; default: only print.")] = None,
    name: Annotated[str, typer.Option(help="The device's name.")] = "this-machine",
    threads: Annotated[int | None, typer.Option(min=1, max=256, help="Default: one per fast core.")] = None,
    rounds: Annotated[int, typer.Option(min=2, max=100, help="Rounds of each figure; the best one counts.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the device as JSON.")] = False,
) -> None:
    """Measure this machine: cores, instruction sets, DRAM bandwidth, INT8 peak, and our kernels' rates.

    The best of --rounds counts, with all of them as the spread. On a busy machine every figure is low: measure when it
    is idle. Takes about half a minute.

    Example: [bold]moec device measure --out this-machine.yaml[/bold]
    """
    from moec.analysis.plan.measured import device_yaml
    from moec.cli.output import check_writable, emit_json, write_text
    from moec.compiler.progress import Progress

    check_writable(out)
    made = measured_device(name, threads, rounds, Progress())
    if out is not None:
        comment = f"Measured by `moec device measure --rounds {rounds}`: the best round, and all rounds as the spread."
        write_text(out, device_yaml(made, comment))
    if as_json:
        emit_json(made)
        return
    _show(made)


def measured_device(name: str, threads: int | None, rounds: int, progress: Progress) -> Device:
    """This machine as a Device. UserError for a name that is none, or without a C++ compiler."""
    from pydantic import ValidationError

    from moec.analysis.plan.measured import figure, known
    from moec.compiler.spec.device import NAME, Device
    from moec.runtime import kernel_api, machine

    if not re.fullmatch(NAME, name):  # said before half a minute of work
        raise UserError("is no name of a device", place=f"--name {name}", remedy="use a-z, 0-9, '.' and '-'")
    big, little = machine.cores()
    threads = threads or big
    isa = kernel_api.get_isa()
    with progress.stage("measure bandwidth and peak", total=None):
        peaks = machine.peaks(isa, threads, rounds)
    how = f"moec device measure, {threads} threads, best of {rounds} rounds"
    rates = machine.kernel_rates(threads, rounds, progress)
    kernels: dict[str, Any] = {"threads": threads, "isa": isa}
    for case, values in rates.items():
        weights = case.endswith(("_stream", "_cached")) and not case.startswith("attention")
        unit = "gb_per_s" if weights else "gop_per_s"
        kernels[f"{case}_{unit}"] = figure(values, how, unit=1e9)
    raw: dict[str, Any] = {
        "name": name,
        "title": f"{platform.system()} {platform.machine()}, {big + little} cores, measured",
        "backend": "xnnpack",
        "memory_budget_mb": known(machine.memory_bytes() / 1e6, "all of physical memory; a process has no other limit"),
        "memory_total_mb": known(machine.memory_bytes() / 1e6, "physical memory as the system reports it"),
        "cores": {"big": big, "little": little, "threads": threads, "source": "the system's list of usable CPUs"},
        "isa": kernel_api.available_isas(),
        "dram_gb_per_s": figure(peaks["dram"], f"reading 512 MB, {how}", unit=1e9),
        "int8_gop_per_s": figure(peaks["int8"], f"{isa} in registers, one thread, {how}", unit=1e9),
    }
    if machine.last_cache_bytes():
        raw["last_cache_mb"] = known(machine.last_cache_bytes() / 1e6, "the system's description of CPU 0's caches")
    with progress.stage("measure storage", total=None):
        storage = _storage(rounds)
    for key, (values, what) in storage.items():
        raw[key] = figure(values, f"direct reads of {what}; best of {rounds} rounds", unit=1e9)
    instruction, runtime = _probe(kernels, threads, rounds, progress)
    kernels["instruction_us"] = figure(instruction, f"a model of small tensors, {how}", least=True, unit=1e-6)
    raw["runtime_mb"] = figure(runtime, "peak of a small model less its own memory", least=True, unit=1e6)
    try:
        return Device.model_validate({**raw, "kernels": kernels})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{where}: {first['msg']}", place=f"--name {name}", remedy="use a-z, 0-9, '.' and '-'"
        ) from None


def _storage(rounds: int) -> dict[str, tuple[list[float], str]]:
    """Bytes a second in each round, and of what reads; nothing where files cannot be read past the page cache, as in
    memory."""
    from moec.runtime import machine

    at_random: list[float] = []
    in_order: list[float] = []
    with tempfile.NamedTemporaryFile() as file:
        try:
            for _ in range(256):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
            for _ in range(rounds):
                at_random.append(machine.storage_rate(Path(file.name), 1 << 20, seconds=0.25))
                in_order.append(machine.sequential_storage_rate(Path(file.name), seconds=0.25))
        except OSError:  # no O_DIRECT there, or no room
            return {}
    return {
        "storage_gb_per_s": (at_random, "1 MiB at random places, 2 at once"),
        "storage_sequential_gb_per_s": (in_order, "8 MiB one after the other"),
    }


def _probe(kernels: dict[str, Any], threads: int, rounds: int, progress: Progress) -> tuple[list[float], list[float]]:
    """Seconds of an instruction, and bytes of the runtime, from runs of a model that is made and compiled for it."""
    from moec.analysis.plan.memory import Model, memory
    from moec.analysis.plan.planner import model_of
    from moec.checkpoints import synthesize
    from moec.compiler import build
    from moec.compiler.spec import parse_spec
    from moec.runtime import machine

    spec = parse_spec(PROBE, file="the probe")
    prompt, decode = 32, 64
    seconds, runtime = [], []
    with tempfile.TemporaryDirectory() as folder:
        synthesize(spec, Path(folder) / "checkpoint", seed=1)
        artifact = build.compile(spec, "xnnpack", Path(folder) / "checkpoint", Path(folder) / "artifact", progress)
        model: Model = model_of(spec, "xnnpack", spec.targets["xnnpack"].model_copy(update={"threads": threads}))
        needed = memory(model, prompt + decode)
        for _ in range(rounds):
            report = machine.run_model(
                artifact.path("model.pte"), prompt=prompt, decode=decode, threads=threads, repeats=8
            )
            read = sum(model.read_per_token(w) for w in model.architecture.weights)
            step = min(report["decode_s"]) / decode - read / (kernels["dense_cached_gb_per_s"]["number"] * 1e9)
            seconds.append(max(step, 1e-9) / model.footprint.instructions(model.architecture))
            runtime.append(report["peak_rss_mb"] * 1e6 - (needed.peak - needed.runtime))
    return seconds, runtime
