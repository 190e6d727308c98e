"""Devices by name or file, and which targets they can run."""

from __future__ import annotations

from pathlib import Path

from moec.compiler.errors import UserError
from moec.compiler.spec.device import Device, device_files, is_device_file
from moec.compiler.spec.loader import load_device_file
from moec.compiler.spec.strict import suggestion
from moec.compiler.spec.targets import options_class

#: The machine whose kernel measurements stand in for a device that has none of its own.
REFERENCE = "reference-x86"


def load_device(name: str) -> Device:
    """A shipped device by name, or a device file by path (anything with a slash or ending in .yaml).

    Errors: UserError for an unknown name, with the nearest one; SpecError for a file that is no device.
    """
    if is_device_file(name):
        return load_device_file(Path(name))
    known = device_files()
    if name not in known:
        raise UserError(
            f"unknown device {name!r}" + suggestion(name, known),
            remedy="see `moec device list`, or name a device file such as ./my-phone.yaml",
        )
    return load_device_file(known[name])


def reference() -> Device | None:
    """The shipped device with measured kernels; None where it is not installed."""
    file = device_files().get(REFERENCE)
    return None if file is None else load_device_file(file)


def check_runs(device: Device, target: str) -> None:
    """UserError when `device` lacks what artifacts of `target` run on."""
    missing = [key for key in options_class(target).device_needs if getattr(device, key, None) is None]
    if missing:
        raise UserError(
            f"{device.name} cannot run target {target}: its file gives no {', '.join(missing)}",
            remedy="choose another --target or --device",
        )
