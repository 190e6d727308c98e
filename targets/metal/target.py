"""The Metal target: a `.pte` whose methods are one MLX delegate each, executed here by MLX from the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moec.compiler.extras import Need
from moec.compiler.target import LoweredFiles, Session, Table, Target, own_facts, own_manifest, own_options, register
from moec.targets.metal.facts import MetalFacts, tables
from moec.targets.metal.options import Options

if TYPE_CHECKING:
    from moec.compiler.artifact import Artifact
    from moec.compiler.footprint import Footprint
    from moec.compiler.pipeline import Pass
    from moec.compiler.program import Program
    from moec.compiler.progress import Progress
    from moec.compiler.spec.targets import TargetOptions


class MetalTarget(Target):
    """See docs/ios.md for what an application does with the file."""

    name = "metal"
    about = "Apple GPUs: a .pte with one MLX delegate; run here by MLX"
    needs = (Need("mlx.core", "metal", "run"),)
    facts_class = MetalFacts

    def legalize(self, options: TargetOptions) -> list[Pass]:
        from moec.targets.metal.legalize import legalize_passes

        return legalize_passes()

    def lower(self, program: Program, out: Path, options: TargetOptions, progress: Progress) -> LoweredFiles:
        from moec.targets.metal.lower import lower  # the delegate's builder: seconds to import

        return lower(program, out, own_options(options, Options), progress)

    def load(self, artifact: Artifact) -> Session:
        """The artifact with its own types: 16-bit activations are rounded as on the GPU."""
        return self._session(artifact, wide=False)

    def rounds(self, artifact: Artifact) -> bool:
        return own_facts(artifact, MetalFacts).dtype != "float32"

    def load_exact(self, artifact: Artifact) -> Session:
        """The float32 twin: same instructions, same stored values, nothing rounded to 16 bits. `verify` compares it."""
        return self._session(artifact, wide=True)

    def footprint(self) -> Footprint:
        from moec.targets.metal.footprint import FOOTPRINT

        return FOOTPRINT

    def describe(self, artifact: Artifact) -> list[Table]:
        return tables(own_facts(artifact, MetalFacts))

    def _session(self, artifact: Artifact, *, wide: bool) -> Session:
        from moec.targets.metal.session import MetalSession

        manifest = own_manifest(artifact, self.name)
        return MetalSession(
            artifact.path("model.pte"),
            vocab_size=manifest.model.vocab_size,
            context=manifest.model.context,
            max_tokens=manifest.model.max_tokens,
            facts=own_facts(artifact, MetalFacts),
            wide=wide,
        )


register("metal", MetalTarget)
