"""The orders of a whole training set: the extraction in a pool of actors, a token shard at a time.

    TOKENS/00000.tar  ->  ORDERS/00000.parquet, then ORDERS/ledger/00000.tar.json

What happens when something dies: see ``oar_scale/shard_pool``. An actor loads the model once; what it writes for
a shard depends on the shard, the model and the settings alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.schema import TextConfig
from oar_scale.data.hashing import image_numbers
from oar_scale.data.manifest import Manifest, read_manifest
from oar_scale.data.open_shard import TokenShard
from oar_scale.data.shards import read_token_shard
from oar_scale.errors import UserError
from oar_scale.model import check_prompts, load_model, model_id
from oar_scale.model.weights import read_spec
from oar_scale.orders.extraction import Orders, extract_orders
from oar_scale.orders.order_table import OrderTable, Stored, order_bytes, table_name
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.shard_pool import ArrayTask, Bounds, OnStep, PoolReport, ShardOutput, ShardResult, Timing, Worker, run_pool
from oar_scale.shard_pool.pool_run import lost_outputs
from oar_scale.shard_pool.pool_types import OnEvent
from oar_scale.storage import fetch, join
from oar_scale.storage.patience import patient
from oar_scale.tokenizers.prompts import check_features, conditioning_inputs, load_prompts


@dataclass(frozen=True)
class ExtractionJob:
    """Everything an actor needs to know: names and settings, no data."""

    tokens: str
    """Folder of token shards."""
    orders: str
    """Folder the tables go to."""
    model: str
    text: TextConfig
    """The recipe's ``tokenizer.text``."""
    tokenizers: str
    """Folder of the run's tokenizers."""
    cache_dir: str
    """Local copies of remote shards."""
    settings: ExtractionSettings
    batch: int
    """Images extracted at once."""
    precision: Literal["bf16", "fp32"]
    cpu_threads: int = 1
    cuda: bool = False
    views: int = 1
    """Orders are extracted for so many of the views in the shards, from the first one on."""
    cache_bytes: int | None = None
    """Bound of the copies; None = no bound."""
    array_index: int = 0
    """Which of several processes without Ray this is: see :class:`ArrayTask`."""

    def make_worker(self) -> Worker:
        """Load the model; called in the actor's process."""
        return ExtractionWorker(self)

    @property
    def settings_id(self) -> str:
        """Settings, precision, batch and views: everything in a recipe, but the model, that decides about orders.

        Where scores are nearly equal the device, its number of threads and torch's version may decide too; they are not in it.
        """
        not_default = {} if self.views == 1 else {"views": self.views}  # tables of the first view keep the id they always had
        return fingerprint({"settings": self.settings.id, "precision": self.precision, "batch": self.batch, **not_default})

    @property
    def device(self) -> torch.device:
        """Ray and Slurm leave an actor its own GPUs to see; processes that are started by hand see all, and take them round-robin."""
        return torch.device("cuda", self.array_index % max(1, torch.cuda.device_count())) if self.cuda else torch.device("cpu")

    @property
    def ledger(self) -> str:
        """Folder URI of the pool's ledger."""
        return join(self.orders, "ledger")


class ExtractionWorker:
    """Extracts one shard after the other with one model."""

    def __init__(self, job: ExtractionJob) -> None:
        torch.set_num_threads(job.cpu_threads)
        local = fetch(job.model, job.cache_dir)  # one download for all actors of a host
        self.job, self.model_id = job, model_id(local)
        self.device = job.device
        self.model = load_model(local).to(self.device, torch.bfloat16 if job.precision == "bf16" else torch.float32)
        self.prompts = load_prompts(job.text, job.tokenizers)
        check_prompts(self.model.spec, self.prompts, job.model)
        self.manifest = read_manifest(job.tokens)
        check_features(self.manifest.features, self.prompts, job.tokens)
        self.shards = {shard.name: shard for shard in self.manifest.shards}

    def run(self, shard: str, on_step: OnStep) -> ShardOutput:
        """Make the order table of a token shard; the result has its size and checksum, and what it was made from and with.

        Raises:
            UserError: the shard does not fit the model, or is damaged.
            ArithmeticError: the model's scores are no numbers; on another device they may be.
        """
        uri = join(self.job.tokens, shard)
        tokens = read_token_shard(uri, self.job.cache_dir, self.shards[shard], cache_bytes=self.job.cache_bytes)
        encoded_prompts_S = self.prompts.encode(tokens.prompts(self.prompts.field))
        kinds = [(view, draw) for view in range(self.job.views) for draw in range(self.job.settings.orders_per_image)]
        drawn = [self._orders(tokens, encoded_prompts_S, view, draw, uri, on_step) for view, draw in kinds]
        samples = len(tokens.keys)
        table = OrderTable(  # all rows of the first sample, then those of the second
            keys=[key for key in tokens.keys for _ in kinds],
            views=[view for view, _ in kinds] * samples,
            order_SN=torch.stack([orders.order_BN for orders in drawn], dim=1).flatten(0, 1).cpu().numpy().astype(np.uint16),
            score_SN=torch.stack([orders.score_BN for orders in drawn], dim=1).flatten(0, 1).cpu().numpy(),
            model_id=self.model_id,
            settings_id=self.job.settings_id,
            draws=[draw for _, draw in kinds] * samples,
        )
        data = order_bytes(table)
        stored = Stored.of(data)
        return ShardOutput(
            uri=join(self.job.orders, table_name(shard)),
            data=data,
            made_from={
                "images": samples,
                "tokens_crc32c": self.shards[shard].crc32c,
                "model_id": self.model_id,
                "settings_id": self.job.settings_id,
            },
            facts={"table_bytes": stored.size, "table_crc32c": stored.crc32c},
        )

    def _orders(self, tokens: TokenShard, encoded_prompts_S: torch.Tensor, view: int, draw: int, uri: str, on_step: OnStep) -> Orders:
        """One order for each sample of a shard, a batch at a time."""
        codes_SN = torch.from_numpy(tokens.view(view).astype(np.int64))
        names = tokens.keys if view == 0 else [f"{key}/{view}" for key in tokens.keys]
        images_S = image_numbers(names)
        cuts = [slice(start, start + self.job.batch) for start in range(0, len(codes_SN), self.job.batch)]
        orders = [self._extract(codes_SN[cut], encoded_prompts_S[cut], images_S[cut], draw, uri, on_step) for cut in cuts]
        return Orders(torch.cat([part.order_BN for part in orders]), torch.cat([part.score_BN for part in orders]))

    @torch.no_grad()
    def _extract(
        self, codes_BN: torch.Tensor, encoded_prompts_B: torch.Tensor, images_B: NDArray[np.int64], draw: int, uri: str, on_step: OnStep
    ) -> Orders:
        condition_BTD = self.model.condition(conditioning_inputs(self.prompts, encoded_prompts_B.to(self.device), self.model.dtype))
        try:
            return extract_orders(self.model, codes_BN.to(self.device), condition_BTD, self.job.settings, images_B, draw, on_step)
        except ValueError as error:
            raise UserError(f"{uri}: {error}") from error
        except ArithmeticError as error:
            raise ArithmeticError(f"{uri}: {error}") from error
        except torch.OutOfMemoryError as error:  # another GPU may be larger, or less used
            raise RuntimeError(
                f"{uri}: the GPU's memory is too small for extract.batch = {self.job.batch} images at once, or others use it: "
                f"set extract.batch lower. {error}"
            ) from error


