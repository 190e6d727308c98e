"""LoRA adapters merged into the weights of a transformers checkpoint as these are read.

An update goes to the stored tensor of its module where there is one (a linear, one expert of a checkpoint that stores
them one by one), else to the tensor that the model makes of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moec.checkpoints.coded import CodedEntry
from moec.checkpoints.folder import ADAPTER
from moec.checkpoints.lora import Adapter, Update, base_names, read_adapter
from moec.checkpoints.safetensors_file import Entry, shown
from moec.compiler.errors import CheckpointError
from moec.sources.conversions import Conversions

Change = Callable[[Tensor], Tensor]


class Merged:
    """The changes of adapters, in their order, by the name of the tensor: stored, or made by the model."""

    def __init__(
        self, folders: Iterable[Path], entries: Mapping[str, Entry], model: Conversions, dequantize: Iterable[str]
    ) -> None:
        """CheckpointError for adapters that are not read, and for updates of what the model lacks or holds as codes."""
        self.adapters = [read_adapter(folder) for folder in folders]
        self._entries, self._model, self._dequantize = entries, model, frozenset(dequantize)
        self.stored: dict[str, list[Change]] = {}
        self.made: dict[str, list[Change]] = {}
        for adapter in self.adapters:
            for module, base in adapter.bases.items():
                self._check_base(adapter, module, base)
            for update in adapter.updates:
                self._place(adapter, update)

    def notes(self) -> tuple[str, ...]:
        return tuple(adapter.about() for adapter in self.adapters)

    def digests(self) -> list[str]:
        return [adapter.digest() for adapter in self.adapters]

    def changed(self, value: Tensor, changes: Mapping[str, list[Change]], name: str) -> Tensor:
        """`value` of tensor `name` after its changes; float32 if there are adapters, so that pieces fit together."""
        if not self.adapters:
            return value
        value = value.to(torch.float32)
        for change in changes.get(name, ()):
            value = change(value)
        return value

    def _place(self, adapter: Adapter, update: Update) -> None:
        for module in base_names(update.module):
            name = f"{module}.weight"
            stored = self._stored_name(name)
            if stored is not None:
                self._check(adapter, update, name, [stored], self._entries[stored].shape)
                self.stored.setdefault(stored, []).append(update.merged)
                return
            if name in self._model.names:
                self._check(adapter, update, name, self._model.sources(name), self._model.names[name])
                self.made.setdefault(name, []).append(update.merged)
                return
            if self._is_stack(adapter, update, module):
                return
        raise CheckpointError(
            f"changes {shown(update.module)}, which the model does not have",
            place=str(adapter.folder),
            remedy="name the model that the adapter was trained on",
        )

    def _check_base(self, adapter: Adapter, module: str, base: Entry) -> None:
        """CheckpointError unless the adapter's copy of a weight of the base model is the one of the files."""
        stored = self._stored_name(f"{module}.weight")
        if stored is not None and self._entries[stored].shape == base.shape:
            mine, theirs = self._entries[stored].tensor(), base.tensor()
            if torch.equal(mine.to(torch.float32), theirs.to(torch.float32)):
                return
        raise CheckpointError(
            f"holds a weight of {shown(module)} of the base model, and the files have another",
            place=str(adapter.folder),
            remedy="name the model that the adapter was trained on",
        )

    def _stored_name(self, name: str) -> str | None:
        if name in self._entries:
            return name
        sources = self._model.sources(name) if name in self._model.names else ()
        return sources[0] if sources and self._model.is_whole(name) else None

    def _is_stack(self, adapter: Adapter, update: Update, module: str) -> bool:
        """Whether `update` was placed at a parameter of `module` that holds a matrix for each expert: the one of its
        shape, since the file does not name it."""
        held = {n: shape for n, shape in self._model.names.items() if n.rpartition(".")[0] == module}
        readings = adapter.first(transposed=self._model.is_transposed(module))
        wanted = {first: (update.stacked, *(update.shape[::-1] if first else update.shape)) for first in readings}
        found = [(n, first) for first in sorted(readings) for n, shape in held.items() if shape == wanted[first]]
        names = list(dict.fromkeys(n for n, _ in found))
        if len(names) > 1:
            raise CheckpointError(
                f"changes {shown(module)}, where {' and '.join(names)} have the shape of its matrices",
                place=str(adapter.folder),
                remedy="merge it with PEFT, which knows which of them was trained",
            )
        if not names:
            return False
        if len(found) > 1:
            raise CheckpointError(
                f"changes {names[0]}, whose matrices are square, and names no peft_version, which tells an update from "
                "its transpose",
                place=str(adapter.folder),
                remedy=f"add the version of PEFT that saved it to {ADAPTER}, or merge it with PEFT",
            )
        self._check(adapter, update, names[0], self._model.sources(names[0]), None)
        stored = self._stored_name(names[0])
        changes = self.made if stored is None else self.stored
        changes.setdefault(stored or names[0], []).append(partial(update.merged_stack, first=found[0][1]))
        return True

    def _check(
        self,
        adapter: Adapter,
        update: Update,
        name: str,
        sources: Iterable[str],
        shape: tuple[int, ...] | None,
    ) -> None:
        place = str(adapter.folder)
        if shape is not None and (update.shape != tuple(shape) or update.stacked > 1):
            what = f"changes {shown(update.module)} by {list(update.shape)}, the model has {list(shape)} there"
            if update.stacked > 1:
                what = f"{shown(update.module)} has rank {update.a.shape[0]}, adapter_config.json says {update.rank}"
            raise CheckpointError(what, place=place, remedy="name the model that the adapter was trained on")
        if self._model.is_shared(name):
            raise CheckpointError(
                f"changes {shown(update.module)}, which the model uses as its output head and as its table",
                place=place,
                remedy="merge it with PEFT, and say there which of the two is meant",
            )
        coded = (e for s in sources if isinstance(e := self._entries[s], CodedEntry))
        entry = next((e for e in coded if e.dtype not in self._dequantize), None)
        if entry is not None:
            raise CheckpointError(
                f"changes {shown(update.module)}, whose codes ({entry.dtype}) are carried and cannot be changed",
                place=place,
                remedy=f"`dequantize: [{entry.dtype}]` in the model's section: the merged values are quantized anew",
            )
