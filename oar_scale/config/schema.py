"""The recipe: every choice of a run, typed, with its unit and its default in one place.

A recipe is YAML; ``config.loading`` reads it. The classes here import neither torch nor ray, and no validator does I/O.
Cross-field rules live in the model that owns both fields; rules between sections in :class:`Recipe`.

Names follow the field: ``global_batch = micro_batch x workers x accumulation``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

Layout = Literal["raster", "instructed", "dual"]
Score = Literal["gt_logprob", "max_prob", "neg_entropy", "margin"]
OPERATIONAL = {
    "loader_processes",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "actors",
    "gpus_per_actor",
    "max_retries",
    "prepare_threads",
}
"""Fields that say who does the work and how often it is logged or saved: they may change without changing the result."""
View = Annotated[str, Field(pattern=r"^(center|center_flip|jitter[1-9][0-9]?|crop1?[0-9]|tencrop|tencrop105)$")]
CROPS = {"tencrop": tuple(f"crop{k}" for k in range(10)), "tencrop105": tuple(f"crop{k}" for k in range(10, 20))}
"""Views that stand for several."""


class Section(BaseModel):
    """Base of all recipe sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StorageConfig(Section):
    root: str | None = None
    """Where shards, orders and checkpoints live: a folder or ``s3://bucket/prefix``. Default: ``run_dir``."""
    cache_dir: str | None = None
    """Local copies of remote shards, shared by all processes of a host. Default: ``run_dir/cache``."""
    cache_gb: float | None = Field(None, gt=0)
    """Bound of that folder, 10^9 bytes; the shards used least recently go first. Default: no bound."""

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
    workers: int = Field(2, ge=1)
    zero_stage: Literal[1, 2] = 2
    micro_batch: int = Field(24, ge=1)
    """Images a worker takes through the model at once."""
    precision: Literal["bf16", "fp32"] = "bf16"
    cpu_threads: int = Field(1, ge=1)
    """Threads a worker computes with when it has no GPU."""
    gpus_per_worker: int = Field(0, ge=0)
    compile: bool = False
    """Compile each block with torch.compile, a minute or more at the start. For GPUs: on a CPU it is no faster."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing, all but matrix products and attention, or whole blocks."""
    max_failures: int = Field(3, ge=0)
    """Restarts of the worker group before the stage gives up."""


class MixConfig(Section):
    """Another folder of shards to train on."""

    shards: str
    """A folder or ``s3://bucket/prefix`` with a manifest.json (``oar data index`` makes one): token shards of the same tokenizer, or
    image shards, which are tokenised on the fly."""
    weight: float = Field(1.0, gt=0)
    """Its share of the samples, in proportion to 1 for the run's own images."""


class TrainingConfig(Section):
    steps: int = Field(100, ge=1)
    global_batch: int = Field(48, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    final_lr_fraction: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0)
    random_share: float = Field(1.0, ge=0, le=1)
    """Share of the samples trained in a fresh random order; the rest follow their stored orders."""
    mix: tuple[MixConfig, ...] = ()
    """Other folders that samples are drawn from, besides the run's own."""
    log_every: int = Field(5, ge=1)
    evaluate_every: int = Field(50, ge=1)
    checkpoint_every: int = Field(50, ge=1)
    keep_checkpoints: int = Field(2, ge=1)


class FinetuneConfig(TrainingConfig):
    """A class of its own, so that its default holds for recipes that set some other field of the section, too."""

    random_share: float = Field(0.1, ge=0, le=1)


class ExtractConfig(Section):
    score: Score = "gt_logprob"
    guidance: float = Field(1.0, ge=0)
    """Classifier-free guidance scale while scoring; 1 = the conditional model alone."""
    tie_seed: int = 0
    batch: int = Field(64, ge=1)
    actors: int = Field(2, ge=1)
    gpus_per_actor: float = Field(0, ge=0)
    max_retries: int = Field(3, ge=0)
    """Times a shard is tried again, on another actor, before it is set aside as poison."""


class SampleConfig(Section):
    images: int = Field(16, ge=1)
    """Held-out captions drawn in the report."""
    guidance: float = Field(2.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    """0 keeps the whole vocabulary."""
    order_temperature: float = Field(0.0, ge=0)
    """Gumbel noise on the choice of the next cell; 0 takes the most confident cell."""


class EvaluateConfig(Section):
    nll_images: int = Field(192, ge=2)
    feature_images: int = Field(256, ge=8)
    """Generated and held-out images compared by KID and Frechet distance, the same number of each."""


class PipelineConfig(Section):
    control: bool = True
    """Also fine-tune on random orders with the same budget: what the orders themselves are worth."""


class ObserveConfig(Section):
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "oar_scale"


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
        micro, workers = self.parallel.micro_batch, self.parallel.workers
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
    def _grid(self) -> Recipe:
        factor = 2 ** (len(self.tokenizer.image.multipliers) - 1)
        if self.data.image_size % factor:
            low = self.data.image_size // factor * factor
            raise RecipeConflict(
                "data.image_size",
                f"the tokenizer halves the image {len(self.tokenizer.image.multipliers) - 1} times, and {self.data.image_size} "
                f"is not a multiple of {factor}.\nNearest that fit: {low or factor} or {low + factor}.",
            )
        return self


class RecipeConflict(ValueError):
    """Two fields contradict each other; ``key`` is the one to name to the user."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
