"""Sections of a recipe about training: the model, how it is shared out among workers, the two trainings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from oar_scale.config.locations import Location
from oar_scale.config.section import Added, Changeable, Count, Limit, Operational, PolicyName, RecipeConflict, Section, bounds

Layout = Literal["raster", "instructed", "dual", "decoupled", "grouped"]
GROUPED_EPS = 1e-6
"""``norm_eps`` of a grouped model, where a recipe sets none: that of the published weights."""


class ModelConfig(Section):
    """The any-order transformer (docs/model.md). Vocabulary, grid and text sizes follow from the tokenizers."""

    layout: Layout = "instructed"
    """``raster`` is plain next-token; ``instructed`` (RandAR), ``dual`` (OAR v1), ``decoupled`` (ARPG) and ``grouped`` (LPD) place cells in
    any order. ``decoupled`` has half of the layers for the codes, half for the questions: an even number of them. ``grouped`` has
    LayerNorm, GELU and learned positions."""
    dim: int = Field(256, ge=8)
    layers: int = Field(6, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    """Heads of keys and values, a divisor of ``heads`` (grouped-query attention). Default: ``heads``."""
    ffn_multiple_of: int = Field(256, ge=1)
    """The SwiGLU width is ``int(8 dim / 3)`` rounded up to a multiple of this. (Layout ``grouped`` has no SwiGLU, but ``4 dim``.)"""
    norm_eps: float = Field(1e-5, gt=0)
    """Default in layout ``grouped``: 1e-6."""
    rope_base: float = Field(10000.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    """On image-code embeddings, attention outputs and feed-forward outputs."""
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of captions replaced by the trainable null condition, for guidance."""
    text_encoder_layers: int = Field(1, ge=0)
    weights: Location | None = None
    """A trained any-order model (safetensors) to continue from."""

    @property
    def ffn_hidden(self) -> int:
        """Width of the feed-forward."""
        if self.layout == "grouped":
            return 4 * self.dim
        return -(-int(8 * self.dim / 3) // self.ffn_multiple_of) * self.ffn_multiple_of

    @model_validator(mode="before")
    @classmethod
    def _default_of_the_layout(cls, given: object) -> object:
        if isinstance(given, dict) and given.get("layout") == "grouped":
            return {"norm_eps": GROUPED_EPS, **given}
        return given

    @model_validator(mode="after")
    def _head_dim(self) -> ModelConfig:
        if self.layout == "grouped":
            if self.dim % self.heads:
                raise ValueError(f"dim {self.dim} / heads {self.heads} must be a whole number; e.g. dim 256 with heads 4")
        elif self.dim % self.heads or (self.dim // self.heads) % 4:
            raise ValueError(
                f"dim {self.dim} / heads {self.heads} must be a whole number and a multiple of 4 "
                "(the rotation takes pairs for rows and pairs for columns); e.g. dim 256 with heads 4"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        return self

    @model_validator(mode="after")
    def _halves(self) -> ModelConfig:
        if self.layout == "decoupled" and self.layers % 2:
            raise RecipeConflict(
                "model.layers",
                f"layout decoupled has half of its layers for the codes and half for the questions; {self.layers} is odd.\n"
                f"Nearest that fit: {' or '.join(str(n) for n in (self.layers - 1, self.layers + 1) if n)}.",
            )
        return self


class ParallelConfig(Section):
    """How training is spread over workers, and what it may use of each machine."""

    workers: Count = 2
    """Processes that train, or ``{min, max}``: with fewer of them after a node is lost, with more when it is back. The global batch and
    the samples of a step stay the same."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed ZeRO shares out among the workers: nothing, the optimizer's state, gradients too, parameters too."""
    hpz_workers: int = Field(1, ge=1)
    """ZeRO-3, ZeRO++ hpZ: workers of a node that hold the parameters once more between them; 1: off."""
    quantized_weights: bool = False
    """ZeRO-3, ZeRO++ qwZ: parameters travel as 8-bit numbers."""
    quantized_gradients: bool = False
    """ZeRO-3, ZeRO++ qgZ: gradients travel as 4-bit numbers."""
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = "none"
    """What lies in the memory of the CPU instead of the GPU."""
    micro_batch: int = Field(24, ge=1)
    """Images a worker takes through the model at once."""
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_dtype: Changeable[Literal["bf16", "fp32"]] = "bf16"
    """Where precision is bf16: what a worker adds the gradients of its micro-batches up in. fp32 needs ZeRO 2 or 3, and 2 bytes more for
    each parameter that the worker keeps the gradient of."""
    cpu_threads: int = Field(1, ge=1)
    """Threads a worker computes with when it has no GPU."""
    gpus_per_worker: int = Field(0, ge=0)
    """1, or 0 to compute on the CPU: a worker has one GPU."""
    gpu_type: str | None = None
    """On Ray: only GPUs of this type, by Ray's name of it, e.g. H100; for the actors of extraction, too. Default: any."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """On Ray: workers on few nodes or on many; strictly on one, or each on a node of its own."""
    compile: bool = False
    """Compile each block with torch.compile, a minute or more at the start. For GPUs: on a CPU it is no faster."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing, all but matrix products and attention, or whole blocks."""
    max_failures: int = Field(3, ge=0)
    """Restarts of the worker group before the stage gives up; a restart that got further than the one before is not counted."""
    hang_timeout_s: float = Field(1800, gt=0)
    """A worker that makes no step for so long writes down its stacks and ends; all start again from the last checkpoint. An actor of
    a pool is replaced after so long, and the patience with the storage, without its model or without progress in its shard."""
    grace_s: float = Field(120, gt=0)
    """Time to save and leave after SIGTERM or SIGUSR1."""

    @property
    def min_workers(self) -> int:
        """The number of workers that training goes down to."""
        return bounds(self.workers)[0]

    @property
    def max_workers(self) -> int:
        """The number of workers that training starts with where the cluster has the capacity."""
        return bounds(self.workers)[1]

    @property
    def sums_in_fp32(self) -> bool:
        """Whether gradients are added up in float32, beside weights in bf16."""
        return self.precision == "bf16" and self.gradient_dtype == "fp32"

    @property
    def compiles_blocks(self) -> bool:
        """Whether blocks are compiled as a whole, which ZeRO-3's hooks prevent."""
        return self.compile and self.zero_stage < 3

    @property
    def slow_compilation(self) -> str | None:
        """Why ``compile`` gains little beside the other settings, and what to do; None where there is nothing to say.

        The counts of graphs are those of tests/distributed/test_compiled_graphs.py.
        """
        if not self.compile:
            return None
        if not self.gpus_per_worker:
            return "parallel.compile on a CPU costs a minute or more, and the blocks are no faster: leave it out."
        remedy = "Set zero_stage to the lowest that fits (oar plan), or leave compile out."
        if self.zero_stage == 3 and self.activation_checkpointing == "selective":
            return f"parallel.compile under ZeRO-3 with selective checkpointing compiles nothing: every block runs eagerly. {remedy}"
        if self.zero_stage == 3:
            return f"parallel.compile under ZeRO-3 compiles blocks in pieces only, between the hooks that gather weights. {remedy}"
        return None

    @model_validator(mode="after")
    def _fits_together(self) -> ParallelConfig:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise RecipeConflict(
                "parallel.zero_stage", "ZeRO 0 keeps no float32 weights beside those in bf16.\nUse zero_stage 1 or more, or precision fp32."
            )
        if self.gpus_per_worker > 1:
            raise RecipeConflict(
                "parallel.gpus_per_worker", "a worker computes on one GPU.\nSet workers to the number of GPUs, and gpus_per_worker to 1."
            )
        if self.sums_in_fp32 and self.zero_stage == 1:
            raise RecipeConflict(
                "parallel.gradient_dtype", "ZeRO 1 adds gradients up in bf16.\nUse zero_stage 2 or 3, or leave gradient_dtype out."
            )
        for name in ("quantized_weights", "quantized_gradients"):
            if getattr(self, name) and (self.zero_stage < 3 or not self.gpus_per_worker):
                raise RecipeConflict(
                    f"parallel.{name}", f"{name} is a part of ZeRO-3 on GPUs.\nSet zero_stage 3 and gpus_per_worker, or leave it out."
                )
        if self.hpz_workers > 1 and self.zero_stage < 3:
            raise RecipeConflict("parallel.hpz_workers", "hpz_workers is a part of ZeRO-3.\nSet zero_stage 3, or hpz_workers 1.")
        if self.offload == "optimizer_and_parameters" and self.zero_stage < 3:
            raise RecipeConflict("parallel.offload", "only ZeRO-3 can offload parameters.\nSet zero_stage 3, or offload: optimizer.")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise RecipeConflict("parallel.offload", "ZeRO 0 offloads nothing.\nSet zero_stage 1, 2 or 3, or offload: none.")
        return self


class MixConfig(Section):
    """Another folder of shards to train on."""

    shards: Location
    """A folder or ``s3://bucket/prefix`` with a manifest.json (``oar data index`` makes one): token shards of the same tokenizer, or
    image shards, which are tokenized on the fly."""
    weight: float = Field(1.0, gt=0)
    """Its share of the samples, in proportion to 1 for the run's own images."""


class TrainingConfig(Section):
    """One training: its length, its optimizer, its orders, its checkpoints."""

    steps: Changeable[int] = Field(100, ge=0)
    """0, for pretraining only: ``model.weights`` are the any-order model as they are, and orders are extracted from them at once."""
    global_batch: int = Field(48, ge=1)
    lr: Changeable[float] = Field(1e-3, gt=0)
    warmup_steps: Changeable[int] = Field(20, ge=0)
    schedule: Changeable[Literal["cosine", "constant", "linear", "linear_tail"]] = "cosine"
    """How the rate falls after the warm-up; ``linear_tail`` is constant, then linear over the last ``tail_fraction`` of the steps."""
    tail_fraction: Changeable[float] = Field(0.2, gt=0, le=1)
    final_lr_fraction: Changeable[float] = Field(0.05, ge=0, le=1)
    weight_decay: Changeable[float] = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: Changeable[float] = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep a moving average of the weights, which then is what the stage leaves; at the start it follows them faster. Default: off."""
    order: PolicyName | None = None
    """An order policy (docs/order-policies.md) for the samples outside the random share. Default: ``random``, in fine-tuning ``stored``;
    a raster model has its raster order only. The control of a fine-tuning takes random orders, whatever is set here."""
    random_share: float = Field(1.0, ge=0, le=1)
    """Share of the samples trained in a fresh random order; the rest follow ``order``."""
    group_steps: Added[tuple[PositiveInt, ...]] = ()
    """Layout ``grouped``: numbers of steps, of which each optimizer step takes one by chance. Its images are asked for in so many groups of
    cells, as they are drawn with ``sample.steps``; LPD took 256, 128, 64, 32, 24, 20, 16, 12 and 8. Default: one cell after the other."""
    mix: tuple[MixConfig, ...] = ()
    """Other folders that samples are drawn from, besides the run's own."""
    log_every: Operational[int] = Field(5, ge=1)
    evaluate_every: Operational[int] = Field(50, ge=1)
    evaluate_orders: Operational[tuple[Literal["random", "raster", "stored"], ...]] = ("random",)
    """Orders of the held-out likelihood, beside ``random`` ones, which are always measured; ``stored`` (fine-tuning) are those the
    any-order model prefers, extracted at the start."""
    sample_every: Operational[int] = Field(0, ge=0)
    """Steps between grids of drawn held-out captions; 0: none."""
    checkpoint_every: Operational[int] = Field(50, ge=1)
    keep_checkpoints: Operational[int] = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    keep_every: Operational[int] = Field(0, ge=0)
    """Steps whose multiples are kept, too; 0: none."""
    keep_best: Operational[int] = Field(0, ge=0)
    """Checkpoints with the best held-out likelihood that are kept, too."""
    max_non_finite: Limit[int] = Field(20, ge=0)
    """Batches without a finite gradient that are skipped before the stage stops; counted anew when other settings than limits change."""
    spike_guard: Limit[Literal["off", "warn", "rollback"]] = "warn"
    """A loss far above the last ones: say so, or go back to the last good checkpoint and leave out the batches since."""
    spike_sigmas: Limit[float] = Field(8.0, gt=0)
    """What is far, in robust standard deviations of the last 100 losses."""


class FinetuneConfig(TrainingConfig):
    """A class of its own, so that its default holds for recipes that set some other field of the section, too."""

    steps: Changeable[int] = Field(100, ge=1)
    random_share: float = Field(0.1, ge=0, le=1)
    any_view_share: Added[float | None] = Field(None, ge=0, le=1)
    """Share of the samples that take any of the views; the rest take one that has orders. Default: ``random_share``, so that those that
    need a stored order have one; arms with another ``random_share`` than the recipe's keep its views by this."""
    orders_of: Added[Literal["own", "other_images"]] = "own"
    """Whose stored order an image follows: its own, or for comparison that of another image of its shard, drawn by the seed."""
    distinct_orders: Added[int | None] = Field(None, ge=1)
    """Only so many different stored orders: that many are drawn from those of the training set, and each image follows the nearest of
    them by Kendall's distance (docs/arms.md). Default: as many as there are."""
