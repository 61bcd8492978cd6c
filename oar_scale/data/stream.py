"""Shards as training batches.

The plan says which samples a step takes; this module opens their shards (verified, cached on local disk, a bounded number of them
open at a time) and adds every random choice about a sample as a hash of (seed, epoch, uid): its view, its order, whether its prompt
is dropped. So a batch is a function of (settings, step) alone, and resuming is starting at a step.

    for batch in TokenStream(...).batches(start_step=80, end_step=100): ...

A sample that cannot be used is replaced by another one, the same on every rank and in every attempt, and named in the batch. Loader
processes take whole steps in turn: each one is the same function of the step, so their number changes nothing either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from oar_scale.data.hashing import device_permutations, integers, uniform
from oar_scale.data.open_shard import UnusableSample
from oar_scale.data.sample_plan import Ids, MixturePlan, SamplePlan, Slots, StreamPlan, step_slots
from oar_scale.data.shard_source import OpenShards, ShardRow, ShardSource
from oar_scale.errors import UserError
from oar_scale.storage import FetchStats
from oar_scale.tokenizers.prompts import PromptEncoder, check_features

LOOK_AHEAD_STEPS = 8
"""A shard that a step so far ahead needs is fetched while others are in use."""
SUBSTITUTES = 16
"""Samples tried in the place of one that cannot be used."""
BAD_FROM = 64
"""Samples seen before the share of bad ones can stop the stream."""


@dataclass(frozen=True)
class ReplacedSample:
    """A sample that could not be used, and was replaced."""

    uid: int
    fault: str
    """Names shard and key, and what is wrong."""


class _Choice(NamedTuple):
    """A sample that a slot shows, and how."""

    uid: int
    folder: int
    shard: int
    row: int
    view: int
    stored_order: bool
    draw: float
    """From 0 to 1: which one, where several are stored."""


@dataclass(frozen=True)
class Batch:
    """A rank's share of one step, b samples."""

    step: int
    uid_b: Tensor
    codes_bN: Tensor
    prompts_b: Tensor
    """Encoded prompts, a row for each sample: ids [b, T], labels [b, 1] or features [b, T, F]."""
    drop_b: Tensor
    """Samples whose prompt is dropped (bool)."""
    seed: int
    epoch_b: Tensor
    fixed_b: Tensor
    """Samples in a given order (bool); the others get a random one."""
    fixed_bN: Tensor
    """The given orders; any numbers where there is none."""
    bad: tuple[ReplacedSample, ...] = ()
    """Samples that were replaced."""
    fetched: FetchStats = field(default_factory=FetchStats)
    """What was fetched for this batch and the ones it looked ahead to."""

    def orders(self, device: torch.device | str = "cpu") -> Tensor:
        """The order of each sample [b, N]. Random ones are made on ``device``, and are the same on all."""
        random_bN = device_permutations("order", self.codes_bN.shape[1], self.seed, self.epoch_b.to(device), self.uid_b.to(device))
        return torch.where(self.fixed_b.to(device)[:, None], self.fixed_bN.to(device), random_bN)


@dataclass(frozen=True)
class StreamSettings:
    """What fixes the batches, besides the shards."""

    seed: int
    global_batch: int
    streams: int
    window_shards: int
    caption_dropout: float
    order: tuple[int, ...] | None = None
    """One order for all samples outside the random share, whatever their view."""
    random_share: float = 1.0
    """Share of samples that take any view, in a random order. The rest follow ``order``; without one they take one of the first
    ``stored_views`` in its stored order, or without stored orders (the control) the same view, in a random order, so that the orders
    are all that differs."""
    stored_views: int = 1
    """Views that have stored orders, from the first one on."""
    max_bad_fraction: float = 0.01
    """More bad samples than this share of those seen stop the stream."""


