"""Whether a recipe fits into memory as it is written, and the nearest settings that fit where it does not."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from oar_scale.config.schema import ParallelConfig
from oar_scale.errors import UserError
from oar_scale.planning import activations
from oar_scale.planning.activations import Checkpointing, TrunkActivations
from oar_scale.planning.case import Case
from oar_scale.planning.worker_memory import WorkerMemory, micro_batch_sizes, worker_memory, zero_settings

MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")
_PLAIN: Mapping[str, object] = {"hpz_workers": 1, "quantized_weights": False, "quantized_gradients": False}

Traced = tuple[ParallelConfig, TrunkActivations]
"""A trunk that was traced, and the settings it was traced with."""


@dataclass(frozen=True)
class MemoryFit:
    """The settings that are planned with."""

    parallel: ParallelConfig
    """The recipe's, with the cluster's workers and a micro-batch that divides the batch among them."""
    memory: WorkerMemory
    fits: bool
    """The recipe's own settings fit, but for a micro-batch that has to divide the batch among other workers."""
    message: str
    """One line for the report."""


@dataclass(frozen=True)
class MemoryRow:
    """One ZeRO stage and offload at the planned micro-batch: a row of the memory table."""

    zero_stage: int
    offload: str
    planned: bool
    memory: WorkerMemory
    totals: dict[str, int]
    """With each kind of activation checkpointing."""
    largest: dict[str, int]
    """The largest micro-batch that fits and divides the batch, with each; 0: none."""


def choose_settings(case: Case, traced: Traced | None = None) -> MemoryFit:
    """The recipe's settings if they fit; else the nearest that do: first a smaller micro-batch, then activation checkpointing, then others.

    Raises:
        UserError: nothing fits on such GPUs; the message names what would.
    """
    given, sizes, capacity = case.recipe.parallel, micro_batch_sizes(case.recipe, case.workers), case.cluster.memory
    written = given.model_copy(update={"workers": case.workers})
    divides = given.micro_batch in sizes
    if not divides:
        written = written.model_copy(update={"micro_batch": next((size for size in sizes if size <= given.micro_batch), sizes[0])})
    holds = memory_function(case, traced)
    needed = holds(written)
    if fits_on(case, needed):
        message = f"fits: {gb(needed.total)} of {gb(capacity)} GB"
        if not divides:
            message += (
                f" with parallel.micro_batch {written.micro_batch} ({given.micro_batch} x {case.workers} workers do not divide the batch)"
            )
        return MemoryFit(written, needed, True, message)
    for candidate, changes in _nearest(written, sizes):
        if fits_on(case, held := holds(candidate)):
            message = (
                f"DOES NOT FIT as written: {gb(needed.total)} of {gb(capacity)} GB with micro_batch {written.micro_batch} and zero_stage "
                f"{written.zero_stage}. Planned with {changes}: {gb(held.total)} GB"
            )
            return MemoryFit(candidate, held, False, message)
    raise UserError(_nothing_fits(case, needed, holds))


def memory_table(case: Case, parallel: ParallelConfig, traced: Traced | None = None) -> list[MemoryRow]:
    """Memory at the planned micro-batch, and the largest micro-batch, for each ZeRO stage, offload and kind of activation checkpointing."""
    sizes, holds = micro_batch_sizes(case.recipe, case.workers), memory_function(case, traced)

    def largest(setting: ParallelConfig) -> int:
        return next((n for n in sizes if fits_on(case, holds(setting.model_copy(update={"micro_batch": n})))), 0)

    rows = []
    for setting in zero_settings(parallel):
        by_mode = {mode: setting.model_copy(update={"activation_checkpointing": mode}) for mode in MODES}
        rows.append(
            MemoryRow(
                zero_stage=setting.zero_stage,
                offload=setting.offload,
                planned=(setting.zero_stage, setting.offload) == (parallel.zero_stage, parallel.offload),
                memory=holds(setting),
                totals={mode: holds(each).total for mode, each in by_mode.items()},
                largest={mode: largest(each) for mode, each in by_mode.items()},
            )
        )
    return rows


