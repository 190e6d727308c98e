"""Tensors of a transformers checkpoint under the model's own names, made one at a time.

transformers knows how each family stores its weights: names that changed, experts stored one by one (`experts.3.w1`)
that the model holds stacked, gate and up stored apart that it holds joined. `from_pretrained` converts a whole model in
memory and fills missing tensors with random numbers. This module applies the same conversions to one requested tensor,
and knows which stored tensors each tensor is made of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.checkpoints.safetensors_file import shown
from moec.compiler.errors import CheckpointError
from moec.sources.transformers_config import build_model

_MOST_PIECES = 4096  # numbers come from a file


class Conversions:
    """The conversions of one model, for the tensor names `stored` that its checkpoint holds.

    names: every tensor that the model needs, with its shape. layers: the modules that hold tensors and no modules.
    unread: stored names that belong to no tensor of the model -> what the model would call them. CheckpointError where
    two of them are one tensor.
    """

    def __init__(self, config: Any, stored: Iterable[str], place: Path) -> None:
        self._config = config
        with torch.device("meta"):
            self._model = build_model(config, place)
        self.names: dict[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in self._model.state_dict().items()}
        self.layers: frozenset[str] = frozenset(
            name
            for name, module in self._model.named_modules()
            if name and not any(True for _ in module.children()) and any(True for _ in module.parameters(recurse=False))
        )
        tied = getattr(self._model, "all_tied_weights_keys", None)
        self._tied: dict[str, str] = dict(tied) if isinstance(tied, dict) else {}
        self._renamed: dict[str, str] = {}  # the model's name -> the stored one
        self._groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}  # name -> converter, (stored, pattern)
        self._parts: dict[str, str] = {}  # a tensor that one conversion gives beside others -> the group's name
        self.unread: dict[str, str] = {}
        self._collect(stored, place)

    def _collect(self, stored: Iterable[str], place: Path) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(self._model)
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        renamings = [m for m in mapping if not isinstance(m, WeightConverter)]
        meta = self._model.state_dict()
        for key in sorted(stored, key=dot_natural_key):
            if key in self.names:  # stored under the model's own name
                self._rename(key, key, place)
                continue
            name, pattern = rename_source_key(key, renamings, converters, self._model.base_model_prefix, meta)
            if pattern is None:
                if name in self.names:
                    self._rename(name, key, place)
                else:
                    self.unread[key] = name
                continue
            converter = next(c for c in converters if pattern in c.source_patterns)
            gives = [t for t in self._given(name, converter) if t in self.names]
            if not gives:
                self.unread[key] = name
                continue
            self._groups.setdefault(name, (converter, []))[1].append((key, pattern))
            self._parts |= dict.fromkeys(gives, name)

    def _rename(self, name: str, key: str, place: Path) -> None:
        other = self._renamed.setdefault(name, key)
        if other != key:
            raise CheckpointError(
                f"holds {shown(other)} and {shown(key)}, which are both {name} of the model",
                place=str(place),
                remedy="leave one of them out",
            )

    @staticmethod
    def _given(name: str, converter: Any) -> list[str]:
        """The tensors that a conversion gives: `name`, and its like under the other target patterns."""
        first, *others = converter.target_patterns
        return [name, *(name.replace(first, other) for other in others)]

    def tied(self, name: str) -> str:
        """The tensor that `name` is the same as, where the config ties them and the files do not hold both."""
        source = self._tied.get(name, name)
        others = (source, *(other for other, owner in self._tied.items() if owner == source))
        return next((n for n in (name, *others) if n in self._renamed or n in self._parts), name)

    def sources(self, name: str) -> tuple[str, ...]:
        """The stored tensors that tensor `name` of the model is made of; none when the files lack it."""
        name = self.tied(name)
        if name in self._renamed:
            return (self._renamed[name],)
        if name in self._parts:
            return tuple(key for key, _ in self._groups[self._parts[name]][1])
        return ()

    def is_whole(self, name: str) -> bool:
        """Whether `name` is one stored tensor as it lies there, of the model's shape."""
        return self.tied(name) in self._renamed

    def is_shared(self, name: str) -> bool:
        """Whether the config ties `name` to another tensor."""
        return name in self._tied or name in self._tied.values()

    def is_transposed(self, module: str) -> bool:
        """Whether the stacked matrices of a module of experts are [E, inputs, outputs]."""
        try:
            found = self._model.get_submodule(module)
        except AttributeError:
            return False
        return bool(getattr(found, "is_transposed", False))

    def keeps_rows(self, name: str) -> bool:
        """Whether `name` is made by stacking and joining whole rows, so that what lies along them stays as it is."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        name = self.tied(name)
        if name in self._renamed:
            return True
        converter, _ = self._groups[self._parts[name]]
        last = len(self.names[name]) - 1
        return all(type(op) in (MergeModulelist, Concatenate) and 0 <= op.dim < last for op in converter.operations)

    def gaps(self, name: str) -> tuple[str, ...]:
        """Stored tensors that lack among the numbered pieces (an expert each) that `name` is made of.

        Every source of a conversion must number its pieces 0, 1, .. up to the same last one, which a stack [E, .., ..]
        tells; where it does not, a missing last piece shows in the shape of the result.
        """
        name = self.tied(name)
        if name in self._renamed or name not in self._parts:
            return ()
        by_source: dict[str, list[str]] = {}
        for key, pattern in self._groups[self._parts[name]][1]:
            by_source.setdefault(pattern, []).append(key)
        numbered = [found for keys in by_source.values() if (found := _numbered(keys))]
        shape = self.names[name]
        count = max([max(found) + 1 for found in numbered] + ([shape[0]] if len(shape) == 3 else []))
        return tuple(_like(found, i) for found in numbered for i in range(min(count, _MOST_PIECES)) if i not in found)

    def tensor(self, name: str, read: Callable[[str], Tensor]) -> Tensor | None:
        """Tensor `name` of the model in the stored type; `read` gives a stored one. None when the files lack it.

        CheckpointError when the pieces do not fit together.
        """
        name = self.tied(name)
        if name in self._renamed:
            return read(self._renamed[name])
        if name not in self._parts:
            return None
        group = self._parts[name]
        converter, pieces = self._groups[group]
        fresh = copy.deepcopy(converter)
        for key, pattern in pieces:
            fresh.add_tensor(group, key, pattern, lambda key=key: read(key))
        try:
            found = fresh.convert(group, model=self._model, config=self._config).get(name)
        except CheckpointError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"tensor {name} cannot be made of {pieces[0][0]} and {len(pieces) - 1} more: {first[:200]}"
            ) from error
        return found[0] if isinstance(found, list) else found


def _numbered(keys: list[str]) -> dict[int, str]:
    """Names that differ in one number, by that number; none when they differ otherwise."""
    parts = [key.split(".") for key in keys]
    differ = [column for column in zip(*parts, strict=False) if len(set(column)) > 1]
    same_length = len({len(p) for p in parts}) == 1
    if not same_length or len(differ) != 1 or not all(number.isdecimal() for number in differ[0]):
        return {}
    return {int(number): key for number, key in zip(differ[0], keys, strict=True)}


def _like(numbered: dict[int, str], index: int) -> str:
    """The name that piece `index` would have."""
    first, second = list(numbered.values())[:2]
    parts = zip(first.split("."), second.split("."), strict=True)
    return ".".join(mine if mine == other else str(index) for mine, other in parts)
