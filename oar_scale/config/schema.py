"""The recipe: every choice of a run, typed, with its unit and its default in one place.

A recipe is YAML; ``config.loading`` reads it. The classes here import neither torch nor ray, and no validator does I/O.
Cross-field rules live in the model that owns both fields; rules between sections in :class:`Recipe`.

Names follow the field: ``global_batch = micro_batch x workers x accumulation``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

Layout = Literal["raster", "instructed", "dual"]
Score = Literal["gt_logprob", "max_prob", "neg_entropy", "margin", "sampled"]
FirstCell = Literal["free", "random"] | Annotated[int, Field(ge=0)]
_RASTER_ONLY = "a raster model has its raster order only.\nLeave it out, or choose another model.layout."
OPERATIONAL = {
    "loader_processes",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "keep_best",
    "evaluate_orders",
    "sample_every",
    "actors",
    "gpus_per_actor",
    "max_retries",
    "prepare_threads",
}
"""Fields that say who does the work and how often it is logged or saved: they may change without changing the result."""
View = Annotated[str, Field(pattern=r"^(center|center_flip|jitter[1-9][0-9]?|crop1?[0-9]|tencrop|tencrop105)$")]
CROPS = {"tencrop": tuple(f"crop{k}" for k in range(10)), "tencrop105": tuple(f"crop{k}" for k in range(10, 20))}
"""Views that stand for several."""


PolicyName = Annotated[str, Field(pattern=r"^[a-z]+(-[a-z]+)*$")]
"""An order policy: a module of ``oar_scale.orders.policies``, which is asked for it when the stage begins."""


class Section(BaseModel):
    """Base of all recipe sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Range(Section):
    """As many as there is room for, between two bounds."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


def _count_kind(given: Any) -> str:
    return RANGE if isinstance(given, dict | Range) else NUMBER


NUMBER, RANGE = "a number", "a range"
Count = Annotated[Annotated[int, Field(ge=1), Tag(NUMBER)] | Annotated[Range, Tag(RANGE)], Discriminator(_count_kind)]
"""A number of processes, or ``{min, max}``."""


def _bounds(count: int | Range) -> tuple[int, int]:
    return (count, count) if isinstance(count, int) else (count.min, count.max)


class StorageConfig(Section):
    root: str | None = None
    """Where shards, orders and checkpoints live: a folder or ``s3://bucket/prefix``. Default: ``run_dir``."""
    cache_dir: str | None = None
    """Local copies of remote shards, shared by all processes of a host. Default: ``run_dir/cache``."""
    cache_gb: float | None = Field(None, gt=0)
    """Bound of that folder, 10^9 bytes; the shards used least recently go first. Default: no bound."""
    scratch_dir: str | None = None
    """Local disk that checkpoints are written to before they are uploaded. Default: ``run_dir/scratch``."""
    patience_s: float = Field(1200, ge=0)
    """How long a training waits for a storage that does not answer, before the attempt ends."""

    @property
    def cache_bytes(self) -> int | None:
        return None if self.cache_gb is None else int(self.cache_gb * 1e9)


class OpenMojiSource(Section):
    type: Literal["openmoji"] = "openmoji"
    limit: int | None = Field(None, ge=20)
    """Keep only so many images (picked by a hash of their name), for tests and trials."""


class FolderSource(Section):
    type: Literal["folder"]
    path: str
    """A folder of ``NAME.png|jpg|jpeg|webp`` with a caption in ``NAME.txt`` beside each; subfolders are read as well."""
    captions: str | None = None
    """The folder of the ``NAME.txt``, where they do not lie beside the images."""
    alternatives: bool = False
    """Each line of a ``NAME.txt`` is a caption: one is taken (a fixed choice of the name), all go to ``captions`` in ``KEY.json``."""


class TableSource(Section):
    """A CSV, TSV or Parquet file with a row for each image (docs/data-sources.md)."""

    type: Literal["table"]
    path: str
    root: str | None = None
    """What paths of images are relative to. Default: the folder of the table."""
    image: str = "image"
    """The column with the image's path, or a text with columns in braces: ``images/{id}.jpg``."""
    caption: str = "caption"
    """The column with the caption, or a text with columns in braces."""
    label: str | None = None
    """The column with the class label, a whole number."""
    name: str | None = None
    """The column that images are held out by: those of one name are all on the same side. Default: their path."""
    family: str | None = None
    """The column that variants of one picture share: held-out images with a variant in training are counted."""
    attribution: str = ""
    """Whom to name with the images; kept in the manifests and the report."""


