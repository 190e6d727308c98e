"""`model: {transformers: FOLDER}`: a causal language model of the transformers library as a Program.

The module is built from its config with fake parameters (nothing is allocated), its experts in an implementation that
exports, and its KV cache as static buffers written at start_pos. Weights are read when a target asks for them.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from moec.checkpoints.coded import CodedEntry
from moec.checkpoints.codes_of_config import with_codes
from moec.checkpoints.config_json import read_json
from moec.checkpoints.folder import foreign_folder, read_tensors, shortened
from moec.checkpoints.mxfp4 import NAME as MXFP4
from moec.checkpoints.quantized import said_by_config
from moec.checkpoints.safetensors_file import finite, shown
from moec.compiler.errors import CheckpointError, CompileError
from moec.compiler.export import EXAMPLE_TOKENS, MAX_TOKENS, assemble, export_module, unreadable, zeros
from moec.compiler.program import LazyWeight, ModelInfo, Program, Role
from moec.compiler.quant import QuantizedTensor
from moec.compiler.quantizer import format_of
from moec.compiler.source import Checkpoint, Weights
from moec.compiler.spec.quantization import Quantization
from moec.compiler.weights import Provenance, StoredCodes
from moec.sources.accounting import check_tensors
from moec.sources.adapters import Merged
from moec.sources.roles import roles_by_use
from moec.sources.transformers_config import build_model, home_of, read_config
from moec.sources.transformers_recurrence import token_by_token

EXPERTS = "batched_mm"  # of the implementations that export, the one that needs no sort


def export_transformers(
    folder: Path,
    name: str,
    *,
    weights: Weights | None = None,
    max_tokens: int = MAX_TOKENS,
    context: int | None = None,
    experts: str = EXPERTS,
) -> Program:
    """The Program of the model that `folder`/config.json describes, stage EXPORTED; without `weights`, shapes only.

    `context` bounds the KV cache (default: the model's own length); `experts` is the experts implementation.
    MissingExtra without transformers; CompileError for a model that it cannot build or export.
    """
    config = read_config(folder)
    ends = _eos_ids(config.get_text_config(), folder)
    return export_config(
        config, folder, name, weights=weights, max_tokens=max_tokens, context=context, experts=experts, eos_ids=ends
    )


def export_config(
    config: Any,
    folder: Path,
    name: str,
    *,
    eos_ids: tuple[int, ...],
    weights: Weights | None = None,
    max_tokens: int = MAX_TOKENS,
    context: int | None = None,
    experts: str = EXPERTS,
) -> Program:
    """As `export_transformers`, for a config that was read already. `folder` names it in messages; `eos_ids` end a
    text."""
    length = _length(config, folder, context)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _build(config, mode, experts, folder)
    _settle_frequencies(model, length)
    _tie(model, weights)
    try:
        with token_by_token(model):
            with mode:
                wrapper = _Cached(model, length, min(max_tokens, length))
            exported = export_module(wrapper, context=length, max_tokens=max_tokens, mode=mode)
    except Exception as error:
        raise CompileError(
            f"{config.model_type} cannot be exported with static caches: {_why_not(error)}",
            place=str(folder),
            remedy="docs/any-moe.md lists what can be; or give a module of your own, model: {python: module:function}",
        ) from error
    stored = {f"model.{n}" for n in wrapper.model.state_dict()}  # a persistent buffer is the checkpoint's to give
    buffers = dict(wrapper.model.named_buffers(prefix="model"))
    constants = {n: _constant(b) for n, b in buffers.items() if n not in stored}
    caches = {n: zeros(tuple(b.shape)) for n, b in wrapper.named_buffers() if n.startswith("cache_")}

    def lazy(n: str, shape: tuple[int, ...]) -> LazyWeight:
        own = n.removeprefix("model.")
        return unreadable(own, shape) if weights is None else weights.weight(own, shape)

    loaded = {
        n: lazy(n, tuple(p.shape))
        for n, p in [*wrapper.named_parameters(remove_duplicate=False), *buffers.items()]
        if n not in constants
    }
    roles = {**roles_by_use(exported), **dict.fromkeys(constants, Role.CONSTANT), **dict.fromkeys(caches, Role.CACHE)}
    text = config.get_text_config()
    bos = getattr(text, "bos_token_id", None)
    info = ModelInfo(
        name=name,
        vocab_size=int(text.vocab_size),
        context=length,
        max_tokens=min(max_tokens, length),
        bos_id=bos if isinstance(bos, int) else None,
        eos_ids=eos_ids,
    )
    lifted = {n: _constant(t) for n, t in exported.constants.items() if isinstance(t, Tensor) and n not in constants}
    roles |= dict.fromkeys((n for n in lifted if n not in caches), Role.CONSTANT)
    return assemble(exported, {**lifted, **loaded, **constants, **caches}, roles, info)


def _tie(model: nn.Module, weights: Weights | None) -> None:
    """Make one parameter of those that the config ties, so that the graph reads one; fake parameters come apart.

    Where the files hold both and they differ, each keeps its own, as transformers has it.
    """
    for name, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if isinstance(weights, TransformersStore) and not weights.is_tied(name, source):
            continue
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, model.get_parameter(source))


def _why_not(error: Exception) -> str:
    """What an export failed at, in words where torch has only the name of an operator."""
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return f"its forward goes by the values of a tensor ({error.func}), which no export can follow"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Constraints violated"):
        return "its forward fixes the number of tokens of a call"
    if lines[0].startswith("Attempting to broadcast a dimension"):
        return "its forward makes tensors, as of a bias by distance (ALiBi), that do not fit keys of the whole context"
    return lines[0][:300]


def _settle_frequencies(model: nn.Module, length: int) -> None:
    """Rotary frequencies that change with the length of the text: up to `length` positions they are one set, if so."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
            module.rope_type = _settled(module, kinds, parameters, length)
            if module.rope_type != kinds and "short_mscale" in (parameters or {}):
                _settle_scale(module, float(parameters["short_mscale"]))  # type: ignore[index]
        elif isinstance(kinds, dict):
            every = module.config.rope_parameters
            module.rope_type = {t: _settled(module, kind, every.get(t), length) for t, kind in kinds.items()}


def _settle_scale(module: Any, scale: float) -> None:
    """Of Phi-MoE, which reads its config at every call: the frequencies as they were made, and the scale of a text that
    is no longer than the original positions."""
    module.config = SimpleNamespace(rope_parameters={"rope_type": "default"})
    module.rope_init_fn = lambda config: (module.inv_freq, scale)


def _settled(module: Any, kind: str, parameters: Any, length: int) -> str:
    """`default`, which leaves the frequencies as they were made, when no text of `length` positions changes them."""
    limit = 0
    if "dynamic" in kind:
        limit = int(getattr(module, "max_seq_len_cached", 0))
    elif kind == "longrope" and isinstance(parameters, dict):
        limit = int(parameters.get("original_max_position_embeddings") or 0)
        if length > limit:
            raise CompileError(
                f"its rotary frequencies change when a text is longer than {limit} positions, the context is {length}",
                remedy=f"bound it: `model: {{transformers: ..., context: {limit}}}`",
            )
    return "default" if length <= limit else kind


def _eos_ids(text: Any, folder: Path) -> tuple[int, ...]:
    """The ids that end a text: of generation_config.json (which ends a chat model's turns), then of config.json."""
    file = (folder if folder.is_dir() else folder.parent) / "generation_config.json"
    given: Any = None
    if file.exists():
        given = read_json(file)
    found: list[int] = []
    for ids in (given.get("eos_token_id") if isinstance(given, dict) else None, getattr(text, "eos_token_id", None)):
        found += [i for i in (ids if isinstance(ids, (list, tuple)) else [ids]) if isinstance(i, int)]
    return tuple(dict.fromkeys(i for i in found if 0 <= i < int(text.vocab_size)))


def shapes_of(config: Any, folder: Path, context: int | None = None) -> tuple[nn.Module, int]:
    """The module of a config with fake parameters (nothing is allocated), and its context length."""
    model = _build(config, FakeTensorMode(allow_non_fake_inputs=True), EXPERTS, folder)
    _tie(model, None)
    return model, _length(config, folder, context)


def kept_by_layers(model: nn.Module, length: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every buffer in which an export of `model` holds caches and states; fake parameters will do."""
    with fake_mode_of_parameters(model), token_by_token(model):
        return {n: tuple(b.shape) for n, b in _Cached(model, length, EXAMPLE_TOKENS).named_buffers(recurse=False)}


def fake_mode_of_parameters(model: nn.Module) -> FakeTensorMode:
    """The mode that the parameters of `shapes_of` were made in."""
    return next(p.fake_mode for p in model.parameters() if isinstance(p, FakeTensor))


def _length(config: Any, folder: Path, context: int | None) -> int:
    """Positions of the KV cache: `context`, by default what the model was trained for. CompileError if it is more."""
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 2048)
    if context is not None and context > longest:
        raise CompileError(
            f"a context of {context} is more than the {longest} positions of the model",
            place=str(folder),
            remedy=f"set context to at most {longest}",
        )
    return context or longest


def _build(config: Any, mode: FakeTensorMode, experts: str, folder: Path) -> nn.Module:
    """The model with fake float32 parameters and real buffers (rotary frequencies are computed at construction)."""
    with _fake_parameters(mode), torch.no_grad():
        # transformers chooses the form of attention: sdpa, or products for models with attention sinks
        model: nn.Module = build_model(config, folder, experts)
    return model.eval()


def random_model(config: Any, folder: Path) -> nn.Module:
    """A float32 model of a config, initialised as transformers does; CheckpointError when it cannot be built."""
    model: nn.Module = build_model(config, folder)
    return model.eval()


@contextmanager
def _fake_parameters(mode: FakeTensorMode) -> Iterator[None]:
    """Every parameter registered in this context becomes a fake one of its shape."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            with mode:
                param = nn.Parameter(torch.empty(param.shape, dtype=param.dtype), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original


class _Cached(nn.Module):
    """`forward(tokens [1, T], start_pos [1]) -> logits` over caches and states held as buffers `cache_*`."""

    def __init__(self, model: nn.Module, length: int, max_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.length = length
        for name, shape in self._shapes(min(EXAMPLE_TOKENS, max_tokens)):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))

    def _shapes(self, tokens: int) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of what every layer keeps, learnt from one call with fake values."""
        cache = self._cache()
        chosen = self.model.config._experts_implementation
        self.model.set_experts_implementation(EXPERTS)  # grouped_mm has no fake float32 form outside of an export
        with torch.no_grad():
            positions = torch.arange(tokens)
            self._call(torch.zeros(1, tokens, dtype=torch.long), positions, cache)
        self.model.set_experts_implementation(chosen)
        return list(cache.shapes())

    def _cache(self) -> Any:
        from moec.sources.transformers_cache import HeldCache

        return HeldCache(self.model.config, self.length)

    def _call(self, tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
        return self.model(input_ids=tokens, position_ids=positions[None], past_key_values=cache, use_cache=True).logits

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        cache = self._cache()
        cache.hold(dict(self.named_buffers(recurse=False)), start_pos)
        positions = start_pos + torch.arange(tokens.shape[1], device=tokens.device)
        return self._call(tokens, positions, cache)


def _constant(value: Tensor) -> LazyWeight:
    return LazyWeight(tuple(value.shape), value.dtype, lambda: value)


class TransformersStore(Checkpoint):
    """The checkpoint of a folder. Opened without reading a weight; weights go by the names of transformers' module.

    `dequantize`: types of codes whose values are used as floats; codes of the others are carried.
    """

    def __init__(self, folder: Path, dequantize: Iterable[str] = ()) -> None:
        self.folder = home_of(folder)
        self._dequantize = frozenset(dequantize)
        foreign = foreign_folder(self.folder)
        if foreign is not None:
            raise foreign
        if not any(self.folder.glob("*.safetensors")):
            raise CheckpointError(
                "there are no safetensors files",
                place=str(self.folder),
                remedy="give --checkpoint DIR with the weights",
            )
        faults: list[str] = []
        stored = read_tensors(self.folder, faults)
        if faults:
            raise CheckpointError(shortened(faults))
        config = _config_file(folder)
        raw = read_json(config) if config.is_file() else {}
        self._entries, notes = with_codes(stored.entries, raw, str(self.folder))
        self.notes = stored.ignored + notes
        self._conversions: Any = None
        self._merged: Merged | None = None

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and places of the tensors; the weights themselves are not read."""
        beside = [other for entry in self._coded() for other in entry.beside]
        entries = sorted([*self._entries.values(), *beside], key=lambda e: e.name)
        lines = (f"{e.name} {e.dtype} {list(e.shape)} {e.file.name} {e.begin} {e.end}" for e in entries)
        adapters = () if self._merged is None else self._merged.digests()
        return hashlib.sha256("\n".join((*lines, *adapters)).encode()).hexdigest()

    def check(self, model: Path) -> None:
        """Account for every tensor of the model that `model`/config.json describes, without reading one.

        CheckpointError for tensors that the files lack, hold as codes, or hold inside a layer that has no such tensor.
        """
        self._conversions = self._conversions_of(read_config(model))
        said = [said_by_config(read_json(f)) for f in {_config_file(self.folder), _config_file(model)} if f.is_file()]
        read = tuple({entry.dtype for entry in self._coded()})
        format_name = next((name for name in said if name is not None and not name.startswith(read)), None)
        unread = check_tensors(self.folder, self._entries, self._conversions, format_name)
        self.notes += (*unread, *self._about())

    def merge(self, adapters: Iterable[Path]) -> None:
        """Merge LoRA adapters into the weights as these are read; after `check`.

        CheckpointError for an adapter that is not read, and for one of another model.
        """
        folders = tuple(adapters)
        if folders:
            self._merged = Merged(folders, self._entries, self._conversions, self._dequantize)
            self.notes += self._merged.notes()

    def _coded(self) -> list[CodedEntry]:
        return [entry for entry in self._entries.values() if isinstance(entry, CodedEntry)]

    def _about(self) -> Iterator[str]:
        """What becomes of the weights that are held as codes, by format."""
        fates = Counter((entry.dtype, self._fate(entry)) for entry in self._coded())
        for (kind, fate), count in sorted(fates.items()):
            yield f"{kind} tensors {fate}: {count}"

    def _fate(self, entry: CodedEntry) -> str:
        if entry.dtype in self._dequantize:
            return "dequantized"
        if entry.format is None:
            return "read as floats"
        return (
            "carried bit for bit"
            if entry.same_codes
            else f"carried as {str(entry.format.grid).upper()} codes of the same values"
        )

    def check_codes(self, quantization: Quantization | None) -> None:
        """CheckpointError where `quantization` would round codes of the files anew; without one, values are used."""
        if quantization is None:
            return
        carried = [entry for entry in self._coded() if entry.dtype not in self._dequantize]
        for entry in carried:
            if entry.format is None:
                raise self._uncarried(entry, entry.reason)
        scheme = quantization.scheme_of(Role.EXPERT.value)
        experts = next((entry for entry in carried if entry.dtype == MXFP4), None)
        if scheme is None or experts is None or experts.format is None:
            return
        chosen = format_of(scheme)
        if chosen.holds(experts.format) and scheme.axis == "in":
            if chosen.grid != experts.format.grid:
                self.notes += (f"{MXFP4} experts become {str(chosen.grid).upper()} codes of the same values",)
            return
        raise CheckpointError(
            f"tensor {experts.name} is {MXFP4}, {experts.format} along in; the spec stores experts as "
            f"{chosen} along {scheme.axis}",
            place=str(self.folder),
            remedy="set `experts: {weights: fp4, group_size: 32}` and `expert_group_axis: in`, which carries codes; "
            f"or `dequantize: [{MXFP4}]` in the model's section, which rounds their values anew",
        )

    def _uncarried(self, entry: CodedEntry, reason: str) -> CheckpointError:
        return CheckpointError(
            f"the codes of {shown(entry.name)} ({entry.dtype}) cannot be carried: {reason}",
            place=str(self.folder),
            remedy=f"`dequantize: [{entry.dtype}]` in the model's section, or --dequantize {entry.dtype}: their values "
            "are then quantized anew, as `quantization` says",
        )

    def weight(self, name: str, shape: tuple[int, ...]) -> LazyWeight:
        return LazyWeight(shape, torch.float32, self.reader(name, shape), self._stored(name, shape))

    def _stored(self, name: str, shape: tuple[int, ...]) -> StoredCodes | None:
        """The codes of tensor `name` of the model; None where the files hold floats, or codes that are not carried.

        CheckpointError for a tensor that is made of codes and of other things.
        """
        sources = self._sources(name)
        parts = [self._entries[source] for source in sources]
        coded = [e for e in parts if isinstance(e, CodedEntry) and e.dtype not in self._dequantize]
        first = next((e for e in coded if e.format is not None), None)
        if first is None or first.format is None:
            return None
        origin = Provenance("carried", first.dtype)
        if sources == (name,) or (self._conversions is not None and self._conversions.is_whole(name)):
            if first.shape != shape:
                return None  # refused when its values are read
            return StoredCodes(first.format, first.codes, origin, transposed=first.transposed, widens=True)
        alike = [e for e in coded if (e.format, e.transposed) == (first.format, False)]
        if len(alike) < len(parts):
            other = next(e for e in parts if e not in alike)
            what = str(other.format) if isinstance(other, CodedEntry) else other.dtype
            raise self._uncarried(first, f"{shown(other.name)}, which belongs to the same tensor, is {what}")
        if not self._conversions.keeps_rows(name):
            raise self._uncarried(first, f"the model holds {name} in another arrangement")
        return StoredCodes(first.format, lambda: self._joined(name, shape, alike), origin, widens=True)

    def _sources(self, name: str) -> tuple[str, ...]:
        """The stored tensors that `name` is made of."""
        if name in self._entries:
            return (name,)
        if not self._coded():
            return ()
        if self._conversions is None:
            self._conversions = self._conversions_of(read_config(self.folder))
        found: tuple[str, ...] = self._conversions.sources(name)
        return found

    def _joined(self, name: str, shape: tuple[int, ...], parts: list[CodedEntry]) -> QuantizedTensor:
        """The codes of a tensor that the model makes of `parts` by joining and stacking whole rows."""
        held = {part.name: part.codes() for part in parts}
        first = next(iter(held.values()))
        codes, scales = (
            self._conversions.tensor(name, lambda stored, take=take: take(held[stored]))
            for take in (lambda tensor: tensor.codes, lambda tensor: tensor.scales)
        )
        found = replace(first, codes=codes, scales=scales)
        if found.shape != shape:
            raise self._of_another_shape(name, found.shape, shape)
        return found

    def parameters(self) -> int:
        """Elements of the model's tensors, tied ones once; after `check`."""
        shapes = {self._conversions.tied(name): shape for name, shape in self._conversions.names.items()}
        return sum(math.prod(shape) for shape in shapes.values())

    def is_tied(self, name: str, source: str) -> bool:
        """Whether `name`, which the config ties to `source`, is one tensor with it: stored once, or twice and equal."""
        if self._conversions is None:
            self._conversions = self._conversions_of(read_config(self.folder))
        if self._conversions.tied(name) == self._conversions.tied(source):
            return True
        mine, theirs = self._tensor(name), self._tensor(source)
        return mine.shape == theirs.shape and torch.equal(mine, theirs)

    def reader(self, name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        """Reads tensor `name` of the model as float32."""
        return lambda: self._read(name, shape)

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self._tensor(name)
        if tuple(found.shape) != shape:
            raise self._of_another_shape(name, tuple(found.shape), shape)
        return finite(found.detach().to(torch.float32), name, str(self.folder))

    def _of_another_shape(self, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> CheckpointError:
        what = f"tensor {name} has shape {list(found)}, the model needs {list(shape)}"
        return CheckpointError(what, place=str(self.folder))

    def _tensor(self, name: str) -> Tensor:
        if name in self._entries:  # stored under the model's own name
            return self._value(name)
        if self._conversions is None:
            self._conversions = self._conversions_of(read_config(self.folder))
        made: Tensor | None = self._conversions.tensor(name, self._value)
        if made is None:
            raise CheckpointError(f"the checkpoint has no tensor {name}", place=str(self.folder))
        return made if self._merged is None else self._merged.changed(made, self._merged.made, name)

    def _value(self, stored: str) -> Tensor:
        """A tensor of the files, adapters merged."""
        value = self._entries[stored].tensor()
        return value if self._merged is None else self._merged.changed(value, self._merged.stored, stored)

    def _conversions_of(self, config: Any) -> Any:
        from moec.sources.conversions import Conversions

        return Conversions(config, self._entries, self.folder)


def _config_file(folder: Path) -> Path:
    return home_of(folder) / "config.json"
