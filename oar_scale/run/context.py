"""A run: its recipe, and where its files are.

ROOT  (folder or s3://)   images/ tokens/ tokenizers/ checkpoints/ models/ orders/ stages/
LOCAL (folder)            recipe.yaml events/ figures/ evaluation.json report/index.html
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from oar_scale.config.locations import node_path
from oar_scale.config.schema import Recipe
from oar_scale.model.run_models import run_model_file
from oar_scale.observe.console import Console
from oar_scale.observe.events import EventLog
from oar_scale.observe.mirror import open_log
from oar_scale.registry import STAGES
from oar_scale.shard_pool.pool_types import ArrayTask
from oar_scale.storage import absolute, join

ONE_ORDER = "model.layout raster has one order for all images: there is none to find for each"
OTHER_LAYOUT = "Choose model.layout grouped, decoupled, instructed or dual for orders of images."


@dataclass(frozen=True)
class Run:
    """A recipe together with the folders and the process that it runs in."""

    recipe: Recipe
    console: Console = field(default_factory=Console)
    profile_steps: int = 0
    """Training steps that are profiled; 0: none."""
    rank: int = 0
    """Which one of the processes that torchrun started for a training stage; all but the first leave the run's files alone."""
    array: ArrayTask | None = None
    """Which of several processes this one is, where they share the extraction without Ray."""

    def at(self, *names: str) -> str:
        """A folder or object in the run's storage, absolute where it is a path."""
        return join(absolute(self.recipe.root), *names)

    def local(self, *names: str) -> str:
        """A path in the run's local folder."""
        return os.path.join(os.path.abspath(self.recipe.local_dir), *names)

    @property
    def cache(self) -> str:
        """The local folder where remote objects are cached."""
        given = self.recipe.storage.cache_dir
        return self.local("cache") if given is None else node_path(given, "storage.cache_dir")

    @property
    def scratch(self) -> str:
        """The local folder for files on their way to the storage."""
        given = self.recipe.storage.scratch_dir
        return self.local("scratch") if given is None else node_path(given, "storage.scratch_dir")

    @property
    def events(self) -> str:
        """The local folder of the event files."""
        return self.local("events")

    def marker(self, stage: str) -> str:
        """The file that a finished stage writes last, where its results are: in the storage, or in the local folder."""
        name = f"{stage}.json"
        return self.local("stages", name) if stage in STAGES and STAGES[stage].local else self.at("stages", name)

    def log(self, stage: str) -> AbstractContextManager[EventLog]:
        """The event log of a new attempt at a stage."""
        return open_log(self.events, stage, self.at(), self.recipe.observe.mirror_s)

    @property
    def vq_uri(self) -> str:
        """The image tokenizer."""
        return self.at("tokenizers", "vq.safetensors")

    @property
    def vq_training_uri(self) -> str:
        """The training of the image tokenizer, until its stage is done."""
        return self.at("tokenizers", "training.safetensors")

    @property
    def text_uri(self) -> str:
        """The SentencePiece model, where the recipe trains or takes one."""
        return self.at("tokenizers", "text.model")

    def model_uri(self, name: str) -> str:
        """The file of a model of the run, also of an arm, under the name that an earlier version gave it where the run is that old."""
        return run_model_file(self.at(), name)
