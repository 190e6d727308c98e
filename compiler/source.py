"""What a model source is: where the models of one form of a spec's `model:` section come from.

A new source is a file `sources/<name>_source.py` that calls `register`; another distribution names its module in an
entry point of the group `moec.sources` (compiler/spec/sources.py). The module is imported when a spec is read, so it
imports torch and whatever else is heavy inside the methods that need it. docs/add-a-model-source.md goes through one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from moec.compiler.errors import CheckpointError
from moec.compiler.files import read_bytes
from moec.compiler.spec.strict import Fault, Section

if TYPE_CHECKING:
    from moec.compiler.architecture import Architecture
    from moec.compiler.program import LazyWeight, Program, Role
    from moec.compiler.reference import LayerReference
    from moec.compiler.spec.model import Spec
    from moec.compiler.spec.quantization import Quantization

TOKENIZER, CHAT_TEMPLATE, GENERATION = "tokenizer.json", "chat_template.jinja", "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
#: Files that a checkpoint may bring beside its weights; an artifact holds them under the same names.
COMPANIONS = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, GENERATION)
_MAX_COMPANION = 256 << 20  # bytes; the tokenizers of the largest vocabularies take 35 MB

M = TypeVar("M", bound=Section)


class Weights(Protocol):
    """Weights by the names of the graph that their source exports. Nothing is read before `LazyWeight.load`."""

    def weight(self, name: str, shape: tuple[int, ...]) -> LazyWeight:
        """The weight that the graph calls `name` and needs in `shape`; CheckpointError if there is none.

        Weights that are stored quantized give their codes and scales as `LazyWeight.stored`, beside `load`, which
        dequantizes: passes carry such codes into the artifact unchanged where the spec's scheme is the same.
        """
        ...


class Checkpoint(ABC):
    """The weights of one model, opened and checked.

    folder: where they lie, as the manifest records it. notes: what a user should know of them, a line each, such as
    files that are not read.
    """

    folder: Path
    notes: tuple[str, ...] = ()

    @abstractmethod
    def weight(self, name: str, shape: tuple[int, ...]) -> LazyWeight:
        """As `Weights.weight`."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256, in hexadecimal, that identifies these weights: `moec verify` compares it."""

    def companions(self) -> Mapping[str, bytes]:
        """Content of the files of `COMPANIONS` that the model has; by default those beside its weights.

        A source whose weights lie in one file makes them from it: a tokenizer.json as the tokenizers library reads it,
        a chat template in Jinja, a generation_config.json with the keys of transformers. CheckpointError for one that
        cannot be read.
        """
        files = {name: self.folder / name for name in COMPANIONS}
        return {
            name: read_bytes(file, limit=_MAX_COMPANION, fault=CheckpointError)
            for name, file in files.items()
            if file.exists()
        }


class ModelSource(ABC, Generic[M]):
    """One form of the `model:` section, from its keys to a Program.

    key: the key of `model:` that chooses this source. section: the class of the whole section; paths in it that are
    relative are taken from the spec's folder. default: whether a section without any source's key is checked as one of
    this source, so that its faults are reported; exactly one source of this distribution sets it.
    """

    key: ClassVar[str]
    default: ClassVar[bool] = False
    section: type[M]

    def model(self, spec: Spec) -> M:
        """The spec's `model:` section as this source's own class."""
        assert isinstance(spec.model, self.section), f"{spec.name}: {type(spec.model).__name__} is of another source"
        return spec.model

    # --- reading a spec: nothing here may import torch ---------------------------------------------------------------

    def quantization_faults(self, model: M, quantization: Quantization) -> Iterator[Fault]:
        """Settings of `quantization` that the known shapes of this model rule out; places are relative to `model`."""
        yield from ()

    def parameters(self, model: M) -> Mapping[str, int]:
        """Numbers of parameters that the section alone tells (`total`, `active` per token); empty if it does not."""
        return {}

    def smaller(self, model: M) -> Iterator[tuple[str, M]]:
        """Models that are like this one and smaller, with what was changed; each would have to be trained anew."""
        yield from ()

    def single_layer(self, model: M) -> M | None:
        """The model with one layer, where all are alike; None where that is not known. A report draws it."""
        return None

    # --- weights -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def has_weights(self, spec: Spec) -> bool:
        """Whether `open` finds weights when no checkpoint is named; `moec verify SPEC` makes random ones otherwise."""

    @abstractmethod
    def open(self, spec: Spec, checkpoint: Path | None) -> Checkpoint:
        """The weights of `checkpoint`, or those that the section brings. CheckpointError for missing or damaged ones.

        `checkpoint` is what the user or the spec names, None if neither does.
        """

    def reopen(self, spec: Spec, recorded: Path, given: Path | None) -> Checkpoint:
        """The weights that an artifact was compiled from: in `recorded`, the manifest's folder, unless `given`."""
        folder = given if given is not None else recorded
        if not folder.is_dir():
            raise CheckpointError(
                f"the checkpoint of {spec.name} is not there",
                place=str(folder),
                remedy="name the folder where it is now with --checkpoint",
            )
        return self.open(spec, folder)

    # --- the graph and its size --------------------------------------------------------------------------------------

    @abstractmethod
    def export(self, spec: Spec, weights: Weights | None, *, max_tokens: int) -> Program:
        """The model as a Program at stage EXPORTED, for calls of at most `max_tokens` tokens.

        `weights` None: shapes only, for plans, pictures and checks; reading a weight of it is an AssertionError.
        compiler/export.py has what most sources need: `export_module`, `assemble`. CompileError for a model that
        cannot be built or exported.
        """

    def architecture(self, spec: Spec) -> Architecture | None:
        """What `moec plan` counts: every matrix, cache and expert. None when only code or weights tell the shapes."""
        return None

    # --- what an artifact is verified against ------------------------------------------------------------------------

    def reference(
        self,
        spec: Spec,
        checkpoint: Checkpoint,
        quantization: Quantization | None,
        *,
        asymmetric_roles: Collection[Role] = (),
        integer_attention: bool = False,
    ) -> LayerReference | None:
        """The model in eager PyTorch, with the weights of `checkpoint` and rounding as `quantization` says, None for
        float. It should read and round them with code of its own: it cannot check code that it shares with the passes.

        asymmetric_roles: as of `Facts`; integer_attention: as of `Target`. None, as here, for the exported program as
        the reference.
        """
        return None


_SOURCES: dict[str, ModelSource[Any]] = {}


def register(source: ModelSource[Any]) -> None:
    """Make a source known by its key. A second one of the same key is a mistake of whoever wrote it."""
    if source.key in _SOURCES:
        raise AssertionError(f"model source {source.key} is registered twice")
    _SOURCES[source.key] = source


def registered() -> dict[str, ModelSource[Any]]:
    """Every source registered so far, by key."""
    return dict(_SOURCES)


class NamedWeights:
    """Weights from a mapping of name to LazyWeight."""

    def __init__(self, weights: Mapping[str, LazyWeight]) -> None:
        self._weights = weights

    def weight(self, name: str, shape: tuple[int, ...]) -> LazyWeight:
        found = self._weights.get(name)
        if found is None:
            raise CheckpointError(f"the model needs tensor {name} {list(shape)}", remedy="use a checkpoint that has it")
        return found
