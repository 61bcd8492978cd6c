"""The recipe: every choice of a run, typed, with its unit and its default in one module.

data_sections       images, where shards lie, tokenizers
training_sections   model, workers, pretraining, fine-tuning
run_sections        extraction, order head, samples, evaluation, watching
arms                pipeline: optional stages, arms and seeds

A recipe is YAML; ``config.loading`` reads it. The classes import neither torch nor ray, and no validator does I/O.
Cross-field rules live in the model that owns both fields; rules between sections in :class:`Recipe`.

Names follow the field: ``global_batch = micro_batch x workers x accumulation``.
"""

from __future__ import annotations

import os
import re

from pydantic import Field, model_validator

from oar_scale.config.arms import ArmConfig, PipelineConfig, check_arms, check_orders, stages_of
from oar_scale.config.data_sections import (
    CROPS,
    ClassFoldersSource,
    ClipTextConfig,
    DataConfig,
    FeaturesConfig,
    FolderSource,
    ImageTokenizerConfig,
    LabelsConfig,
    OpenMojiSource,
    SentencePieceConfig,
    Source,
    StorageConfig,
    TableSource,
    TextConfig,
    TokenizerConfig,
    View,
    VQTrainingConfig,
    WebDatasetSource,
    mirrored_views,
)
from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.locations import Location
from oar_scale.config.run_sections import (
    DRAWING_SCORES,
    EvaluateConfig,
    ExtractConfig,
    FirstCell,
    GuidanceSchedule,
    ObserveConfig,
    OrderHeadConfig,
    SampleConfig,
    Score,
)
from oar_scale.config.section import (
    NUMBER,
    RANGE,
    Count,
    PolicyName,
    Range,
    RecipeConflict,
    Section,
    divisors,
)
from oar_scale.config.training_sections import (
    FinetuneConfig,
    Layout,
    MixConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from oar_scale.errors import UserError
from oar_scale.registry import MODELS, STAGES, TRAINING_SECTIONS, Stage

__all__ = [
    "CROPS",
    "DRAWING_SCORES",
    "NUMBER",
    "RANGE",
    "ArmConfig",
    "ClassFoldersSource",
    "ClipTextConfig",
    "Count",
    "DataConfig",
    "EvaluateConfig",
    "ExtractConfig",
    "FeaturesConfig",
    "FinetuneConfig",
    "FirstCell",
    "FolderSource",
    "GuidanceSchedule",
    "ImageTokenizerConfig",
    "LabelsConfig",
    "Layout",
    "MixConfig",
    "ModelConfig",
    "ObserveConfig",
    "OpenMojiSource",
    "OrderHeadConfig",
    "ParallelConfig",
    "PipelineConfig",
    "PolicyName",
    "Range",
    "Recipe",
    "RecipeConflict",
    "SampleConfig",
    "Score",
    "Section",
    "SentencePieceConfig",
    "Source",
    "StorageConfig",
    "TableSource",
    "TextConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "VQTrainingConfig",
    "View",
    "WebDatasetSource",
]

_RASTER_ONLY = "a raster model has its raster order only.\nLeave it out, or choose another model.layout."


class Recipe(Section):
    """A whole run. ``pretrain``, ``extract`` and ``finetune`` are the three stages of the method."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    """Not of dots alone: ``runs/NAME`` would be another folder."""
    seed: int = Field(0, ge=0)
    run_dir: Location | None = None
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
        """The run's local folder, as the recipe says or ``runs/NAME``."""
        return self.run_dir or f"runs/{self.name}"

    @property
    def root(self) -> str:
        """The run's storage: ``storage.root``, or the local folder."""
        return self.storage.root or self.local_dir

    def in_folder(self, folder: str) -> Recipe:
        """The recipe for a process with another working folder: the run's own folders are absolute.

        Args:
            folder: where relative paths start.
        """
        root = self.storage.root
        storage = self.storage.model_copy(update={"root": root if root is None or "://" in root else os.path.join(folder, root)})
        return self.model_copy(update={"run_dir": os.path.join(folder, self.local_dir), "storage": storage})

    def stages(self) -> list[Stage]:
        """The stages of this recipe, each after those it needs."""
        if self.model.layout == "raster":
            return [stage for stage in STAGES.values() if stage.with_raster_layout]
        return list(stages_of(self.pipeline, self.extract, self.finetune))

    def stage(self, name: str) -> Stage:
        """The stage of this name, also one of every run's that this recipe leaves out. Raises UserError where there is none."""
        own = {stage.name: stage for stage in self.stages()}
        if name not in own and name not in STAGES:
            raise UserError(f"no stage {name!r} in this recipe. Its stages are: {', '.join(own)}.")
        return own.get(name) or STAGES[name]

    def of(self, stage: Stage) -> Recipe:
        """The recipe as one of its stages has it: with the extraction and the fine-tuning of its arm, and the seed that is its own."""
        changes: dict[str, object] = {}
        if stage.arm:
            arm = self.pipeline.arms[stage.arm]
            changes["extract"] = arm.extraction(self.extract)
            changes["finetune"] = arm.finetune(self.finetune)
        if stage.seed:
            changes["seed"] = int(fingerprint({"seed": self.seed, "number": stage.seed}), 16) >> 1
        # It is a recipe without arms: theirs would be understood as changes to this one's settings.
        return self.model_copy(update={**changes, "pipeline": PipelineConfig(control=self.pipeline.control)}) if changes else self

    def models(self) -> list[str]:
        """The names of the run's models: those of every run, then those of its arms and seeds."""
        return list(dict.fromkeys([*MODELS, *(stage.model for stage in self.stages() if stage.model)]))

    def orders_of(self, model: str) -> str:
        """The folder of the run's storage with the extracted orders of a model: its arm's, where that has an extraction of its own."""
        return next((stage.orders for stage in self.stages() if stage.model == model), "orders")

    def training(self, section: str) -> TrainingConfig:
        """The settings of a training: the section ``pretrain`` or ``finetune``."""
        return self.pretrain if section == "pretrain" else self.finetune

    @model_validator(mode="after")
    def _folders(self) -> Recipe:
        root = self.storage.root
        if root is not None and re.match(r"(?!s3://)[A-Za-z][A-Za-z0-9+.-]*:/", root):
            raise RecipeConflict("storage.root", "is under a scheme that is not known here.\nUse a local folder, or s3://bucket/prefix.")
        if self.run_dir is not None and "://" in self.run_dir:
            raise RecipeConflict(
                "run_dir",
                "is a folder on this machine or on a file system that it shares, and no URL.\n"
                "Checkpoints, shards and tables go to storage.root, which may be s3://bucket/prefix.",
            )
        return self

    @model_validator(mode="after")
    def _batch_arithmetic(self) -> Recipe:
        micro = self.parallel.micro_batch
        for workers in dict.fromkeys((self.parallel.min_workers, self.parallel.max_workers)):
            for stage in TRAINING_SECTIONS:
                total = self.training(stage).global_batch
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
                    f"Workers that fit: {', '.join(str(w) for w in divisors(self.data.canonical_streams))}.",
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
    def _arms(self) -> Recipe:
        if self.model.layout == "raster" and (self.pipeline.arms or self.pipeline.seeds > 1):
            raise RecipeConflict(f"pipeline.{'arms' if self.pipeline.arms else 'seeds'}", _RASTER_ONLY)
        check_arms(self.pipeline, self.extract, self.finetune)
        return self

    @model_validator(mode="after")
    def _orders(self) -> Recipe:
        for stage in TRAINING_SECTIONS:
            if self.training(stage).group_steps and self.model.layout != "grouped":
                raise RecipeConflict(
                    f"{stage}.group_steps",
                    "only a model of layout grouped is trained to answer for several cells at once.\n"
                    "Leave it out, or choose model.layout grouped.",
                )
        check_orders("finetune", self.finetune)
        mirrored = mirrored_views(self.tokenizer.views, self.extract.views) if self.extract.mirror else {}
        with_orders = self.extract.views + len(mirrored)
        arms = {f"pipeline.arms.{name}": arm.finetune(self.finetune) for name, arm in self.pipeline.arms.items()}
        for key, finetune in {"finetune": self.finetune, **arms}.items():
            share = finetune.any_view_share
            if share is not None and share > finetune.random_share and with_orders < len(self.tokenizer.views):
                raise RecipeConflict(
                    f"{key}.random_share",
                    f"{finetune.random_share:g} is below {share:g}, the share of samples that take any view (finetune.random_share, or "
                    f"any_view_share where that is set), and {with_orders} of {len(self.tokenizer.views)} views have orders.\n"
                    "Set finetune.any_view_share to the least random_share of all arms, or extract.views higher.",
                )
        trainings: dict[str, TrainingConfig] = {name: self.training(name) for name in TRAINING_SECTIONS}
        for key, training in {**trainings, **arms}.items():
            if training.order in (None, "random"):
                continue
            if training.random_share == 1:
                raise RecipeConflict(
                    f"{key}.random_share",
                    f"with random_share 1 every sample takes a random order, and none follows {key}.order {training.order!r}.\n"
                    "Set random_share: 0, or another share below 1.",
                )
            if self.model.layout == "raster":
                raise RecipeConflict(f"{key}.order", _RASTER_ONLY)
        if self.model.layout == "raster" and self.sample.order not in (None, "raster"):
            raise RecipeConflict("sample.order", _RASTER_ONLY)
        along_given = self.sample.order not in (None, "confidence") or self.model.layout == "raster"
        for name, refused, why in (
            ("steps", ("raster", "dual"), "asks for one cell a pass"),
            ("draft", ("raster",), "cannot draft cells"),
        ):
            if getattr(self.sample, name) and along_given and self.model.layout in refused:
                text = f"along a given order, layout {self.model.layout} {why}.\nLeave it out, or choose another model.layout."
                raise RecipeConflict(f"sample.{name}", text)
        return self

    @model_validator(mode="after")
    def _mirrored_views(self) -> Recipe:
        views, count = self.tokenizer.views, self.extract.views
        if not self.extract.mirror:
            return self
        mirrored = mirrored_views(views, count)
        if not mirrored:
            raise RecipeConflict(
                "extract.mirror",
                f"orders are extracted for {', '.join(views[:count])}, and no view of tokenizer.views is a mirror image of that.\n"
                "Add it, as in tokenizer.views: [center, center_flip], or leave mirror out.",
            )
        if own := [views[other] for other in mirrored.values() if other < count]:
            raise RecipeConflict(
                "extract.mirror",
                f"with extract.views {count} orders are extracted for {own[0]} itself.\nSet extract.views so that it ends before that, "
                "or leave mirror out.",
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
        if isinstance(self.extract.first_cell, int) and self.extract.first_cell >= self.grid**2:
            raise RecipeConflict(
                "extract.first_cell", f"{self.extract.first_cell}: there are {self.grid**2} cells.\nThe last one is {self.grid**2 - 1}."
            )
        return self