class TokenStream:
    """The batches of one rank, from one folder of shards or a mixture of several."""

    def __init__(
        self,
        sources: ShardSource | Sequence[ShardSource],
        prompts: PromptEncoder,
        settings: StreamSettings,
        rank: int = 0,
        world: int = 1,
        loader_processes: int = 0,
    ) -> None:
        """Raises UserError for sources that do not fit together, or hold too few samples."""
        self.sources = [sources] if isinstance(sources, ShardSource) else list(sources)
        self.prompts, self.settings = prompts, settings
        self.rank, self.world, self.loader_processes = rank, world, loader_processes
        for source in self.sources:
            check_features(source.manifest.features, prompts, source.folder)
        grids = {source.grid for source in self.sources}
        if len(grids) != 1:
            raise UserError(f"{', '.join(s.folder for s in self.sources)}: code grids {sorted(grids)}; a mixture needs one")
        self.cells = grids.pop() ** 2
        self.plans = [_plan(source, settings) for source in self.sources]
        self.plan: StreamPlan = MixturePlan(self.plans, [s.weight for s in self.sources]) if len(self.plans) > 1 else self.plans[0]
        self.first_uid = np.concatenate([[0], np.cumsum([plan.samples for plan in self.plans])])
        # A rank reads streams/world segments at once, each inside one window; two shards more for the edges.
        room = settings.streams // world * settings.window_shards + 2
        self.shards = [OpenShards(source, prompts.field, room) for source in self.sources]
        self.limits = [source.vocabulary for source in self.sources]
        self._counted: dict[str, int] = {}

    def __reduce__(self) -> tuple[type[TokenStream], tuple[object, ...]]:
        """What a loader process gets: how to make this stream, not what it has open."""
        return TokenStream, (self.sources, self.prompts, self.settings, self.rank, self.world, self.loader_processes)

    def batches(self, start_step: int, end_step: int) -> Generator[Batch, None, None]:
        """The batches of steps ``start_step`` to ``end_step - 1``; the next ones are made while the last is in use.

        Raises:
            UserError: too many bad samples; names some.
        """
        seen, bad = 0, list[ReplacedSample]()
        for batch in self._made_ahead(start_step, end_step):
            seen, bad = seen + len(batch.uid_b), [*bad, *batch.bad]
            if len(bad) > self.settings.max_bad_fraction * max(seen, BAD_FROM):
                named = "\n".join(f"  {sample.fault}" for sample in bad[:5])
                raise UserError(
                    f"step {batch.step}: {len(bad)} of {seen} samples could not be used, more than data.max_bad_fraction = "
                    f"{self.settings.max_bad_fraction:g} allows:\n{named}\nMend the shards (oar data verify), or raise the limit."
                )
            yield batch

    def batch(self, step: int) -> Batch:
        """This rank's samples of a step: a function of the settings and ``step`` alone."""
        settings = self.settings
        self._look_ahead(step + LOOK_AHEAD_STEPS)
        slots = step_slots(self.plan, step, settings.global_batch, self.rank, self.world)
        bad: list[ReplacedSample] = []
        rows, codes_bN = self._samples(slots, bad)
        fixed_b, fixed_bN = self._fixed(rows, slots)
        return Batch(
            step=step,
            uid_b=torch.from_numpy(slots.uid),
            codes_bN=torch.from_numpy(codes_bN.astype(np.int64)),
            prompts_b=self.prompts.encode([row.prompt for row in rows]),
            drop_b=torch.from_numpy(uniform("caption", settings.seed, slots.epoch, slots.uid) < settings.caption_dropout),
            seed=settings.seed,
            epoch_b=torch.from_numpy(slots.epoch),
            fixed_b=fixed_b,
            fixed_bN=fixed_bN,
            bad=tuple(bad),
            fetched=self._fetched(),
        )

    def _fixed(self, rows: list[ShardRow], slots: Slots) -> tuple[Tensor, Tensor]:
        """Which samples follow a given order, and the orders: what the settings name, or the rows'."""
        if self.settings.order is not None:
            order_N = torch.tensor(self.settings.order)
            return torch.from_numpy(~self._random(slots.epoch, slots.uid)), order_N.expand(len(rows), -1)
        nothing_N = np.arange(self.cells)
        orders = [nothing_N if row.order is None else row.order.astype(np.int64) for row in rows]
        return torch.tensor([row.order is not None for row in rows]), torch.from_numpy(np.stack(orders))

    def _random(self, epoch_b: Ids, uid_b: Ids) -> NDArray[np.bool_]:
        """Which slots belong to the random share."""
        return uniform("order kind", self.settings.seed, epoch_b, uid_b) < self.settings.random_share

    def _samples(self, slots: Slots, bad: list[ReplacedSample]) -> tuple[list[ShardRow], NDArray[np.uint16]]:
        """The samples of some slots, and their codes [b, N]; bad ones are replaced and added to ``bad``."""
        wanted = self._choices(slots.epoch, slots.uid, slots.uid)
        rows: list[ShardRow | None] = []
        for choice in wanted:
            try:
                rows.append(
                    self.shards[choice.folder].row(choice.shard, choice.row, choice.view, choice.draw if choice.stored_order else None)
                )
            except UnusableSample as fault:
                bad.append(ReplacedSample(choice.uid, str(fault)))
                rows.append(None)
        codes_bN = self._stack([row.codes if row else bytes(2 * self.cells) for row in rows])
        for at in np.flatnonzero(codes_bN.max(1) >= np.array([self.limits[choice.folder] for choice in wanted])).tolist():
            bad.append(ReplacedSample(wanted[at].uid, self.shards[wanted[at].folder].outside_vocabulary(wanted[at].shard, wanted[at].row)))
            rows[at] = None
        for at in [at for at, row in enumerate(rows) if row is None]:
            rows[at] = self._substitute(slots.epoch[at : at + 1], slots.uid[at : at + 1], bad)
            codes_bN[at] = self._stack([rows[at].codes])[0]  # type: ignore[union-attr]
        return [row for row in rows if row is not None], codes_bN

    def _choices(self, epoch_b: Ids, uid_b: Ids, wanted_b: Ids) -> list[_Choice]:
        """Which sample and view the slots of ``uid_b`` take, when they are to show the samples ``wanted_b``."""
        seed = self.settings.seed
        random_b = self._random(epoch_b, uid_b)
        folder_b = np.searchsorted(self.first_uid, wanted_b, side="right") - 1
        shard_b, row_b, view_b = (np.zeros_like(wanted_b) for _ in range(3))
        for number, (source, plan) in enumerate(zip(self.sources, self.plans, strict=True)):
            here = folder_b == number
            shard_b[here], row_b[here] = plan.shard_of(wanted_b[here] - self.first_uid[number])
            view_b[here] = integers("view", source.views, seed, epoch_b[here], uid_b[here])
            if self.settings.order is None:
                stored = here & ~random_b
                view_b[stored] = integers("view", min(self.settings.stored_views, source.views), seed, epoch_b[stored], uid_b[stored])
        draw_b = uniform("stored order", seed, epoch_b, uid_b)
        columns = (wanted_b, folder_b, shard_b, row_b, view_b, ~random_b, draw_b)
        return [_Choice(*choice) for choice in zip(*(column.tolist() for column in columns), strict=True)]

    def _substitute(self, epoch_1: Ids, uid_1: Ids, bad: list[ReplacedSample]) -> ShardRow:
        """The first sample that can be used in the place of one that cannot."""
        for attempt in range(SUBSTITUTES):
            other_1 = integers("substitute", int(self.first_uid[-1]), self.settings.seed, epoch_1, uid_1, attempt)
            (choice,) = self._choices(epoch_1, uid_1, other_1)
            shards = self.shards[choice.folder]
            try:
                row = shards.row(choice.shard, choice.row, choice.view, choice.draw if choice.stored_order else None)
            except UnusableSample as fault:
                bad.append(ReplacedSample(choice.uid, str(fault)))
                continue
            if self._stack([row.codes]).max() < self.limits[choice.folder]:
                return row
            bad.append(ReplacedSample(choice.uid, shards.outside_vocabulary(choice.shard, choice.row)))
        raise UserError(f"{SUBSTITUTES} samples in a row could not be used; the last: {bad[-1].fault}")

    def _stack(self, codes: list[bytes]) -> NDArray[np.uint16]:
        return np.frombuffer(bytearray().join(codes), dtype="<u2").reshape(-1, self.cells)

    def _look_ahead(self, step: int) -> None:
        """Begin to fetch the shards of a later step."""
        slots = step_slots(self.plan, step, self.settings.global_batch, self.rank, self.world)
        folder = np.searchsorted(self.first_uid, slots.uid, side="right") - 1
        for number, plan in enumerate(self.plans):
            shards, _ = plan.shard_of(slots.uid[folder == number] - self.first_uid[number])
            for shard in np.unique(shards).tolist():
                self.shards[number].prefetch(shard)

    def _fetched(self) -> FetchStats:
        """What the caches did since the last batch."""
        now = {
            name: sum(getattr(cache.stats, name) for cache in {id(source.cache): source.cache for source in self.sources}.values())
            for name in (each.name for each in dataclasses.fields(FetchStats))
        }
        since, self._counted = self._counted, now
        return FetchStats(**{name: number - since.get(name, 0) for name, number in now.items()})

    def _made_ahead(self, start_step: int, end_step: int) -> Iterator[Batch]:
        if self.loader_processes:
            yield from DataLoader(
                _Steps(self, start_step, end_step),
                batch_size=None,
                num_workers=min(self.loader_processes, max(1, end_step - start_step)),
                multiprocessing_context="spawn",  # a fork would copy locked clients and the threads of torch.distributed
            )
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self.batch, start_step) if start_step < end_step else None
            for step in range(start_step, end_step):
                assert coming is not None
                batch = coming.result()
                coming = ahead.submit(self.batch, step + 1) if step + 1 < end_step else None
                yield batch


class _Steps(IterableDataset[Batch]):
    """Whole steps, dealt out to the loader's processes in turn, in which order the loader also collects them."""

    def __init__(self, stream: TokenStream, start_step: int, end_step: int) -> None:
        self.stream, self.start_step, self.end_step = stream, start_step, end_step

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for step in range(self.start_step + first, self.end_step, stride):
            yield self.stream.batch(step)


def _plan(source: ShardSource, settings: StreamSettings) -> SamplePlan:
    if source.manifest.samples < settings.streams:
        raise UserError(
            f"{source.folder}: {source.manifest.samples} samples are fewer than data.canonical_streams = {settings.streams}. "
            "Lower it, or add images."
        )
    return SamplePlan([shard.samples for shard in source.manifest.shards], settings.seed, settings.streams, settings.window_shards)
