"""A GGUF file as a checkpoint: its tensors under the names of the transformers module that its metadata describes.

Codes that our format holds exactly (`CARRIED`) are carried. llama.cpp stores the rows of queries and keys of some
architectures in the order of interleaved rotation; whole rows are put back, so that groups along the input stay whole.
Gates and ups of experts are joined along rows too.

R rows, K inputs, E experts.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.checkpoints.folder import listed
from moec.checkpoints.gguf_codes import BIT_FOR_BIT, CARRIED, carried_codes, float_values
from moec.checkpoints.gguf_file import GgufTensor, read_gguf
from moec.checkpoints.safetensors_file import finite, shown
from moec.checkpoints.spec_from_gguf import refused_types, role_of
from moec.compiler.errors import CheckpointError
from moec.compiler.program import LazyWeight
from moec.compiler.quant import QuantizedTensor, widened
from moec.compiler.quantizer import format_of
from moec.compiler.source import Checkpoint
from moec.compiler.spec.quantization import Quantization
from moec.compiler.weights import CodeFormat, Provenance, StoredCodes, joined_codes, stacked_codes
from moec.sources.gguf_config import config_of
from moec.sources.gguf_names import Place, place_of
from moec.sources.gguf_tokenizer import companions_of, end_ids, tokenizer_notes
from moec.sources.transformers_config import build_model, config_from_keys

_OWN = {"rope_freqs.weight"}  # read where the config is made
_SAMPLE = 64  # bytes of each tensor that the digest takes


class GgufStore(Checkpoint):
    """The weights of a checked file. Opened without reading a tensor; `folder` is the file."""

    def __init__(self, file: Path, quantization: Quantization | None, dequantize: Iterable[str] = ()) -> None:
        """`quantization`: of the spec, which the codes must suit. `dequantize`: types whose values are used as floats.

        CheckpointError for what cannot be read, computed or carried; MissingExtra without transformers.
        """
        self.folder = file
        self._file = read_gguf(file)
        self._dequantize = frozenset(kind.upper() for kind in dequantize)
        keys, self._family = config_of(self._file)
        refused = refused_types(self._file, self._dequantize)
        if refused is not None:
            raise refused
        self.config = config_from_keys(keys, str(file))
        with torch.device("meta"):
            model = build_model(self.config, file)
        self.names: dict[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        tied = getattr(model, "all_tied_weights_keys", None)
        self._tied: dict[str, str] = dict(tied) if isinstance(tied, dict) else {}
        self._check_tensors()
        self._formats = dict(self._chosen_formats(quantization))
        self.notes = (*self._about(), *tokenizer_notes(self._file))

    # --- what a Checkpoint gives ---------------------------------------------------------------------------------

    def weight(self, name: str, shape: tuple[int, ...]) -> LazyWeight:
        if self.names.get(name) != shape:
            raise CheckpointError(f"the model needs tensor {name} {list(shape)}", place=str(self.folder))
        place = self._place(name)
        parts = [self._joined_experts(source) for source in place.sources]
        only = parts[0]
        if len(parts) == 1 and not place.transposed and not place.of_rows:
            if only.shape == shape:
                return only
            return LazyWeight(shape, only.dtype, lambda: only.load().reshape(shape))  # [K] of a single row [1, K]

        def load() -> Tensor:
            return place.in_model(place.in_order(torch.cat([place.rows(part.load()) for part in parts], -2)))

        return LazyWeight(shape, torch.float32, load, self._joined_codes(parts, place, name))

    def _joined_codes(self, parts: list[LazyWeight], place: Place, name: str) -> StoredCodes | None:
        if place.of_rows:
            return None
        codes = joined_codes(parts, -2, name) if len(parts) > 1 else parts[0].stored
        if codes is None:
            return None

        def load(joined: Callable[[], QuantizedTensor] = codes.load) -> QuantizedTensor:
            found = joined()
            return replace(found, codes=place.in_order(found.codes), scales=place.in_order(found.scales))

        return replace(codes, load=load, transposed=place.transposed)

    def digest(self) -> str:
        """SHA-256 over header, metadata and the first bytes of every tensor; the weights themselves are not read."""
        tensors = sorted(self._file.tensors.values(), key=lambda t: t.begin)
        found = hashlib.sha256()
        found.update(self._file.part(0, tensors[0].begin).tobytes())
        for tensor in tensors:
            found.update(self._file.part(tensor.begin, min(_SAMPLE, tensor.end - tensor.begin)).tobytes())
        return found.hexdigest()

    def companions(self) -> Mapping[str, bytes]:
        return companions_of(self._file, self.names["model.embed_tokens.weight"][0])

    def parameters(self) -> int:
        """Elements of the model's tensors, tied ones once."""
        return sum(torch.Size(shape).numel() for name, shape in self.names.items() if name not in self._tied)

    # --- names ---------------------------------------------------------------------------------------------------

    def _place(self, name: str) -> Place:
        """Where the model's tensor `name` lies in the file."""
        found = place_of(self._tied.get(name, name), self.config.model_type)
        if found is None:
            raise CheckpointError(f"the model's tensor {name} has no name in GGUF", place=str(self.folder))
        return found

    def _held(self, source: str) -> list[GgufTensor]:
        """The tensor `source`, or those of its experts in order; none when the file lacks it."""
        tensors = self._file.tensors
        if source in tensors:
            return [tensors[source]]
        if not source.endswith("_exps.weight"):
            return []
        stem = source.removesuffix("_exps.weight")
        found: list[GgufTensor] = []
        while (single := tensors.get(f"{stem}.{len(found)}.weight")) is not None:
            found.append(single)
        return found

    def _check_tensors(self) -> None:
        """Every tensor of the model is there in its shape, and every tensor of the file is one of them."""
        used, missing = set(_OWN), []
        for name, shape in self.names.items():
            if name in self._tied:
                continue
            place = self._place(name)
            own, shape = shape, place.rows_shape(shape)
            rows, rest, heights = 0, shape[-1:], set()
            for source in place.sources:
                held = self._held(source)
                if not held:
                    missing.append(source)
                    continue
                used |= {tensor.name for tensor in held}
                found = held[0].shape if len(held) == 1 and held[0].name == source else (len(held), *held[0].shape)
                found = (*found, 1) if place.of_rows else found
                if (
                    len({tensor.shape for tensor in held}) > 1
                    or found[-1:] != rest
                    or len(found) not in (len(shape), 1)
                ):
                    raise self._unlike(held[0], name, own)
                if len(found) == 3 and found[0] != shape[0]:
                    raise self._unlike(held[0], name, own)
                rows += found[-2] if len(found) > 1 else 1
                heights.add(found[-2] if len(found) > 1 else 1)
            alike = len(heights) <= 1  # a gate and an up projection: halves, not what adds up to the whole
            if len(shape) > 1 and (rows != shape[-2] or not alike) and not missing:
                raise self._unlike(self._held(place.sources[0])[0], name, own)
        if missing:
            many = f"{len(missing)} tensors" if len(missing) > 1 else "a tensor"
            raise CheckpointError(
                f"lacks {many} of the model: {listed(missing)}",
                place=str(self.folder),
                remedy="use a file that llama.cpp's own converter wrote",
            )
        unread = sorted(set(self._file.tensors) - used)
        if unread:
            raise CheckpointError(
                f"holds {listed(unread)}, which {self.config.model_type} does not have",
                place=str(self.folder),
                remedy="give the safetensors checkpoint that it was made from",
            )

    def _unlike(self, tensor: GgufTensor, name: str, shape: tuple[int, ...]) -> CheckpointError:
        what = f"tensor {shown(tensor.name)} is {list(tensor.shape)}, the model has {list(shape)} as {name}"
        return CheckpointError(what, place=str(self.folder), remedy="use a file that llama.cpp's own converter wrote")

    # --- codes ---------------------------------------------------------------------------------------------------

    def _chosen_formats(self, quantization: Quantization | None) -> Iterator[tuple[str, CodeFormat]]:
        """The format in which the codes of a tensor are handed over; CheckpointError where the spec has no such."""
        for tensor in self._file.tensors.values():
            role = role_of(tensor.name)
            if role is None or tensor.type not in CARRIED or tensor.type in self._dequantize:
                continue
            scheme = None if quantization is None else quantization.scheme_of(role)
            if scheme is None:
                continue  # computed in fp32, with the values that the codes stand for
            own = CARRIED[tensor.type]
            chosen = format_of(scheme)
            if scheme.group_size != own.group_size or not chosen.holds(own) or scheme.axis != "in":
                raise CheckpointError(
                    f"tensor {tensor.name} is {tensor.type}, {own} along in; the spec stores its role ({role}) as "
                    f"{chosen} along {scheme.axis}",
                    place=str(self.folder),
                    remedy="let `moec checkpoint spec FILE` write the quantization that carries the codes; or name "
                    f"{tensor.type} in the model's `dequantize`, which rounds its values anew",
                )
            yield tensor.name, chosen

    def _tensor(self, tensor: GgufTensor) -> LazyWeight:
        """One tensor of the file, rows in the model's order."""
        file, width, shape, place = self._file, tensor.shape[-1], tensor.shape, str(self.folder)
        order = self._row_order(tensor)

        def codes() -> QuantizedTensor:
            found = carried_codes(tensor.type, file.blocks(tensor), shown(tensor.name), place)
            if order is not None:
                found = replace(found, codes=found.codes[order], scales=found.scales[order])
            return _shaped(found, shape)

        def values() -> Tensor:
            if tensor.type in CARRIED:
                return codes().dequantize()
            found = float_values(tensor.type, file.blocks(tensor), width)
            if order is not None:
                found = found.reshape(-1, width)[order] if len(shape) > 1 else found.reshape(-1)[order]
            return finite(found.reshape(shape), tensor.name, place)

        chosen = self._formats.get(tensor.name)
        if chosen is None:
            return LazyWeight(shape, torch.float32, values)
        load = codes if chosen == CARRIED[tensor.type] else lambda: widened(codes(), chosen.grid, chosen.group_size)
        stored = StoredCodes(chosen, load, Provenance("carried", f"GGUF {tensor.type}"))
        return LazyWeight(shape, torch.float32, values, stored)

    def _row_order(self, tensor: GgufTensor) -> Tensor | None:
        """Rows of the file in the order of the model, where they lie for interleaved rotation."""
        found = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", tensor.name)
        if found is None or not self._family.permuted:
            return None
        heads = self.config.num_attention_heads if found[1] == "q" else self.config.num_key_value_heads
        rows = tensor.shape[0]
        return torch.arange(rows).reshape(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)

    def _joined_experts(self, source: str) -> LazyWeight:
        """A tensor of the file, or the stack of those that hold an expert each."""
        held = self._held(source)
        if held[0].name == source:
            return self._tensor(held[0])
        experts = [self._tensor(tensor) for tensor in held]
        codes = stacked_codes([[(expert, None)] for expert in experts], -2, source)
        shape = (len(experts), *experts[0].shape)
        return LazyWeight(shape, torch.float32, _stacked(experts), codes)

    def _about(self) -> Iterator[str]:
        """What became of the file's tensors, by type."""
        kinds = dict.fromkeys(sorted({t.type for t in self._file.tensors.values()}), 0)
        fates: dict[str, Counter[str]] = {}
        for tensor in self._file.tensors.values():
            fates.setdefault(self._fate(tensor), Counter(kinds))[tensor.type] += 1
        for fate, counts in sorted(fates.items()):
            what = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
            yield f"GGUF tensors {fate}: {what}"

    def _fate(self, tensor: GgufTensor) -> str:
        chosen = self._formats.get(tensor.name)
        if chosen is not None:
            same = chosen == CARRIED[tensor.type] and tensor.type in BIT_FOR_BIT
            return "carried bit for bit" if same else "carried as INT8 codes of the same values"
        if tensor.type in self._dequantize:
            return "dequantized, as `dequantize` says"
        return "in fp32 with the values of their codes" if tensor.type in CARRIED else "read as floats"


def _stacked(experts: list[LazyWeight]) -> Callable[[], Tensor]:
    return lambda: torch.stack([expert.load() for expert in experts])


def _shaped(codes: QuantizedTensor, shape: tuple[int, ...]) -> QuantizedTensor:
    """Codes [R, K] as those of a tensor of `shape`."""
    lead = shape[:-1]
    return replace(codes, codes=codes.codes.reshape(*lead, -1), scales=codes.scales.reshape(*lead, -1))


def open_gguf(file: Path, quantization: Quantization | None, dequantize: Iterable[str]) -> GgufStore:
    """The store of a file; CheckpointError as `GgufStore`."""
    return GgufStore(file, quantization, dequantize)


def described(file: Path) -> tuple[Any, tuple[int, ...]]:
    """The transformers config of a file and the ids that end its texts, for a model without its weights."""
    found = read_gguf(file)
    config = config_from_keys(config_of(found)[0], str(file))
    return config, end_ids(found, int(config.vocab_size))
