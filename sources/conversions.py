"""Tensors of a transformers checkpoint under the model's own names, made one at a time.

transformers knows how each family stores its weights: names that changed, experts stored one by one (`experts.3.w1`)
that the model holds stacked, gate and up apart that it holds joined. `from_pretrained` converts a whole model in
memory; this applies the same conversions to the one tensor that is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Conversions:
    """The conversions of one model, for the tensor names `stored` that its checkpoint holds."""

    def __init__(self, config: Any, stored: Iterable[str]) -> None:
        self._config = config
        self._renamed: dict[str, str] = {}  # the model's name -> the stored one
        self._groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}  # name -> converter, (stored, pattern)
        self._tied: dict[str, str] = {}
        try:
            self._collect(stored)
        except (ImportError, AttributeError, TypeError):  # this transformers keeps its conversions elsewhere
            self._renamed, self._groups = {}, {}

    def _collect(self, stored: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        from moec.sources.transformers_model import auto_model

        with torch.device("meta"):
            model = auto_model(self._config).from_config(self._config, dtype=torch.float32)
        tied = getattr(model, "all_tied_weights_keys", None)
        self._tied = dict(tied) if isinstance(tied, dict) else {}
        mapping = get_model_conversion_mapping(model)
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        renamings = [m for m in mapping if not isinstance(m, WeightConverter)]
        names = model.state_dict()
        for key in sorted(stored, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
            if pattern is None:
                self._renamed[name] = key
                continue
            converter = next(c for c in converters if pattern in c.source_patterns)
            self._groups.setdefault(name, (converter, []))[1].append((key, pattern))

    def tensor(self, name: str, read: Callable[[str], Tensor]) -> Tensor | None:
        """Tensor `name` of the model in the stored type; `read` gives a stored one. None when it is not known here."""
        name = self._tied.get(name, name) if name not in self._renamed and name not in self._groups else name
        if name in self._renamed:
            return read(self._renamed[name])
        if name not in self._groups:
            return None
        converter, pieces = self._groups[name]
        fresh = copy.deepcopy(converter)
        for key, pattern in pieces:
            fresh.add_tensor(name, key, pattern, lambda key=key: read(key))
        found = fresh.convert(name, config=self._config).get(name)
        return found[0] if isinstance(found, list) else found
