"""`model: {python: "module:function"}`: a torch module that a function of the user makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from moec.compiler.errors import CheckpointError
from moec.compiler.source import Checkpoint, ModelSource, Weights, register
from moec.compiler.spec.strict import Section, shown

if TYPE_CHECKING:
    from moec.compiler.program import Program
    from moec.compiler.spec.model import Spec

OWN_WEIGHTS = "a python model and an exported program bring their own weights"


def _reference(value: str) -> str:
    module, colon, function = value.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), function]):
        raise ValueError(f"expected 'module:function', got {shown(value)}")
    return value


class PythonModel(Section):
    """A function `module:function` of no arguments that returns the torch module to compile."""

    python: Annotated[str, AfterValidator(_reference)]


class PythonSource(ModelSource[PythonModel]):
    """The weights are the module's; what the manifest records is the folder where the module was found."""

    key = "python"
    section = PythonModel

    def has_weights(self, spec: Spec) -> bool:
        return True

    def open(self, spec: Spec, checkpoint: Path | None) -> Checkpoint:
        from moec.sources.module_model import open_python

        if checkpoint is not None:
            raise CheckpointError(OWN_WEIGHTS, place=str(checkpoint), remedy="leave the checkpoint out")
        return open_python(self.model(spec).python)

    def reopen(self, spec: Spec, recorded: Path, given: Path | None) -> Checkpoint:
        from moec.sources.module_model import open_python

        folder = given if given is not None else recorded
        if not folder.is_dir():
            raise CheckpointError(
                f"the folder of the module that {spec.name} was made from is not there",
                place=str(folder),
                remedy="name the folder where it is now with --checkpoint",
            )
        return open_python(self.model(spec).python, folder)

    def export(self, spec: Spec, weights: Weights | None, *, max_tokens: int) -> Program:
        from moec.sources.module_model import ModuleStore, export_module_model, open_python

        store = weights if isinstance(weights, ModuleStore) else open_python(self.model(spec).python)
        return export_module_model(store, spec.name, max_tokens=max_tokens)


register(PythonSource())
