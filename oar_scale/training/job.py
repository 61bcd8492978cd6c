"""A training job: what a worker needs to know, and nothing that only lives in the driver's memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from oar_scale.config.schema import Recipe, TrainingConfig
from oar_scale.config.section import operational_fields
from oar_scale.data.manifest import read_manifest
from oar_scale.model import model_id
from oar_scale.registry import STAGES, TrainingName
from oar_scale.storage import join


@dataclass(frozen=True)
class TrainingJob:
    """One training stage of a run. All fields are plain values: the job travels to workers on other machines."""

    recipe: Recipe
    stage: TrainingName
    root: str
    """The run's storage; absolute where it is a folder."""
    local: str
    """The run's local folder: events, scratch, cache."""
    start_from: str
    """The exported model whose weights the stage starts with."""
    result: str
    """Where the trained model is exported to."""
    profile_steps: int = 0
    """Steps that rank 0 profiles; 0: none."""

    @property
    def training(self) -> TrainingConfig:
        """The stage's settings. The control has fine-tuning's: same samples, views and budget, but no stored orders."""
        return self.recipe.training(self.section)

    @cached_property
    def start_id(self) -> str:
        """The id of the model that the stage starts with. Its file is read for it once, and copies of the job know it from then on."""
        return model_id(self.start_from)

    @property
    def checkpoints(self) -> str:
        """Where the stage's checkpoints are committed."""
        return join(self.root, "checkpoints", self.stage)

    @property
    def cache(self) -> str:
        """Local copies of remote files."""
        return self.recipe.storage.cache_dir or join(self.local, "cache")

    @property
    def scratch(self) -> str:
        """Local disk that checkpoints are written to first."""
        return self.recipe.storage.scratch_dir or join(self.local, "scratch")

    @property
    def section(self) -> str:
        """The section of the recipe that ``training`` is."""
        return STAGES[self.stage].training

    @property
    def identity(self) -> dict[str, object]:
        """The settings a checkpoint must agree on to be resumed; operational fields may change between attempts."""
        recipe, training = self.recipe, self.training
        return {
            "stage": self.stage,
            "start_from": self.start_id,
            "tokens": read_manifest(join(self.root, "tokens", "train")).fingerprint,
            "seed": recipe.seed,
            "precision": recipe.parallel.precision,
            "model": recipe.model.model_dump(mode="json", exclude={"weights"}),
            "training": training.model_dump(mode="json", exclude=set(operational_fields(type(training)))),
            "mix": [read_manifest(mix.shards).fingerprint for mix in training.mix],
            "streams": [recipe.data.canonical_streams, recipe.data.shuffle_window_shards],
        }
