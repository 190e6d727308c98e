"""The XNNPACK CPU target: a `.pte` with our operators as C++ kernels and the XNNPACK delegate for dense linears."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.target import (
    LoweredFiles,
    Say,
    Session,
    Table,
    Target,
    own_facts,
    own_manifest,
    own_options,
    register,
)
from moec.targets.xnnpack.facts import XnnpackFacts, tables
from moec.targets.xnnpack.options import Options

if TYPE_CHECKING:
    from moec.compiler.artifact import Artifact
    from moec.compiler.footprint import Footprint
    from moec.compiler.pipeline import Pass
    from moec.compiler.program import Program
    from moec.compiler.progress import Progress
    from moec.compiler.spec.targets import TargetOptions
    from moec.compiler.timing import BenchPlan


class XnnpackTarget(Target):
    """See docs/android.md for what an application does with the file."""

    name = "xnnpack"
    about = "phones' CPUs: a .pte with our kernels and the XNNPACK delegate; run here by the same runtime"
    facts_class = XnnpackFacts
    saves_sessions = True
    integer_attention = True
    latent_attention = True

    def legalize(self, options: TargetOptions) -> list[Pass]:
        from moec.targets.xnnpack.legalize import legalize_passes

        return legalize_passes(own_options(options, Options))

    def lower(self, program: Program, out: Path, options: TargetOptions, progress: Progress) -> LoweredFiles:
        from moec.targets.xnnpack.lower import lower  # ExecuTorch's compiler: seconds to import

        return lower(program, out, own_options(options, Options), progress)

    def obstacle(self) -> str | None:
        """Why artifacts cannot be run here: neither built kernels nor a compiler for them; None if they can."""
        from moec.runtime.native import obstacle

        return obstacle()

    def load(self, artifact: Artifact) -> Session:
        return self._session(artifact, float_activations=False)

    def load_unrounded(self, artifact: Artifact) -> Session | None:
        """The artifact with fp32 activations on the same codes; None where the XNNPACK delegate rounds some of them."""
        if own_facts(artifact, XnnpackFacts).asymmetric_roles:
            return None
        return self._session(artifact, float_activations=True)

    def footprint(self) -> Footprint:
        from moec.targets.xnnpack.footprint import FOOTPRINT

        return FOOTPRINT

    def bench(self, artifact: Artifact, plan: BenchPlan, progress: Progress) -> dict[str, Any]:
        from moec.targets.xnnpack.bench import bench
        from moec.targets.xnnpack.memory import budget_arguments

        budget = budget_arguments(own_options(artifact.options(), Options), artifact.cache_aware)
        return bench(artifact.path("model.pte"), plan, progress, budget)

    def profile(self, artifact: Artifact, request: Any) -> dict[str, Any]:
        from moec.targets.xnnpack.memory import budget_arguments
        from moec.targets.xnnpack.profiling import run

        budget = budget_arguments(own_options(artifact.options(), Options), artifact.cache_aware)
        return run(artifact.path("model.pte"), request, budget)

    def device(self, artifact: Artifact, serial: str | None, runner: Path | None, say: Say, *, dry_run: bool) -> Any:
        from moec.targets.xnnpack.android import Device
        from moec.targets.xnnpack.memory import budget_arguments

        budget = budget_arguments(own_options(artifact.options(), Options), artifact.cache_aware)
        return Device(serial, runner=runner, dry_run=dry_run, say=say, budget=budget)

    def describe(self, artifact: Artifact) -> list[Table]:
        return tables(own_facts(artifact, XnnpackFacts))

    def _session(self, artifact: Artifact, *, float_activations: bool) -> Session:
        from moec.targets.xnnpack.memory import ExpertCacheOptions
        from moec.targets.xnnpack.session import CpuSession

        manifest = own_manifest(artifact, self.name)
        options = own_options(artifact.options(), Options)
        return CpuSession(
            artifact.path("model.pte"),
            threads=options.threads,
            float_activations=float_activations,
            artifact=manifest.contents,
            memory_mb=options.memory_mb,
            experts=ExpertCacheOptions(options.eviction, cache_aware=artifact.cache_aware),
            exact_calls=own_facts(artifact, XnnpackFacts).exact_calls,
        )


register("xnnpack", XnnpackTarget)
