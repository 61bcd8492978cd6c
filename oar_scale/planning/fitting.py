"""Does it fit, and if not as the recipe says, how does it?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from oar_scale.config.schema import ParallelConfig, Recipe
from oar_scale.errors import UserError
from oar_scale.model.spec import ModelSpec
from oar_scale.planning import activations
from oar_scale.planning.activations import Checkpointing, Trunk
from oar_scale.planning.assumptions import Assumptions
from oar_scale.planning.cluster import Cluster
from oar_scale.planning.memory import Memory, memory, micro_batches, settings

MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Fit:
    """The settings that are planned with."""

    parallel: ParallelConfig
    memory: Memory
    fits: bool
    """The recipe's own settings fit, but for a micro-batch that has to divide the batch among other workers."""
    said: str
    """One line about it."""


@dataclass(frozen=True)
class Row:
    """One ZeRO stage and offload at the planned micro-batch."""

    zero_stage: int
    offload: str
    planned: bool
    memory: Memory
    totals: dict[str, int]
    """With each kind of activation checkpointing."""
    largest: dict[str, int]
    """The largest micro-batch that fits and divides the batch, with each; 0: none."""


def choose(
    recipe: Recipe,
    spec: ModelSpec,
    found: Cluster,
    workers: int,
    assumed: Assumptions,
    traced: tuple[ParallelConfig, Trunk] | None = None,
) -> Fit:
    """The recipe's settings if they fit; else the nearest that do: a smaller micro-batch, then activation checkpointing, another ZeRO stage, offload.

    Args:
        traced: a trunk that was traced, and the settings it was traced with.

    Raises:
        UserError: nothing fits on such GPUs; says what would.
    """
    sizes = micro_batches(recipe, workers)
    written = recipe.parallel.model_copy(update={"workers": workers})
    divides = written.micro_batch in sizes
    if not divides:
        largest = next((size for size in sizes if size <= written.micro_batch), sizes[0])
        written = written.model_copy(update={"micro_batch": largest})
    held = _holds(recipe, spec, workers, assumed, traced)
    needed = held(written)
    if needed.total <= found.memory:
        said = f"fits: {gb(needed.total)} of {gb(found.memory)} GB"
        if not divides:
            said += f" with parallel.micro_batch {written.micro_batch}: {recipe.parallel.micro_batch} x {workers} workers does not divide the batch"
        return Fit(written, needed, True, said)
    for candidate, words in _nearest(written, sizes):
        if (holds := held(candidate)).total <= found.memory:
            return Fit(
                candidate,
                holds,
                False,
                f"does not fit as written ({gb(needed.total)} of {gb(found.memory)} GB with micro_batch {written.micro_batch}, "
                f"zero_stage {written.zero_stage}); planned with {words}: {gb(holds.total)} GB",
            )
    raise UserError(_nothing_fits(recipe, spec, found, workers, needed, held))


def memory_table(
    recipe: Recipe, spec: ModelSpec, parallel: ParallelConfig, found: Cluster, workers: int, assumed: Assumptions
) -> list[Row]:
    """Memory at the planned micro-batch, and the largest micro-batch, for each ZeRO stage, offload and kind of activation checkpointing."""
    sizes, held = micro_batches(recipe, workers), _holds(recipe, spec, workers, assumed, None)

    def with_mode(setting: ParallelConfig, mode: str, size: int) -> Memory:
        return held(setting.model_copy(update={"activation_checkpointing": mode, "micro_batch": size}))

    return [
        Row(
            zero_stage=setting.zero_stage,
            offload=setting.offload,
            planned=(setting.zero_stage, setting.offload) == (parallel.zero_stage, parallel.offload),
            memory=held(setting),
            totals={mode: with_mode(setting, mode, setting.micro_batch).total for mode in MODES},
            largest={mode: next((size for size in sizes if with_mode(setting, mode, size).total <= found.memory), 0) for mode in MODES},
        )
        for setting in settings(parallel)
    ]