def extract_all(
    job: ExtractionJob,
    *,
    actors: int | Bounds,
    gpus_per_actor: float = 0,
    gpu_type: str | None = None,
    max_retries: int = 3,
    array: ArrayTask | None = None,
    timing: Timing | None = None,
    on_progress: Callable[[int, PoolReport], None] | None = None,
    on_event: OnEvent | None = None,
) -> PoolReport:
    """Extract the orders of every shard of ``job.tokens`` that is not done yet, or whose table is gone or has another size.

    Args:
        array: be one of several processes without Ray; they share the shards through the ledger.
        on_progress: called with the images that are done and the report so far, at the start and after every shard.
        on_event: see :data:`oar_scale.shard_pool.pool_types.OnEvent`.

    Returns:
        The pool's report; the caller decides what a poison shard means (:meth:`PoolReport.raise_for_poison`).

    Raises:
        UserError: the model does not fit the token shards, or the ledger is of another model or settings; nothing was written.
        Requeue: stopped by a signal; the same call resumes.
    """
    timing = timing or Timing()
    with patient(timing.patience_s):
        manifest = read_manifest(job.tokens)
        _check_fit(job, manifest)
        config = {"model_id": model_id(fetch(job.model, job.cache_dir)), "settings_id": job.settings_id}
    done, shards = 0, {shard.name: shard for shard in manifest.shards}

    def check(shard: str, result: ShardResult) -> None:
        for name, expected in (config | {"tokens_crc32c": shards[shard].crc32c}).items():
            if result[name] != expected:
                raise UserError(
                    f"{job.orders}: the orders of {shard} were extracted with {name} {result[name]}, now it is {expected}.\n"
                    "Orders of different models, settings or tokens must not mix: remove this folder, or extract into another."
                )

    def lost(results: Mapping[str, ShardResult]) -> dict[str, str]:
        for shard, result in results.items():
            check(shard, result)
        written = {shard: (table_name(shard), result.get("table_bytes")) for shard, result in results.items()}  # older entries lack it
        return lost_outputs(job.orders, written, "table")

    def finished(shard: str, result: ShardResult, report: PoolReport) -> None:
        nonlocal done
        check(shard, result)
        done += shards[shard].samples
        if on_progress:
            on_progress(done, report)

    if on_progress:
        on_progress(0, PoolReport())
    return run_pool(
        (job if array is None else replace(job, array_index=array.index)).make_worker,
        list(shards),
        job.ledger,
        actors=actors,
        gpus_per_actor=gpus_per_actor,
        gpu_type=gpu_type,
        cpu_threads=job.cpu_threads,
        max_retries=max_retries,
        config=config,
        array=array,
        timing=timing,
        find_lost=lost,
        on_progress=finished,
        on_event=on_event,
    )


def _check_fit(job: ExtractionJob, manifest: Manifest) -> None:
    spec = read_spec(job.model)
    for name, here, there in (("grid", spec.grid, manifest.grid), ("vocabulary", spec.vocab_size, manifest.vocab_size)):
        if here != there:
            raise UserError(f"{job.model}: made for {name} {here}, the token shards in {job.tokens} have {name} {there}.")
    if job.views > max(1, len(manifest.views)):
        raise UserError(f"{job.tokens}: the shards hold {len(manifest.views)} views, and orders of {job.views} are wanted.")