def memory_function(case: Case, traced: Traced | None = None) -> Callable[[ParallelConfig], WorkerMemory]:
    """A function from settings to a worker's memory; with a trace, activations by formula are scaled to agree with it."""

    def holds(parallel: ParallelConfig) -> WorkerMemory:
        trunk, mode = None, parallel.activation_checkpointing
        if traced is not None and traced[0].activation_checkpointing == mode:
            there, here = (activations.trunk(case.spec, each.micro_batch, parallel.precision, mode) for each in (traced[0], parallel))
            trunk = TrunkActivations(*(value * ours // by_formula for value, ours, by_formula in zip(traced[1], here, there, strict=True)))
        return worker_memory(
            case.spec,
            parallel,
            workers=case.workers,
            accumulation=case.accumulation(parallel),
            average=case.average,
            assumed=case.assumed,
            trunk=trunk,
        )

    return holds


def fits_on(case: Case, held: WorkerMemory) -> bool:
    """Whether a worker's memory fits into its GPU, and what is offloaded into the memory of its node."""
    return held.total <= case.cluster.memory and held.host * case.cluster.per_node <= case.assumed("memory.node_gb") * 1e9


def gb(size: float) -> str:
    """GB of 10^9 bytes, in three figures or so."""
    value = size / 1e9
    decimals = next(digits for least, digits in ((1000, 0), (10, 1), (1, 2), (0, 3)) if value >= least)
    return f"{value:,.{decimals}f}" if value else "0"


def _nearest(written: ParallelConfig, sizes: list[int]) -> Iterator[tuple[ParallelConfig, str]]:
    """Other settings, the least change first, and the changed fields as text."""
    modes = MODES[MODES.index(written.activation_checkpointing) + 1 :]
    changes: list[Mapping[str, object]] = [{}, *({"activation_checkpointing": mode} for mode in modes)]
    for stage in range(written.zero_stage + 1, 4):  # the lowest first: each sends more than the one below
        changes += [{"zero_stage": stage}, *({"zero_stage": stage, "activation_checkpointing": mode} for mode in modes)]
    if written.zero_stage == 3 and written.hpz_workers > 1:
        changes.append(_PLAIN)
    changes += [{**_PLAIN, "zero_stage": 3, "activation_checkpointing": "full", "offload": each} for each in _OFFLOADS]
    smaller = [size for size in sizes if size <= written.micro_batch]
    # A micro-batch below a quarter makes small matrix products, so that comes last: first every change with at least a quarter.
    for bound in (4, written.micro_batch):
        for change in changes:
            for size in (size for size in smaller if size * bound >= written.micro_batch):
                whole = {"micro_batch": size, **change}
                names = ", ".join(f"{key} {value}" for key, value in whole.items() if value != getattr(written, key))
                yield written.model_copy(update=whole), names


_OFFLOADS = ("optimizer", "optimizer_and_parameters")
MANY = 2**17
"""More workers than any cluster has: where the search for a number that would do ends."""


def _nothing_fits(case: Case, needed: WorkerMemory, holds: Callable[[ParallelConfig], WorkerMemory]) -> str:
    update = {"workers": case.workers, "micro_batch": 1, "zero_stage": 3, "activation_checkpointing": "full", "offload": "none", **_PLAIN}
    smallest = case.recipe.parallel.model_copy(update=update)
    least, more = holds(smallest), case.workers
    while more < MANY and not _would_fit(case, smallest, more):
        more *= 2
    remedy = "Take a GPU with more memory."
    if more < MANY:
        enough = bisect.bisect_left(range(more), True, lo=more // 2, key=lambda workers: _would_fit(case, smallest, workers))
        remedy = f"About {enough} of them would do under ZeRO-3 with full activation checkpointing, or fewer with more memory."
    return (
        f"{case.recipe.name} does not fit on {case.workers} x {case.cluster.label}: {gb(needed.total)} GB are needed of "
        f"{gb(case.cluster.memory)} GB as the recipe is written, and {gb(least.total)} GB with zero_stage 3, micro_batch 1 and full "
        f"activation checkpointing. {remedy}"
    )


def _would_fit(case: Case, parallel: ParallelConfig, workers: int) -> bool:
    elsewhere = replace(case, cluster=replace(case.cluster, nodes=workers, per_node=1), bounded=False)
    return fits_on(elsewhere, memory_function(elsewhere)(parallel.model_copy(update={"workers": workers})))
