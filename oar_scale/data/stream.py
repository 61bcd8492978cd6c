"""The data stream: from a folder of shards to the training batches of one rank.

    manifest.json --> sample plan --> uids of a step --> open shards --> samples --> Batch (tensors, on the CPU)
                                       |                   ^               |
                                       |                   |               +-- broken ones replaced
                                       +-- random choices  +-- shard cache on the local disk <-- S3 or local folder

A batch is a pure function of (settings, shards, step). With global batch B and C = ``data.canonical_streams``, slot i of step t is the
slot g = t B + i of the run and holds sample g div C of stream g mod C; rank r of W takes the slots i = r, r + W, r + 2 W, ...
:mod:`oar_scale.data.sample_plan` defines the streams and explains why this makes batches independent of W. This module does the rest:

*Random choices.* Every random choice about a sample is a hash of (seed, epoch, uid, purpose), not a draw from a generator
(:mod:`oar_scale.data.hashing`): its view ("view"), whether it follows a stored order or a random one ("order kind"), which of
several stored orders ("stored order"), the random order itself ("order"), whether its prompt is dropped ("caption"). Any rank,
loader process or restart computes the same values, so nothing has to be saved. Random orders are made where they are needed, on
the training device (:meth:`Batch.orders`).

*Reading.* Shards are read whole, checked by crc32c and cached (:mod:`oar_scale.storage.shard_cache`); a bounded number of them is open,
and single samples are decoded when a batch takes them (:mod:`oar_scale.data.shard_source`). The shards of step t + 8 are fetched in the
background while step t is made, and the batch of the next step is made while the last one is in use: by a thread, or by
``loader_processes`` processes, of which process p of P makes the steps p, p + P, ... As each batch depends on its step alone, their
number changes nothing.

*Broken samples.* A sample that cannot be used (a missing or doubled member, codes of another shape or outside the vocabulary, a label
that the model does not have, a shard that is missing or damaged) is replaced: attempt k = 0, 1, ... draws another uid by a hash of (seed,
epoch, uid, k), and the first sample that can be used is taken. The slot keeps its own random choices, so the replacement is the same on
every rank and in every attempt. Each replaced sample is listed in :attr:`Batch.bad`; past ``data.max_bad_fraction`` of the
samples that the run has seen, the stream stops with an error that names some. A storage that does not answer is no fault of a sample: it
ends the stream with ``Unreachable``, and one that refuses with another ``UserError``.

*Resuming* is ``batches(start_step=t, end_step=...)``. A step costs no more in the middle of an epoch than at its beginning.

    for batch in TokenStream(source, prompts, settings, rank, world).batches(start_step=80, end_step=100): ...

Shapes are in the names: b samples of this rank, N cells, T prompt tokens, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from oar_scale.data.batch import Batch, ReplacedSample
from oar_scale.data.hashing import integers, uniform
from oar_scale.data.open_shard import UnusableSample
from oar_scale.data.sample_plan import Cut, FolderPlan, Ids, Slots, StreamPlan, step_slots, stream_plan
from oar_scale.data.shard_source import OpenShards, ShardRow, ShardSource
from oar_scale.errors import UserError
from oar_scale.storage import FetchStats
from oar_scale.tokenizers.prompts import PromptEncoder, check_features

__all__ = ["Batch", "StreamSettings", "TokenStream"]

LOOK_AHEAD_STEPS = 8
"""The shards of the step so far ahead are fetched in the background."""
SUBSTITUTES = 16
"""Replacements tried for a sample that cannot be used, before the stream stops."""
BAD_FROM = 64
"""The share of bad samples is taken of at least so many samples, so that a few early faults do not stop the stream."""


class _Choice(NamedTuple):
    """The choice for a slot: a sample, its view and its order."""

    uid: int
    folder: int
    shard: int
    row: int
    view: int
    stored_order: bool
    """Whether it follows a stored order, where its shard has any."""
    draw: float
    """From 0 to 1: which of the stored orders of the view it follows."""


@dataclass(frozen=True)
class StreamSettings:
    """All that determines the batches, besides the shards themselves."""

    seed: int
    global_batch: int
    """B."""
    streams: int
    """C (``data.canonical_streams``)."""
    window_shards: int
    """Whole shards of a shuffle window (``data.shuffle_window_shards``)."""
    caption_dropout: float
    """Share of samples whose prompt is dropped, for classifier-free guidance."""
    order: tuple[int, ...] | None = None
    """One order for all samples outside the random share, whatever their view."""
    random_share: float = 1.0
    """Share of samples that take any view, in a random order. The rest follow ``order`` if there is one; else they take one of the
    ``stored_views`` in the order stored for it. Where nothing is stored (the control) they take the same view in a random order,
    so that two stages differ in their orders only."""
    any_view_share: float | None = None
    """Share of samples that take any view; default: ``random_share``. Of two stages with different shares of random orders, both see the
    same views with one of this."""
    stored_views: tuple[int, ...] = (0,)
    """The views that have stored orders, by their numbers, ascending."""
    max_bad_fraction: float = 0.01
    """More bad samples than this share of those seen stop the stream."""
    earlier: tuple[Cut, ...] = ()
    """How the samples were cut into streams before, where that was changed in the middle of the run; oldest first."""
    first_batch: int = 0
    """The batch from which on they are cut into ``streams``."""

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The earlier cuts and the present one."""
        return (*self.earlier, Cut(self.first_batch, self.streams, self.window_shards))


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
        self.plans, self.plan = _plan(self.sources, settings)
        self.first_uid = np.concatenate([[0], np.cumsum([plan.samples for plan in self.plans])])
        # A rank reads streams / world segments at a time, each inside one window; two shards more for windows that a segment shares.
        max_open = settings.streams // world * max(cut.window_shards for cut in settings.cuts) + 2
        self.shards = [OpenShards(source, prompts.field, max_open) for source in self.sources]
        self.limits = [source.vocabulary for source in self.sources]
        self._counted: dict[str, int] = {}

    def __reduce__(self) -> tuple[type[TokenStream], tuple[object, ...]]:
        """A loader process gets the arguments and opens its own shards: open files and clients are not copied."""
        return TokenStream, (self.sources, self.prompts, self.settings, self.rank, self.world, self.loader_processes)

    def batches(self, start_step: int, end_step: int) -> Generator[Batch, None, None]:
        """The batches of steps ``start_step`` to ``end_step - 1``; the next ones are prepared while the last one is in use.

        Raises:
            UserError: more bad samples than ``max_bad_fraction`` allows; names some of them.
        """
        # Of all that the run has seen: a stream that was resumed just before a bad sample would else stop at it, each time anew, where one
        # that was not interrupted goes on. The bad ones of earlier attempts are not known.
        limit, bad = self.settings.max_bad_fraction, list[ReplacedSample]()
        for batch in self._prefetched(start_step, end_step):
            seen, bad = (batch.step + 1) * len(batch.uid_b), [*bad, *batch.bad]
            if len(bad) > max(limit * max(seen, BAD_FROM), 1 if limit else 0):  # one alone is no share
                named = "\n".join(f"  {sample.fault}" for sample in bad[:5])
                raise UserError(
                    f"step {batch.step}: {len(bad)} of {seen} samples could not be used, more than data.max_bad_fraction = "
                    f"{limit:g} allows:\n{named}\n"
                    "Fix the shards (oar data verify), or raise the limit (-o data.max_bad_fraction=...), and run the same command again: "
                    "it resumes from the last checkpoint."
                )
            yield batch

    def batch(self, step: int) -> Batch:
        """This rank's samples of one step. The result depends on settings, shards and ``step`` alone, not on earlier calls."""
        settings = self.settings
        self._look_ahead(step + LOOK_AHEAD_STEPS)
        slots = self._slots(step)
        bad: list[ReplacedSample] = []
        rows, codes_bN = self._read_samples(slots, bad)
        fixed_b, fixed_bN = self._fixed(rows, slots)
        return Batch(
            step=step,
            uid_b=torch.from_numpy(slots.uid),
            codes_bN=torch.from_numpy(codes_bN.astype(np.int64)),
            encoded_prompts_b=self.prompts.encode([row.prompt for row in rows]),
            drop_b=torch.from_numpy(uniform("caption", settings.seed, slots.epoch, slots.uid) < settings.caption_dropout),
            seed=settings.seed,
            epoch_b=torch.from_numpy(slots.epoch),
            fixed_b=fixed_b,
            fixed_bN=fixed_bN,
            bad=tuple(bad),
            fetched=self._fetched(),
        )

    def _fixed(self, rows: list[ShardRow], slots: Slots) -> tuple[Tensor, Tensor]:
        """Which samples follow a given order, and those orders [b, N]: the one of the settings, or the stored ones of the rows."""
        if self.settings.order is not None:
            order_N = torch.tensor(self.settings.order)
            return torch.from_numpy(~self._in_random_share(slots.epoch, slots.uid)), order_N.expand(len(rows), -1)
        unused_N = np.arange(self.cells)
        orders = [unused_N if row.order is None else row.order.astype(np.int64) for row in rows]
        return torch.tensor([row.order is not None for row in rows]), torch.from_numpy(np.stack(orders))

    def _in_random_share(self, epoch_b: Ids, uid_b: Ids) -> NDArray[np.bool_]:
        """Which samples belong to the share that takes random orders."""
        return self._order_kind(epoch_b, uid_b) < self.settings.random_share

    def _order_kind(self, epoch_b: Ids, uid_b: Ids) -> NDArray[np.float64]:
        return uniform("order kind", self.settings.seed, epoch_b, uid_b)

    def _read_samples(self, slots: Slots, bad: list[ReplacedSample]) -> tuple[list[ShardRow], NDArray[np.uint16]]:
        """The samples of some slots and their codes [b, N]; what cannot be used is replaced and added to ``bad``.

        The codes of the whole batch are checked against the vocabulary at once: a comparison a sample would cost more than reading it.
        """
        wanted = self._choices(slots.epoch, slots.uid, slots.uid)
        rows: list[ShardRow | None] = []
        for choice in wanted:
            try:
                rows.append(self._read(choice))
            except UnusableSample as fault:
                bad.append(ReplacedSample(choice.uid, str(fault)))
                rows.append(None)
        codes_bN = self._stack([row.codes if row else bytes(2 * self.cells) for row in rows])
        limits_b = np.array([self.limits[choice.folder] for choice in wanted])
        for at in np.flatnonzero(codes_bN.max(1) >= limits_b).tolist():
            bad.append(self._outside_vocabulary(wanted[at]))
            rows[at] = None
        usable: list[ShardRow] = []
        for at, row in enumerate(rows):
            if row is None:
                row = self._substitute(slots.epoch[at : at + 1], slots.uid[at : at + 1], bad)
                codes_bN[at] = self._stack([row.codes])[0]
            usable.append(row)
        return usable, codes_bN

    def _read(self, choice: _Choice) -> ShardRow:
        """Read one sample. Raises UnusableSample."""
        draw = choice.draw if choice.stored_order else None
        row = self.shards[choice.folder].row(choice.shard, choice.row, choice.view, draw)
        try:
            self.prompts.check(row.prompt)
        except UserError as error:
            raise self.shards[choice.folder].fault(choice.shard, choice.row, f"cannot be used: {error}") from error
        return row

    def _outside_vocabulary(self, choice: _Choice) -> ReplacedSample:
        shards = self.shards[choice.folder]
        last = shards.source.vocabulary - 1
        fault = shards.fault(choice.shard, choice.row, f"has codes above {last}, the last one of the vocabulary")
        return ReplacedSample(choice.uid, str(fault))

    def _choices(self, epoch_b: Ids, uid_b: Ids, wanted_b: Ids) -> list[_Choice]:
        """The choices for the slots of ``uid_b`` with the samples ``wanted_b``, or with replacements of those that cannot be used.

        Shard and row are those of the wanted sample; all random choices are hashes of the slot's own uid, so that a replacement changes
        nothing about the choices of its slot.
        """
        seed = self.settings.seed
        random_b, any_view = self._in_random_share(epoch_b, uid_b), self.settings.any_view_share
        any_view_b = random_b if any_view is None else self._order_kind(epoch_b, uid_b) < any_view
        folder_b = np.searchsorted(self.first_uid, wanted_b, side="right") - 1
        shard_b, row_b, view_b = (np.zeros_like(wanted_b) for _ in range(3))
        for number, (source, plan) in enumerate(zip(self.sources, self.plans, strict=True)):
            here = folder_b == number
            shard_b[here], row_b[here] = plan.shard_of(wanted_b[here] - self.first_uid[number])
            view_b[here] = integers("view", source.views, seed, epoch_b[here], uid_b[here])
            if self.settings.order is None:
                stored = here & ~any_view_b  # these take a view that has an order: the same hash, over fewer views
                of_source = np.array([view for view in self.settings.stored_views if view < source.views])
                view_b[stored] = of_source[integers("view", len(of_source), seed, epoch_b[stored], uid_b[stored])]
        draw_b = uniform("stored order", seed, epoch_b, uid_b)
        columns = (wanted_b, folder_b, shard_b, row_b, view_b, ~random_b, draw_b)
        return [_Choice(*choice) for choice in zip(*(column.tolist() for column in columns), strict=True)]

    def _substitute(self, epoch_1: Ids, uid_1: Ids, bad: list[ReplacedSample]) -> ShardRow:
        """The replacement of one sample that cannot be used: the first usable one of a fixed sequence of uids, by hash.

        Raises:
            UserError: none of ``SUBSTITUTES`` can be used.
        """
        for attempt in range(SUBSTITUTES):
            other_1 = integers("substitute", int(self.first_uid[-1]), self.settings.seed, epoch_1, uid_1, attempt)
            (choice,) = self._choices(epoch_1, uid_1, other_1)
            try:
                row = self._read(choice)
            except UnusableSample as fault:
                bad.append(ReplacedSample(choice.uid, str(fault)))
                continue
            if self._stack([row.codes]).max() < self.limits[choice.folder]:
                return row
            bad.append(self._outside_vocabulary(choice))
        raise UserError(f"{SUBSTITUTES} samples in a row could not be used; the last: {bad[-1].fault}")

    def _stack(self, codes: list[bytes]) -> NDArray[np.uint16]:
        """Codes [b, N] of samples' bytes: joined and viewed as one array, which is writable because a bytearray is."""
        return np.frombuffer(bytearray().join(codes), dtype="<u2").reshape(-1, self.cells)

    def _slots(self, step: int) -> Slots:
        """This rank's slots of a batch."""
        return step_slots(self.plan, step - self.settings.first_batch, self.settings.global_batch, self.rank, self.world)

    def _look_ahead(self, step: int) -> None:
        """Start fetching the shards that a later step needs."""
        slots = self._slots(step)
        folder = np.searchsorted(self.first_uid, slots.uid, side="right") - 1
        for number, plan in enumerate(self.plans):
            shards, _ = plan.shard_of(slots.uid[folder == number] - self.first_uid[number])
            for shard in np.unique(shards).tolist():
                self.shards[number].prefetch(shard)

    def _fetched(self) -> FetchStats:
        """The reads of the shard caches since the last batch; a cache that several sources share counts once."""
        now = {
            name: sum(getattr(cache.stats, name) for cache in {id(source.cache): source.cache for source in self.sources}.values())
            for name in (each.name for each in dataclasses.fields(FetchStats))
        }
        since, self._counted = self._counted, now
        return FetchStats(**{name: number - since.get(name, 0) for name, number in now.items()})

    def _prefetched(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """The batches in order, one or more ahead of their use: by loader processes, or by a thread where there are none."""
        if self.loader_processes:
            for made in DataLoader(
                _Steps(self, start_step, end_step),
                batch_size=None,
                num_workers=min(self.loader_processes, max(1, end_step - start_step)),
                # A fork would copy locked clients and the threads of torch.distributed; a fork server's would outlive a killed rank.
                multiprocessing_context="spawn",
            ):
                if isinstance(made, UserError):
                    raise made
                yield made
            return
        with ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(self.batch, start_step) if start_step < end_step else None
            for step in range(start_step, end_step):
                assert following is not None
                batch = following.result()
                following = ahead.submit(self.batch, step + 1) if step + 1 < end_step else None
                yield batch


class _Steps(IterableDataset[Batch | UserError]):
    """Whole steps as the items of a DataLoader: worker p of P makes the steps p, p + P, ..., as the loader collects them.

    An error for the user is an item, too: one that is raised here would arrive with a traceback for a text.
    """

    def __init__(self, stream: TokenStream, start_step: int, end_step: int) -> None:
        self.stream, self.start_step, self.end_step = stream, start_step, end_step

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for step in range(self.start_step + first, self.end_step, stride):
            try:
                made: Batch | UserError = self.stream.batch(step)
            except UserError as error:
                made = error
            yield made


def _plan(sources: Sequence[ShardSource], settings: StreamSettings) -> tuple[list[FolderPlan], StreamPlan]:
    """The plans of the folders and of them all. Raises UserError where a folder has fewer samples than there are streams."""
    for source in sources:
        if source.manifest.samples < settings.streams:
            raise UserError(
                f"{source.folder}: {source.manifest.samples} samples are fewer than data.canonical_streams = {settings.streams}. "
                "Lower it, or add images."
            )
    folders = [[shard.samples for shard in source.manifest.shards] for source in sources]
    return stream_plan(folders, [source.weight for source in sources], settings.seed, settings.global_batch, settings.cuts)