class ClassFoldersSource(Section):
    """A folder of images for each class (ImageNet); the label is the folder's number in alphabetical order."""

    type: Literal["class_folders"]
    path: str
    names: str | None = None
    """A file with a line ``CLASS name`` for each class, or JSON. Default: the folder's own name."""
    caption: str = Field("a photo of a {name}", pattern=r"\{name\}")


class WebDatasetSource(Section):
    """Image shards that others wrote: a folder or ``s3://bucket/prefix`` of ``*.tar``."""

    type: Literal["webdataset"]
    url: str
    caption: str | None = None
    """The field of ``KEY.json`` with the caption. Default: ``KEY.txt``."""
    label: str = "label"
    """The field of ``KEY.json`` with the class label, where there is one."""


Source = Annotated[OpenMojiSource | FolderSource | TableSource | ClassFoldersSource | WebDatasetSource, Field(discriminator="type")]


class DataConfig(Section):
    source: Source = OpenMojiSource()
    image_size: int = Field(32, ge=8)
    heldout_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the names kept out of training; a name always falls on the same side."""
    samples_per_shard: int = Field(256, ge=1)
    prepare_threads: int = Field(4, ge=1)
    """Images read, decoded and resized at once by the stage ``data``."""
    on_bad_sample: Literal["skip", "fail"] = "skip"
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """More bad samples than this share stop the stage even under ``skip``."""
    canonical_streams: int = Field(8, ge=1)
    """C: the line of samples is cut into C segments; the number of workers must divide it (docs/stream.md)."""
    shuffle_window_shards: int = Field(8, ge=1)
    loader_processes: int = Field(0, ge=0)
    """Processes of each worker that make its batches; 0: a thread. They change no batch."""


class VQTrainingConfig(Section):
    steps: int = Field(2000, ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    commitment: float = Field(0.25, ge=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    revive_every: int = Field(100, ge=1)
    """Steps between replacements of codebook entries that no image used."""
    edge_weight: float = Field(0.1, ge=0)
    """Weight of the L1 loss on horizontal and vertical differences: keeps outlines sharp."""
    perceptual_weight: float = Field(0.0, ge=0)
    """Weight of the distance of EfficientNet-Lite0 features (extra ``eval``); 0: off."""
    adversarial_weight: float = Field(0.0, ge=0)
    """Weight of a patch discriminator's verdict, as a share of the gradient of the other image losses; 0: off."""
    adversarial_from_step: int = Field(0, ge=0)
    """The discriminator starts after so many steps, when reconstructions are worth judging."""


class ImageTokenizerConfig(Section):
    """A VQ autoencoder of the LlamaGen family; ``grid = image_size / 2**(len(multipliers) - 1)``."""

    weights: str | None = None
    """A trained tokenizer (safetensors). Without it the stage trains one."""
    channels: int = Field(32, ge=32, multiple_of=32)
    multipliers: tuple[int, ...] = (1, 2, 2)
    res_blocks: int = Field(1, ge=1)
    codebook_size: int = Field(512, ge=2, le=65536)
    codebook_dim: int = Field(8, ge=2)
    training: VQTrainingConfig = VQTrainingConfig()


class SentencePieceConfig(Section):
    """Captions as SentencePiece ids, and a small encoder of them that is trained along with the model."""

    type: Literal["sentencepiece"] = "sentencepiece"
    weights: str | None = None
    """A SentencePiece ``.model`` file, anyone's. Without it the stage trains one on the training captions."""
    vocab_size: int = Field(1000, ge=64, le=65536)
    max_tokens: int = Field(16, ge=1)
    """T: condition rows a caption may take; longer captions are cut."""


class ClipTextConfig(Section):
    """Captions through the frozen text tower of an open_clip model."""

    type: Literal["open_clip"]
    architecture: str
    """Its name in open_clip, e.g. ``ViT-L-14``."""
    weights: str
    """A checkpoint file, or a tag that open_clip knows, e.g. ``laion2b_s32b_b82k``."""
    features: Literal["tokens", "pooled"] = "tokens"
    """A condition row for each token, or one for the whole caption."""
    precompute: bool = False
    """The stage ``tokens`` runs the tower, once for each caption, and stores what it says in the token shards (float16)."""


