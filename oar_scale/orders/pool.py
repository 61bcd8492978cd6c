"""The orders of a whole training set: the extraction in a pool of actors, a token shard at a time.

    TOKENS/00000.tar  ->  ORDERS/00000.parquet, then ORDERS/ledger/00000.tar.json

An actor loads the model once. What it writes for a shard depends on the shard, the model and the settings alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.schema import TextConfig
from oar_scale.data.manifest import Manifest, read_manifest
from oar_scale.data.shard_pool import Facts, PoolReport, Worker, run_pool
from oar_scale.data.shards import read_token_shard
from oar_scale.errors import UserError
from oar_scale.model import check_prompts, load_model, model_id
from oar_scale.orders.extraction import ExtractionSettings, Orders, extract_orders
from oar_scale.orders.table import OrderTable, table_name, write_orders
from oar_scale.storage import join
from oar_scale.tokenizers.prompts import check_features, load_prompts, model_inputs


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
    cache_bytes: int | None = None
    """Bound of the copies; None = no bound."""

    def make_worker(self) -> Worker:
        return ExtractionWorker(self)

    @property
    def settings_id(self) -> str:
        """Settings, precision and batch: everything but the model and the shard that can change a byte of a table."""
        return fingerprint({"settings": self.settings.id, "precision": self.precision, "batch": self.batch})


class ExtractionWorker:
    """Extracts one shard after the other with one model."""

    def __init__(self, job: ExtractionJob) -> None:
        torch.set_num_threads(job.cpu_threads)
        self.job, self.model_id = job, model_id(job.model)
        self.device = torch.device("cuda" if job.cuda else "cpu")
        self.model = load_model(job.model).to(self.device, torch.bfloat16 if job.precision == "bf16" else torch.float32)
        self.prompts = load_prompts(job.text, job.tokenizers)
        check_prompts(self.model.spec, self.prompts, job.model)
        self.manifest = read_manifest(job.tokens)
        check_features(self.manifest.features, self.prompts, job.tokens)
        self.shards = {shard.name: shard for shard in self.manifest.shards}

    def run(self, shard: str) -> Facts:
        uri = join(self.job.tokens, shard)
        tokens = read_token_shard(uri, self.job.cache_dir, self.shards[shard], cache_bytes=self.job.cache_bytes)
        codes_SN = torch.from_numpy(tokens.view(0).astype(np.int64))
        told_S = self.prompts.encode(tokens.prompts(self.prompts.field))
        images_S = np.array([zlib.crc32(key.encode()) for key in tokens.keys], dtype=np.int64)
        parts = [
            self._extract(codes_SN[part], told_S[part], images_S[part], uri)
            for part in (slice(start, start + self.job.batch) for start in range(0, len(codes_SN), self.job.batch))
        ]
        table = OrderTable(
            keys=tokens.keys,
            views=[0] * len(tokens.keys),
            order_SN=torch.cat([part.order_BN for part in parts]).cpu().numpy().astype(np.uint16),
            score_SN=torch.cat([part.score_BN for part in parts]).cpu().numpy(),
            model_id=self.model_id,
            settings_id=self.job.settings_id,
        )
        write_orders(join(self.job.orders, table_name(shard)), table)
        return {
            "images": len(tokens.keys),
            "tokens_crc32c": self.shards[shard].crc32c,
            "model_id": self.model_id,
            "settings_id": self.job.settings_id,
        }

    @torch.no_grad()
    def _extract(self, codes_BN: torch.Tensor, told_B: torch.Tensor, images_B: NDArray[np.int64], uri: str) -> Orders:
        condition_BTD = self.model.condition(model_inputs(self.prompts, told_B.to(self.device)))
        try:
            return extract_orders(self.model, codes_BN.to(self.device), condition_BTD, self.job.settings, images_B)
        except ValueError as error:
            raise UserError(f"{uri}: {error}") from error


def extract_all(
    job: ExtractionJob,
    *,
    actors: int,
    gpus_per_actor: float = 0,
    max_retries: int = 3,
    on_progress: Callable[[int, int], None] | None = None,
) -> PoolReport:
    """Extract the orders of every shard of ``job.tokens`` that is not done yet.

    Args:
        on_progress: called with (images done, images in all), at the start and after every shard.

    Returns:
        The pool's report; the caller decides what a poison shard means (:meth:`PoolReport.raise_for_poison`).

    Raises:
        UserError: the model's grid or vocabulary is not the token shards', or the ledger is of another model or settings.
    """
    manifest = read_manifest(job.tokens)
    _check_fit(job, manifest)
    done, shards = 0, {shard.name: shard for shard in manifest.shards}
    this = {"model_id": model_id(job.model), "settings_id": job.settings_id}

    def finished(shard: str, facts: Facts) -> None:
        nonlocal done
        for name, expected in (this | {"tokens_crc32c": shards[shard].crc32c}).items():
            if facts[name] != expected:
                raise UserError(
                    f"{job.orders}: the orders of {shard} were extracted with {name} {facts[name]}, now it is {expected}.\n"
                    "Orders of different models, settings or tokens must not mix: remove this folder, or extract into another."
                )
        done += shards[shard].samples
        if on_progress:
            on_progress(done, manifest.samples)

    if on_progress:
        on_progress(0, manifest.samples)
    return run_pool(
        job.make_worker,
        list(shards),
        join(job.orders, "ledger"),
        actors=actors,
        gpus_per_actor=gpus_per_actor,
        cpu_threads=job.cpu_threads,
        max_retries=max_retries,
        on_progress=finished,
    )


def _check_fit(job: ExtractionJob, manifest: Manifest) -> None:
    spec = load_model(job.model).spec
    for name, here, there in (("grid", spec.grid, manifest.grid), ("vocabulary", spec.vocab_size, manifest.vocab_size)):
        if here != there:
            raise UserError(f"{job.model}: made for {name} {here}, the token shards in {job.tokens} have {name} {there}.")
