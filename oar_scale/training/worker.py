"""What a training worker runs: the same function under Ray Train, torchrun, and the tests' own launcher.

    weights -> engine -> last committed checkpoint -> steps -> checkpoint -> exported model

The environment gives the rank (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), the job everything else.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from oar_scale.config.deepspeed import deepspeed_config
from oar_scale.config.schema import MixConfig
from oar_scale.data.hashing import hash_words, permutations
from oar_scale.data.manifest import Manifest, read_manifest
from oar_scale.data.open_shard import OpenShard
from oar_scale.data.shard_source import ShardSource
from oar_scale.data.shards import read_token_shard
from oar_scale.data.stream import BadSample, Batch, StreamSettings, TokenStream
from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel, check_prompts, load_model, model_id, save_model
from oar_scale.model.acceleration import accelerate
from oar_scale.observe.events import EventLog
from oar_scale.orders.table import join_orders, read_orders, table_name
from oar_scale.storage import join
from oar_scale.storage.shard_cache import ShardCache
from oar_scale.tokenizers.prompts import PromptEncoder, check_features, load_prompts, model_inputs
from oar_scale.tokenizers.vq import load_vq
from oar_scale.training.checkpoints import discard_rejected, latest_checkpoint, load_checkpoint, save_checkpoint
from oar_scale.training.job import TrainingJob
from oar_scale.training.schedule import learning_rate

HELDOUT_IMAGES = 256


class Objective(nn.Module):
    """The training loss as a module: mean negative log-likelihood of a micro-batch, in nats per code."""

    def __init__(self, model: AnyOrderModel, prompts: PromptEncoder) -> None:
        super().__init__()
        self.model, self.prompts = model, prompts

    def forward(self, codes_bN: Tensor, order_bN: Tensor, prompts_b: Tensor, drop_b: Tensor) -> Tensor:
        condition_bTD = self.model.condition(model_inputs(self.prompts, prompts_b), drop_b)
        return self.model.loss(codes_bN, order_bN, condition_bTD)[0]


def train(job: TrainingJob) -> None:
    """Run a stage to its last step, from the newest committed checkpoint if there is one. Collective."""
    device = _start_process(job)
    rank, world = dist.get_rank(), dist.get_world_size()
    with EventLog(join(job.local, "events"), job.stage) if rank == 0 else nullcontext() as log:
        _train(job, device, rank, world, log)


def _train(job: TrainingJob, device: torch.device, rank: int, world: int, log: EventLog | None) -> None:
    training, started = job.training, time.monotonic()
    model = load_model(job.start_from)
    prompts = _prompts(job)
    check_prompts(model.spec, prompts, job.start_from)
    accelerate(model, job.recipe.parallel)
    engine = make_engine(job, Objective(model, prompts), world)
    stream, heldout = _stream(job, prompts, rank, world), Heldout(job, prompts, rank, world, device)
    start_step = _resume(engine, job, log)
    if log:
        parameters = sum(p.numel() for p in model.parameters())
        log.emit("start", steps=training.steps, start_step=start_step, parameters=parameters, world_size=world, pid=os.getpid())

    evaluate = _Evaluation(engine, heldout, log)
    if start_step == 0:
        evaluate(0)
    meter = _Meter(log, training.global_batch)
    for batch in stream.batches(start_step, training.steps):
        meter.waited()
        lr = learning_rate(training, batch.step)
        # Dropout is all that draws from the generator; seeded by step, it too is the same after a restart.
        torch.manual_seed(int(hash_words("dropout", job.recipe.seed, batch.step, rank)) >> 1)
        loss = train_step(engine, batch, lr, job.recipe.parallel.micro_batch, device)
        step = batch.step + 1
        saving = step % training.checkpoint_every == 0 or step == training.steps
        meter.done(batch, loss, lr, engine, flush=saving or step % training.log_every == 0)
        if step % training.evaluate_every == 0 or step == training.steps:
            evaluate(step)
        if saving:
            saved = save_checkpoint(engine, job, step)
            if log:
                log.emit("checkpoint", step=step, seconds=saved.seconds, bytes=saved.bytes)
        meter.resume()
    if rank == 0:
        save_model(job.result, engine.module.model.to("cpu"), half=job.recipe.parallel.precision == "bf16")
    dist.barrier()
    if log:
        log.emit("end", seconds=time.monotonic() - started)


def make_engine(job: TrainingJob, objective: Objective, world: int) -> Any:
    """The DeepSpeed engine around the objective; matrices decay, vectors and embeddings do not."""
    import deepspeed

    config = deepspeed_config(job.recipe.parallel, job.training, world)
    decaying = {id(m.weight) for m in objective.modules() if isinstance(m, nn.Linear)}
    trained = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in decaying], "weight_decay": job.training.weight_decay},
        {"params": [p for p in trained if id(p) not in decaying], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(model=objective, model_parameters=groups, config=config)
    return engine


def train_step(engine: Any, batch: Batch, lr: float, micro_batch: int, device: torch.device) -> Tensor:
    """One optimiser step over this rank's share of the global batch; returns its mean loss.

    Raises:
        UserError: the loss is not finite; names the step and the samples.
    """
    engine.train()
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    losses, order_bN = [], batch.orders(device)
    for start in range(0, len(batch.codes_bN), micro_batch):
        part = slice(start, start + micro_batch)
        loss = engine(*(t[part].to(device) for t in (batch.codes_bN, order_bN, batch.prompts_b, batch.drop_b)))
        if not torch.isfinite(loss):
            raise UserError(
                f"step {batch.step}: the loss is {float(loss)} for samples {batch.uid_b[part].tolist()}. "
                "Lower the learning rate, or continue from an earlier checkpoint."
            )
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().float())
    norm = engine.get_global_grad_norm()  # the same on every rank
    if norm is not None and not math.isfinite(float(norm)):
        raise UserError(
            f"step {batch.step}: the gradient's norm is {float(norm)}; rank {dist.get_rank()} had samples {batch.uid_b.tolist()}. "
            "Lower the learning rate; the last checkpoint is from before."
        )
    return torch.stack(losses).mean()


class Heldout:
    """Held-out negative log-likelihood under fixed random orders (a raster model's one order), each rank its share."""

    def __init__(self, job: TrainingJob, prompts: PromptEncoder, rank: int, world: int, device: torch.device) -> None:
        folder = join(job.root, "tokens", "heldout")
        manifest = read_manifest(folder)
        check_features(manifest.features, prompts, folder)
        shards = [read_token_shard(join(folder, shard.name), _cache(job), shard) for shard in manifest.shards]
        codes = torch.cat([torch.from_numpy(shard.view(0).astype("int64")) for shard in shards])[:HELDOUT_IMAGES]
        told = prompts.encode([prompt for shard in shards for prompt in shard.prompts(prompts.field)][:HELDOUT_IMAGES])
        order = torch.from_numpy(permutations("heldout order", codes.shape[1], torch.arange(len(codes)).numpy()))
        if job.recipe.model.layout == "raster":
            order = torch.arange(codes.shape[1]).expand_as(order)
        self.prompts = prompts
        self.codes, self.order, self.told = (t[rank::world].to(device) for t in (codes, order, told))

    @torch.no_grad()
    def nll(self, model: AnyOrderModel, batch: int = 64) -> Tensor:
        """Mean nats per code over all ranks' images. Collective."""
        model.eval()
        total = self.codes.new_zeros(2, dtype=torch.float64)
        for start in range(0, len(self.codes), batch):
            part = slice(start, start + batch)
            condition_bTD = model.condition(model_inputs(self.prompts, self.told[part]))
            nll_bN = model.nll(self.codes[part], self.order[part], condition_bTD)
            total += torch.stack([nll_bN.double().sum(), torch.tensor(float(nll_bN.numel()), device=total.device)])
        dist.all_reduce(total)
        return total[0] / total[1]


class _Evaluation:
    """Evaluates and logs; collective."""

    def __init__(self, engine: Any, heldout: Heldout, log: EventLog | None) -> None:
        self.engine, self.heldout, self.log = engine, heldout, log

    def __call__(self, step: int) -> None:
        nll = self.heldout.nll(self.engine.module.model)
        if self.log:
            self.log.emit("heldout", step=step, nll_random=float(nll))


class _Meter:
    """Turns steps into ``train`` events: loss over all ranks, rate, and how long the data was waited for.

    A window of steps ends at each checkpoint too, so that a resumed run logs the same means as an undisturbed one.
    """

    def __init__(self, log: EventLog | None, global_batch: int) -> None:
        self.log, self.global_batch = log, global_batch
        self.losses: list[Tensor] = []
        self.bad: list[BadSample] = []
        self.retries = 0
        self.wait = self.busy = 0.0
        self.mark = time.monotonic()

    def waited(self) -> None:
        now = time.monotonic()
        self.wait, self.mark = self.wait + now - self.mark, now

    def done(self, batch: Batch, loss: Tensor, lr: float, engine: Any, *, flush: bool) -> None:
        """After the step; collective where ``flush`` ends the window."""
        self.losses.append(loss)
        self.bad += batch.bad
        self.retries += batch.fetched.retries
        now = time.monotonic()
        self.busy, self.mark = self.busy + now - self.mark, now
        if not flush:
            return
        totals = torch.stack([torch.stack(self.losses).mean().double(), *torch.tensor([len(self.bad), self.retries]).to(loss.device)])
        dist.all_reduce(totals)
        loss_sum, bad, retries = totals.tolist()
        if bad:
            self._name_bad_samples(batch.step + 1)
        if self.log:
            self.log.emit(
                "train",
                step=batch.step + 1,
                loss=loss_sum / dist.get_world_size(),
                lr=lr,
                grad_norm=float(engine.get_global_grad_norm()),
                images_per_s=len(self.losses) * self.global_batch / (self.busy + self.wait),
                data_wait_s=self.wait / len(self.losses),
                bad_samples=int(bad),
                storage_retries=int(retries),
            )
        self.losses, self.bad, self.retries, self.wait, self.busy = [], [], 0, 0.0, 0.0

    def _name_bad_samples(self, step: int) -> None:
        """Log which samples any rank had to replace. Collective."""
        named: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(named, [(sample.uid, sample.fault) for sample in self.bad])
        if self.log:
            for uid, fault in (sample for part in named for sample in part):
                self.log.emit("bad_sample", step=step, uid=uid, fault=fault)

    def resume(self) -> None:
        """Evaluation and checkpoints are not training time."""
        self.mark = time.monotonic()


def _resume(engine: Any, job: TrainingJob, log: EventLog | None) -> int:
    """Load the newest usable checkpoint; rank 0 chooses, so that all ranks take the same one. Returns its step."""
    choice: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            choice[0] = latest_checkpoint(job)
        except UserError as error:
            choice[0] = error
    dist.broadcast_object_list(choice)
    found = choice[0]
    if isinstance(found, UserError):
        raise found
    if found is None:
        return 0
    if log:
        discard_rejected(found)
        for rejected in found.rejected:
            log.emit("rejected_checkpoint", uri=rejected.uri, fault=rejected.fault)
    load_checkpoint(engine, job, found)
    return int(found.step)


def _stream(job: TrainingJob, prompts: PromptEncoder, rank: int, world: int) -> TokenStream:
    recipe, training = job.recipe, job.training
    folder = join(job.root, "tokens", "train")
    settings = StreamSettings(
        seed=recipe.seed,
        global_batch=training.global_batch,
        streams=recipe.data.canonical_streams,
        window_shards=recipe.data.shuffle_window_shards,
        caption_dropout=recipe.model.caption_dropout,
        raster=recipe.model.layout == "raster",
        random_share=training.random_share,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )
    manifest, stored = read_manifest(folder), None
    if job.stage == "finetune":
        stored = _StoredOrders(join(job.root, "orders", "train"), folder, manifest.grid or 0, model_id(job.start_from))
    cache = ShardCache(_cache(job), recipe.storage.cache_bytes)
    sources = [ShardSource(folder, manifest, cache, stored_orders=stored)]
    sources += [_mixed_in(job, mix, manifest, cache) for mix in training.mix]
    return TokenStream(sources, prompts, settings, rank, world, recipe.data.loader_processes)


def _mixed_in(job: TrainingJob, mix: MixConfig, own: Manifest, cache: ShardCache) -> ShardSource:
    manifest = read_manifest(mix.shards)
    if manifest.grid is None:  # pictures
        vq = load_vq(join(job.root, "tokenizers", "vq.safetensors"))
        return ShardSource(mix.shards, manifest, cache, mix.weight, tokenizer=vq, image_views=job.recipe.tokenizer.views)
    if manifest.tokenizer_id != own.tokenizer_id:
        raise UserError(
            f"{mix.shards}: its codes are of the tokenizer {manifest.tokenizer_id}, the run's own are of {own.tokenizer_id}. "
            "Tokenise its images with the run's tokenizer (oar data tokenize)."
        )
    return ShardSource(mix.shards, manifest, cache, mix.weight)


@dataclass(frozen=True)
class _StoredOrders:
    """The orders of a token shard's samples, from the table of the same stem."""

    orders: str
    tokens: str
    grid: int
    model_id: str

    def __call__(self, shard: str, samples: OpenShard) -> NDArray[np.uint16]:
        table = read_orders(join(self.orders, table_name(shard)))
        return join_orders(samples.keys, table, shard=join(self.tokens, shard), cells=self.grid**2, model_id=self.model_id)


def _prompts(job: TrainingJob) -> PromptEncoder:
    return load_prompts(job.recipe.tokenizer.text, join(job.root, "tokenizers"))


def _cache(job: TrainingJob) -> str:
    return job.recipe.storage.cache_dir or join(job.local, "cache")


def _start_process(job: TrainingJob) -> torch.device:
    """Threads, accelerator and process group of this worker."""
    if job.recipe.parallel.gpus_per_worker > 0:
        if not torch.cuda.is_available():
            raise UserError("parallel.gpus_per_worker is above 0, and this worker sees no CUDA GPU. Set it to 0 to train on the CPU.")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(job.recipe.parallel.cpu_threads)
        device = torch.device("cpu")
    import deepspeed

    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce at first use: a minute, and a C++ compiler. Gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
    return device
