"""From exported graphs (ATen and `moec` operators) to ExecuTorch's execution dialect: edge, delegates, memory plan.

This is what `to_edge_transform_and_lower` and `to_executorch` do, in the same order and with their own passes,
stopping before emission: `pte.py` emits, because weights are not in memory here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput
from executorch.exir.backend.backend_api import MethodProgramsPartitionerSpec, to_backend
from executorch.exir.backend.partitioner import Partitioner
from executorch.exir.passes import MemoryPlanningPass, SpecPropPass
from executorch.exir.passes.insert_write_back_for_buffers_pass import insert_write_back_for_buffers_pass
from executorch.exir.program._program import (
    _copy_module,
    collect_named_data_store_from_exported_program,
    edge_to_executorch_passes,
)
from torch.export import ExportedProgram
from torch.export._remove_auto_functionalized_pass import unsafe_remove_auto_functionalized_pass

from moec.targets.xnnpack.edge import plain_edge_program

# our dialect has checked the graph, operators of our own included; the dim order is always the default one
EDGE_CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)


@dataclass(frozen=True)
class Execution:
    """Memory-planned programs by method, and the weights that delegates keep for themselves."""

    methods: Mapping[str, ExportedProgram]
    named_data: NamedDataStoreOutput


def to_execution(methods: Mapping[str, ExportedProgram], partitioners: Sequence[Partitioner]) -> Execution:
    """Lower every method; caches (mutated buffers) share one arena, so that all methods see the same ones."""
    with quiet():
        edge = _to_edge(methods, list(partitioners))
        named_data = NamedDataStore()
        for program in edge.values():
            collect_named_data_store_from_exported_program(program, named_data)
        return Execution(_plan(edge), named_data.get_named_data_store_output())


def _to_edge(methods: Mapping[str, ExportedProgram], partitioners: list[Partitioner]) -> dict[str, ExportedProgram]:
    plain = {name: plain_edge_program(method) for name, method in methods.items()}
    programs = {name: program for name, program in plain.items() if program is not None}
    if len(programs) < len(methods):
        edge = to_edge_transform_and_lower(
            dict(methods), partitioner=dict.fromkeys(methods, partitioners), compile_config=EDGE_CONFIG
        )
        return {name: edge.exported_program(name) for name in methods}
    for partitioner in partitioners:
        programs = to_backend(MethodProgramsPartitionerSpec(programs, dict.fromkeys(methods, partitioner)))
    return programs


def _plan(edge: Mapping[str, ExportedProgram]) -> dict[str, ExportedProgram]:
    planning = MemoryPlanningPass(share_mutable_buffers=True)
    config = ExecutorchBackendConfig(memory_planning_pass=planning, emit_mutable_buffer_names=True)
    planned: dict[str, ExportedProgram] = {}
    for name in sorted(edge):
        program = unsafe_remove_auto_functionalized_pass(edge[name])
        module, signature = insert_write_back_for_buffers_pass(program)
        for step in edge_to_executorch_passes(config, name, edge_compile_config=EDGE_CONFIG):
            module = step(module).graph_module
            if isinstance(step, SpecPropPass):
                step.update_placeholder_tensor_specs(program, module)
        module = planning.run(module, signature).graph_module
        _copy_module(program.graph_module, module)
        planned[name] = program
    planning.run_multimethod()
    return planned


@contextmanager
def quiet() -> Iterator[None]:
    """ExecuTorch logs and warns about its own internals on every call; none of it is the user's to act on."""
    loggers = [logging.getLogger(name) for name in ("executorch", "root", "torch.fx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
