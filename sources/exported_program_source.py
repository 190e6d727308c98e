"""`model: {exported_program: FILE}`: what torch.export.save wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moec.compiler.errors import CheckpointError
from moec.compiler.source import Checkpoint, ModelSource, Weights, register
from moec.compiler.spec.model import LoosePath
from moec.compiler.spec.strict import Section
from moec.sources.python_source import OWN_WEIGHTS

if TYPE_CHECKING:
    from moec.compiler.program import Program
    from moec.compiler.spec.model import Spec


class ExportedProgramModel(Section):
    """A program that `torch.export.save` wrote."""

    exported_program: LoosePath


class ExportedProgramSource(ModelSource[ExportedProgramModel]):
    """The weights are in the file, and the file is named by the spec."""

    key = "exported_program"
    section = ExportedProgramModel

    def has_weights(self, spec: Spec) -> bool:
        return True

    def open(self, spec: Spec, checkpoint: Path | None) -> Checkpoint:
        from moec.sources.module_model import open_exported

        if checkpoint is not None:
            raise CheckpointError(OWN_WEIGHTS, place=str(checkpoint), remedy="leave the checkpoint out")
        return open_exported(self.model(spec).exported_program)

    def reopen(self, spec: Spec, recorded: Path, given: Path | None) -> Checkpoint:
        from moec.sources.module_model import open_exported

        return open_exported(given if given is not None else self.model(spec).exported_program)

    def export(self, spec: Spec, weights: Weights | None, *, max_tokens: int) -> Program:
        from moec.sources.module_model import ModuleStore, export_module_model, open_exported

        store = weights if isinstance(weights, ModuleStore) else open_exported(self.model(spec).exported_program)
        return export_module_model(store, spec.name, max_tokens=max_tokens)


register(ExportedProgramSource())
