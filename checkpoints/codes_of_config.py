"""The codes of a transformers checkpoint, read as its config.json says: `quantization_config.quant_method` decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moec.checkpoints.compressed_tensors import NAME as COMPRESSED
from moec.checkpoints.compressed_tensors import with_compressed
from moec.checkpoints.fp8 import NAME as FP8
from moec.checkpoints.fp8 import with_fp8
from moec.checkpoints.gptq_awq import AWQ, GPTQ, with_awq, with_gptq
from moec.checkpoints.mxfp4 import NAME as MXFP4
from moec.checkpoints.mxfp4 import with_mxfp4
from moec.checkpoints.safetensors_file import Entry, shown

#: The formats that are read, by the names that `dequantize` of a spec takes.
FORMATS = (MXFP4, GPTQ, AWQ, COMPRESSED, FP8)
_READERS: Mapping[str, Callable[[Mapping[str, Entry], Mapping[str, Any], str], dict[str, Entry]]] = {
    "gptq": with_gptq,
    "awq": with_awq,
    "compressed-tensors": with_compressed,
    "fp8": with_fp8,
    "fbgemm_fp8": with_fp8,
}
#: Ends of tensors for inputs that were measured once; ours are scaled anew at every token.
_INPUT_SCALES = (".input_scale", ".input_zero_point", ".input_scale_ub", ".activation_scale")


def with_codes(
    entries: Mapping[str, Entry], config: Mapping[str, Any], place: str
) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """(`entries` with each weight of codes as one CodedEntry, lines about tensors beside them that are not read).

    What no reader knows stays as it is, and is refused later. CheckpointError for tensors that contradict each other.
    """
    section = config.get("quantization_config")
    method = str(section.get("quant_method")).lower() if isinstance(section, Mapping) else ""
    reader = _READERS.get(method)
    if reader is None or not isinstance(section, Mapping):
        return with_mxfp4(entries, config), ()
    found = reader(entries, section, place)
    if found == dict(entries):
        return found, ()
    of_inputs = [name for name in found if name.endswith(_INPUT_SCALES)]
    for name in of_inputs:
        del found[name]
    if not of_inputs:
        return found, ()
    what = f"{len(of_inputs)} scales of inputs, such as {shown(of_inputs[0])}; inputs are scaled at every token"
    return found, (f"not read: {what}",)