class FeaturesConfig(Section):
    """Features that the shards already hold (``KEY.features.npy``, float16 [rows, width])."""

    type: Literal["features"]
    width: int = Field(ge=1)
    rows: int = Field(ge=1)


class LabelsConfig(Section):
    """Class labels instead of captions: ``label`` in the samples' ``KEY.json``."""

    type: Literal["labels"]
    classes: int = Field(ge=1)
    """Labels are 0 to classes - 1."""


def _text_type(given: Any) -> Any:
    """``type`` of a text section; one that does not say it is SentencePiece's."""
    return given.get("type", "sentencepiece") if isinstance(given, dict) else getattr(given, "type", None)


TextConfig = Annotated[
    Annotated[SentencePieceConfig, Tag("sentencepiece")]
    | Annotated[ClipTextConfig, Tag("open_clip")]
    | Annotated[FeaturesConfig, Tag("features")]
    | Annotated[LabelsConfig, Tag("labels")],
    Discriminator(_text_type),
]


class TokenizerConfig(Section):
    image: ImageTokenizerConfig = ImageTokenizerConfig()
    text: TextConfig = SentencePieceConfig()
    views: tuple[View, ...] = Field(("center",), min_length=1)
    """Variants of each training image that are tokenised (docs/data-sources.md); the first one is the image that orders are
    extracted for. ``tencrop`` stands for ``crop0`` to ``crop9``, ``tencrop105`` for ``crop10`` to ``crop19``."""

    @field_validator("views")
    @classmethod
    def _each_crop(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(each for view in views for each in CROPS.get(view, (view,)))


class ModelConfig(Section):
    """The any-order transformer (docs/model.md). Vocabulary, grid and text sizes follow from the tokenizers."""

    layout: Layout = "instructed"
    """``raster`` is plain next-token; ``instructed`` (RandAR) and ``dual`` (OAR v1) place cells in any order."""
    dim: int = Field(256, ge=8)
    layers: int = Field(6, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    """Heads of keys and values, a divisor of ``heads`` (grouped-query attention). Default: ``heads``."""
    ffn_multiple_of: int = Field(256, ge=1)
    """The SwiGLU width is ``int(8 dim / 3)`` rounded up to a multiple of this."""
    norm_eps: float = Field(1e-5, gt=0)
    rope_base: float = Field(10000.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    """On image-code embeddings, attention outputs and feed-forward outputs."""
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of captions replaced by the trainable null condition, for guidance."""
    text_encoder_layers: int = Field(1, ge=0)
    weights: str | None = None
    """A trained any-order model (safetensors) to continue from."""

    @property
    def ffn_hidden(self) -> int:
        """Width of the SwiGLU feed-forward."""
        return -(-int(8 * self.dim / 3) // self.ffn_multiple_of) * self.ffn_multiple_of

    @model_validator(mode="after")
    def _head_dim(self) -> ModelConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise ValueError(
                f"dim {self.dim} / heads {self.heads} must be a whole number and a multiple of 4 "
                "(the rotation takes pairs for rows and pairs for columns); e.g. dim 256 with heads 4"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        return self


class ParallelConfig(Section):
    workers: Count = 2
    """Processes that train, or ``{min, max}``: with fewer of them after a node is lost, with more when it is back. The global batch and
    the samples of a step stay the same."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed ZeRO shares out among the workers: nothing, the optimiser's state, gradients too, parameters too."""
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
    cpu_threads: int = Field(1, ge=1)
    """Threads a worker computes with when it has no GPU."""
    gpus_per_worker: int = Field(0, ge=0)
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
    """A worker that makes no step for so long writes down its stacks and ends; all start again from the last checkpoint."""
    grace_s: float = Field(120, gt=0)
    """Time to save and leave after SIGTERM or SIGUSR1."""

    @property
    def min_workers(self) -> int:
        return _bounds(self.workers)[0]

    @property
    def max_workers(self) -> int:
        return _bounds(self.workers)[1]

    @model_validator(mode="after")
    def _fits_together(self) -> ParallelConfig:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise RecipeConflict(
                "parallel.zero_stage", "ZeRO 0 keeps no float32 weights beside those in bf16.\nUse zero_stage 1 or more, or precision fp32."
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

    shards: str
    """A folder or ``s3://bucket/prefix`` with a manifest.json (``oar data index`` makes one): token shards of the same tokenizer, or
    image shards, which are tokenised on the fly."""
    weight: float = Field(1.0, gt=0)
    """Its share of the samples, in proportion to 1 for the run's own images."""


class TrainingConfig(Section):
    steps: int = Field(100, ge=0)
    """0, for pretraining only: ``model.weights`` are the any-order model as they are, and orders are extracted from them at once."""
    global_batch: int = Field(48, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    schedule: Literal["cosine", "constant", "linear", "linear_tail"] = "cosine"
    """How the rate falls after the warm-up; ``linear_tail`` is constant, then linear over the last ``tail_fraction`` of the steps."""
    tail_fraction: float = Field(0.2, gt=0, le=1)
    final_lr_fraction: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep a moving average of the weights, which then is what the stage leaves; at the start it follows them faster. Default: off."""
    order: PolicyName | None = None
    """An order policy (docs/order-policies.md) for the samples outside the random share. Default: ``random``, in fine-tuning ``stored``;
    a raster model has its raster order only. The control of a fine-tuning takes random orders, whatever is said here."""
    random_share: float = Field(1.0, ge=0, le=1)
    """Share of the samples trained in a fresh random order; the rest follow ``order``."""
    mix: tuple[MixConfig, ...] = ()
    """Other folders that samples are drawn from, besides the run's own."""
    log_every: int = Field(5, ge=1)
    evaluate_every: int = Field(50, ge=1)
    evaluate_orders: tuple[Literal["random", "raster", "stored"], ...] = ("random",)
    """Orders of the held-out likelihood; ``stored`` (fine-tuning) are those the any-order model prefers, extracted at the start."""
    sample_every: int = Field(0, ge=0)
    """Steps between grids of drawn held-out captions; 0: none."""
    checkpoint_every: int = Field(50, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    keep_every: int = Field(0, ge=0)
    """Steps whose multiples are kept besides; 0: none."""
    keep_best: int = Field(0, ge=0)
    """Checkpoints with the best held-out likelihood that are kept besides."""
    max_non_finite: int = Field(20, ge=0)
    """Batches without a finite gradient that are left out before the stage stops."""
    spike_guard: Literal["off", "warn", "rollback"] = "warn"
    """A loss far above the last ones: say so, or go back to the last good checkpoint and leave out the batches since."""
    spike_sigmas: float = Field(8.0, gt=0)
    """What is far, in robust standard deviations of the last 100 losses."""


class FinetuneConfig(TrainingConfig):
    """A class of its own, so that its default holds for recipes that set some other field of the section, too."""

    steps: int = Field(100, ge=1)
    random_share: float = Field(0.1, ge=0, le=1)


class ExtractConfig(Section):
    score: Score = "gt_logprob"
    guidance: float = Field(1.0, ge=0)
    """Classifier-free guidance scale while scoring; 1 = the conditional model alone."""
    tie_seed: int = 0
    """Of all that is left to chance: ties, noise, the codes that score ``sampled`` draws, random cells."""
    order_temperature: float = Field(0.0, ge=0)
    """Gumbel noise on the choice of the next cell, in units of the score; 0 takes the best cell."""
    orders_per_image: int = Field(1, ge=1)
    """Orders that are found for each image, with noise of their own; training takes one of them, another one in each epoch."""
    first_cell: FirstCell = "free"
    """``free``: the best cell; ``random``; or its number in raster order."""
    commit_per_step: int = Field(1, ge=1)
    """Cells placed at each step; more than 1 is cheaper and no longer exact, as all below (docs/orders.md)."""
    cosine_steps: int | None = Field(None, ge=1)
    """Instead: about so many steps, the later ones placing more cells (RandAR's schedule)."""
    repulsion_radius: int = Field(0, ge=0)
    """Cells placed in one step are more than so many cells apart, as a king moves, where there are such; 0: anywhere."""
    frontier_random: int | None = Field(None, ge=0)
    """Score only the neighbours of placed cells and so many random cells besides. Default: all empty cells."""
    rescore_radius: int | None = Field(None, ge=1)
    """Score anew only cells within so many of those placed last; the others keep their scores. Default: all."""
    views: int = Field(1, ge=1)
    """Orders are extracted for so many of ``tokenizer.views``, from the first one on."""
    batch: int = Field(64, ge=1)
    actors: Count = 2
    """Processes with a model each, or ``{min, max}``: more of them as the cluster has room (docs/extraction-pool.md)."""
    gpus_per_actor: float = Field(0, ge=0)
    """GPUs an actor takes; 0.5: two actors share one. 0: it computes on ``parallel.cpu_threads`` cores."""
    max_retries: int = Field(3, ge=0)
    """Times a shard is tried again, on another actor, before it is set aside as poison."""

    @property
    def min_actors(self) -> int:
        return _bounds(self.actors)[0]

    @property
    def max_actors(self) -> int:
        return _bounds(self.actors)[1]

    @model_validator(mode="after")
    def _shortcuts(self) -> ExtractConfig:
        if self.cosine_steps is not None and self.commit_per_step > 1:
            raise RecipeConflict(
                "extract.cosine_steps", "the cosine schedule says how many cells a step places.\nLeave out commit_per_step."
            )
        if self.repulsion_radius and self.commit_per_step == 1 and self.cosine_steps is None:
            raise RecipeConflict(
                "extract.repulsion_radius",
                "it keeps cells apart that are placed in one step.\nSet commit_per_step above 1, or cosine_steps.",
            )
        if self.frontier_random is not None and self.rescore_radius is not None:
            raise RecipeConflict("extract.rescore_radius", "it cannot be combined with frontier_random.\nLeave one of them out.")
        if self.orders_per_image > 1 and not (self.order_temperature or self.score == "sampled" or self.first_cell == "random"):
            raise RecipeConflict(
                "extract.orders_per_image",
                f"{self.orders_per_image} orders of an image would be the same.\n"
                "Set order_temperature above 0, score: sampled, or first_cell: random; or orders_per_image: 1.",
            )
        return self


class OrderHeadConfig(Section):
    """The order head (docs/order-policies.md): a small network that predicts a whole order at once."""

    first: int = Field(0, ge=0)
    """Cells that are placed before it is asked, in the checkerboard order; 0: it knows the text alone."""
    width: int = Field(128, ge=1)
    steps: int = Field(600, ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(2e-3, gt=0)
    heldout_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training images that it is measured on instead of trained."""
    heldout_images: int = Field(512, ge=1)
    """At most so many of them are used."""


class SampleConfig(Section):
    images: int = Field(16, ge=1)
    """Held-out captions drawn in the report."""
    guidance: float = Field(2.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    """0 keeps the whole vocabulary."""
    order_temperature: float = Field(0.0, ge=0)
    """Gumbel noise on the choice of the next cell; 0 takes the most confident cell."""
    order: PolicyName | None = None
    """An order policy (docs/order-policies.md). Default: the model decides; a raster model draws in raster order."""


class EvaluateConfig(Section):
    nll_images: int = Field(192, ge=2)
    feature_images: int = Field(256, ge=8)
    """Generated and held-out images compared by KID and Frechet distance, the same number of each."""


class PipelineConfig(Section):
    control: bool = True
    """Also fine-tune on random orders with the same budget: what the orders themselves are worth."""


class ObserveConfig(Section):
    """Who may watch a run (docs/observability.md). None of it changes a result, or can stop a run."""

    wandb: Literal["off", "offline", "online"] = "off"
    """``online`` without a key or an answer is kept offline; ``wandb sync`` uploads it later."""
    wandb_project: str = "oar_scale"
    wandb_tags: tuple[str, ...] = ()
    wandb_artifacts: bool = False
    """Log each stage's exported model as an artifact; the end of the stage then waits for its upload, up to ten minutes."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Serve ``/metrics`` and ``/healthz`` for Prometheus while a stage runs; 0: any free port. Default: no server."""
    metrics_address: str = "127.0.0.1"
    """Whom the server answers; ``0.0.0.0``: every host that reaches this one."""
    stall_s: float = Field(600.0, gt=0)
    """Silence of a stage that counts as a stall."""
    mirror_s: float = Field(30.0, gt=0)
    """Between two copies of the events to ``storage.root``, where that is in S3."""


class Recipe(Section):
    """A whole run. ``pretrain``, ``extract`` and ``finetune`` are the three stages of the method."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(0, ge=0)
    run_dir: str | None = None
    """Events, reports and local checkpoints. Default: ``runs/NAME``."""
    storage: StorageConfig = StorageConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    pretrain: TrainingConfig = TrainingConfig()
    extract: ExtractConfig = ExtractConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    order_head: OrderHeadConfig = OrderHeadConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    pipeline: PipelineConfig = PipelineConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def grid(self) -> int:
        """Cells per side of the code grid."""
        return int(self.data.image_size // 2 ** (len(self.tokenizer.image.multipliers) - 1))

    @property
    def local_dir(self) -> str:
        return self.run_dir or f"runs/{self.name}"

    @property
    def root(self) -> str:
        return self.storage.root or self.local_dir

    @model_validator(mode="after")
    def _batch_arithmetic(self) -> Recipe:
        micro = self.parallel.micro_batch
        for workers in dict.fromkeys((self.parallel.min_workers, self.parallel.max_workers)):
            for stage in ("pretrain", "finetune"):
                total = getattr(self, stage).global_batch
                if total % (micro * workers):
                    fits = [m for m in range(1, total + 1) if total % (m * workers) == 0]
                    nearest = sorted(sorted(fits, key=lambda m: abs(m - micro))[:2])
                    options = " or ".join(f"{m} (accumulation {total // (m * workers)})" for m in nearest)
                    remedy = f"Nearest that fit: micro_batch {options}." if fits else f"Use a global_batch that {workers} divides."
                    raise RecipeConflict(
                        "parallel.micro_batch",
                        f"{stage}.global_batch {total} is not a multiple of micro_batch x workers = "
                        f"{micro} x {workers} = {micro * workers}.\n{remedy}",
                    )
                if total % self.data.canonical_streams:
                    raise RecipeConflict(
                        "data.canonical_streams",
                        f"{stage}.global_batch {total} is not a multiple of canonical_streams {self.data.canonical_streams}.\n"
                        f"Every stream gives the same number of samples to each step: use a divisor of {total}.",
                    )
            if self.data.canonical_streams % workers:
                raise RecipeConflict(
                    "parallel.workers",
                    f"{workers} workers cannot share data.canonical_streams = {self.data.canonical_streams} evenly.\n"
                    f"Workers that fit: {', '.join(str(w) for w in _divisors(self.data.canonical_streams))}.",
                )
        return self

    @model_validator(mode="after")
    def _something_to_start_with(self) -> Recipe:
        if not self.pretrain.steps and self.model.weights is None:
            raise RecipeConflict(
                "pretrain.steps",
                "without pretraining there has to be a trained any-order model to start with.\n"
                "Name its file in model.weights (`oar checkpoint import` makes one of RandAR's), or pretrain for some steps.",
            )
        return self

    def worker_counts(self) -> list[int]:
        """Numbers of workers that the recipe can train with, most first."""
        parallel, streams = self.parallel, self.data.canonical_streams
        batches = (self.pretrain.global_batch, self.finetune.global_batch)
        return [
            workers
            for workers in range(parallel.max_workers, parallel.min_workers - 1, -1)
            if streams % workers == 0 and not any(total % (parallel.micro_batch * workers) for total in batches)
        ]

    @model_validator(mode="after")
    def _orders(self) -> Recipe:
        for stage in ("pretrain", "finetune"):
            training = getattr(self, stage)
            if training.order in (None, "random"):
                continue
            if training.random_share == 1:
                raise RecipeConflict(
                    f"{stage}.random_share",
                    f"with random_share 1 every sample takes a random order, and none follows {stage}.order {training.order!r}.\n"
                    "Set random_share: 0, or another share below 1.",
                )
            if self.model.layout == "raster":
                raise RecipeConflict(f"{stage}.order", _RASTER_ONLY)
        if self.model.layout == "raster" and self.sample.order not in (None, "raster"):
            raise RecipeConflict("sample.order", _RASTER_ONLY)
        return self

    @model_validator(mode="after")
    def _grid(self) -> Recipe:
        factor = 2 ** (len(self.tokenizer.image.multipliers) - 1)
        if self.data.image_size % factor:
            low = self.data.image_size // factor * factor
            raise RecipeConflict(
                "data.image_size",
                f"the tokenizer halves the image {len(self.tokenizer.image.multipliers) - 1} times, and {self.data.image_size} "
                f"is not a multiple of {factor}.\nNearest that fit: {low or factor} or {low + factor}.",
            )
        if isinstance(self.extract.first_cell, int) and self.extract.first_cell >= self.grid**2:
            raise RecipeConflict(
                "extract.first_cell", f"{self.extract.first_cell}: there are {self.grid**2} cells.\nThe last one is {self.grid**2 - 1}."
            )
        return self


class RecipeConflict(ValueError):
    """Two fields contradict each other; ``key`` is the one to name to the user."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