def gb(size: float) -> str:
    return f"{size / 1e9:,.1f}"


def accumulation(recipe: Recipe, parallel: ParallelConfig, workers: int) -> int:
    """Micro-batches of the stage that takes most."""
    return max(recipe.pretrain.global_batch, recipe.finetune.global_batch) // (parallel.micro_batch * workers)


def average(recipe: Recipe) -> bool:
    return recipe.pretrain.ema_decay is not None or recipe.finetune.ema_decay is not None


def _holds(
    recipe: Recipe, spec: ModelSpec, workers: int, assumed: Assumptions, traced: tuple[ParallelConfig, Trunk] | None
) -> Callable[[ParallelConfig], Memory]:
    """Memory of any settings; where a trace is at hand, activations by formula in proportion to it."""

    def holds(parallel: ParallelConfig) -> Memory:
        trunk = None
        if traced is not None and traced[0].activation_checkpointing == parallel.activation_checkpointing:
            mode = parallel.activation_checkpointing
            there, here = (activations.trunk(spec, p.micro_batch, parallel.precision, mode) for p in (traced[0], parallel))
            trunk = Trunk(*(value * ours // by_formula for value, ours, by_formula in zip(traced[1], here, there, strict=True)))
        return memory(
            spec,
            parallel,
            workers=workers,
            accumulation=accumulation(recipe, parallel, workers),
            average=average(recipe),
            assumed=assumed,
            trunk=trunk,
        )

    return holds


def _nearest(written: ParallelConfig, sizes: list[int]) -> Iterator[tuple[ParallelConfig, str]]:
    """Other settings, the least change first, and what they are called."""
    plain = {"hpz_workers": 1, "quantized_weights": False, "quantized_gradients": False}
    changes: list[dict[str, object]] = [{}]
    modes = MODES[MODES.index(written.activation_checkpointing) + 1 :]
    changes += [{"activation_checkpointing": mode} for mode in modes]
    if written.zero_stage < 3:
        changes += [{"zero_stage": 3}, *({"zero_stage": 3, "activation_checkpointing": mode} for mode in modes)]
    elif written.hpz_workers > 1:
        changes.append(plain)
    last = {"zero_stage": 3, **plain, "activation_checkpointing": "full"}
    changes += [{**last, "offload": "optimizer"}, {**last, "offload": "optimizer_and_parameters"}]
    smaller = [size for size in sizes if size <= written.micro_batch]
    # A micro-batch of less than a quarter is too small a step for matrix products: first see what else there is.
    for bound in (4, written.micro_batch):
        for change in changes:
            for size in (size for size in smaller if size * bound >= written.micro_batch):
                whole = {**change, "micro_batch": size}
                words = ", ".join(
                    f"{key} {value}" for key, value in whole.items() if value != getattr(written, key) or key == "micro_batch"
                )
                yield written.model_copy(update=whole), words


def _nothing_fits(
    recipe: Recipe, spec: ModelSpec, found: Cluster, workers: int, needed: Memory, held: Callable[[ParallelConfig], Memory]
) -> str:
    smallest = recipe.parallel.model_copy(
        update={
            "workers": workers,
            "micro_batch": 1,
            "zero_stage": 3,
            "activation_checkpointing": "full",
            "hpz_workers": 1,
            "offload": "none",
        }
    )
    least = held(smallest)
    sharded = least.states + least.step
    fixed = replace(least, parameters=0, gradients=0, optimizer=0, average=0, step=0).total
    remedy = "Take a GPU with more memory."
    if fixed < found.memory:
        enough = -(-sharded * workers // int(found.memory - fixed))
        remedy = f"About {enough} of them would do under ZeRO-3 with full activation checkpointing, or fewer with more memory."
    return (
        f"{recipe.name} does not fit on {workers} x {found.label}: {gb(needed.total)} GB are needed of {gb(found.memory)} GB, and at the very least "
        f"{gb(least.total)} GB with zero_stage 3, micro_batch 1 and full activation checkpointing. {remedy}"
    )
