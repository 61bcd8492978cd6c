"""A training job: what a worker needs to know, and nothing that only lives in the driver's memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from oar_scale.config.arms import FROM_EXTRACTION
from oar_scale.config.locations import node_path
from oar_scale.config.schema import DataConfig, ParallelConfig, Recipe, TrainingConfig
from oar_scale.config.section import changeable_fields, limit_fields, operational_fields, silent_fields
from oar_scale.data.manifest import read_manifest
from oar_scale.json_object import JsonObject
from oar_scale.model import model_id
from oar_scale.orders.head import tables_id
from oar_scale.orders.order_files import run_files
from oar_scale.registry import STAGES, kind_of
from oar_scale.storage import join

_ABSENT = object()
RENAMED = ("model", "training", "streams", "max_bad_fraction", "gradient_dtype")
"""Entries of an identity whose values have longer names in the recipe."""


@dataclass(frozen=True)
class TrainingJob:
    """One training stage of a run. All fields are plain values: the job travels to workers on other machines."""

    recipe: Recipe
    """As the stage has it (:meth:`Recipe.of`)."""
    stage: str
    """Its name, with its arm and its seed."""
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
    orders: str = "orders"
    """The folder of the run's storage with the orders that it may follow."""

    @property
    def training(self) -> TrainingConfig:
        """The stage's settings. The control has fine-tuning's: same samples, views and budget, but no stored orders."""
        return self.recipe.training(self.section)

    @cached_property
    def start_id(self) -> str:
        """The id of the model that the stage starts with. Its file is read for it once, and copies of the job know it from then on."""
        return model_id(self.start_from)

    @cached_property
    def predicted_id(self) -> str | None:
        """Which order head, with which settings, has predicted the orders that the stage follows; None: it follows others. Read by each
        worker when it starts: they may have been predicted anew since the last attempt."""
        if self.kind != "finetune" or self.training.order != "order-head":
            return None
        files = run_files(self.root, self.orders)
        return tables_id(replace(files, tables=files.predicted))

    @property
    def checkpoints(self) -> str:
        """Where the stage's checkpoints are committed."""
        return join(self.root, "checkpoints", self.stage)

    @property
    def cache(self) -> str:
        """Local copies of remote files."""
        given = self.recipe.storage.cache_dir
        return join(self.local, "cache") if given is None else node_path(given, "storage.cache_dir")

    @property
    def scratch(self) -> str:
        """Local disk that checkpoints are written to first."""
        given = self.recipe.storage.scratch_dir
        return join(self.local, "scratch") if given is None else node_path(given, "storage.scratch_dir")

    @property
    def kind(self) -> str:
        """The stage of the method that it is: ``pretrain``, ``control``, or ``finetune`` in any arm."""
        return kind_of(self.stage)

    @property
    def section(self) -> str:
        """The section of the recipe that ``training`` is."""
        return STAGES[self.kind].training

    @property
    def identity(self) -> dict[str, object]:
        """The settings a checkpoint was written with, but for operational fields. :meth:`changed_since` says which may be others."""
        recipe, training = self.recipe, self.training
        return {
            "stage": self.stage,
            "start_from": self.start_id,
            "tokens": read_manifest(join(self.root, "tokens", "train")).fingerprint,
            "seed": recipe.seed,
            "precision": recipe.parallel.precision,
            "gradient_dtype": recipe.parallel.gradient_dtype,
            "model": recipe.model.model_dump(mode="json", exclude={"weights"}),
            "training": training.model_dump(mode="json", exclude=set(silent_fields(training))),
            "mix": [read_manifest(mix.shards).fingerprint for mix in training.mix],
            "streams": [recipe.data.canonical_streams, recipe.data.shuffle_window_shards],
            "max_bad_fraction": recipe.data.max_bad_fraction,
            **({"extract.mirror": True} if recipe.extract.mirror and self.section == "finetune" else {}),
            **self._extraction(),
        }

    def _extraction(self) -> JsonObject:
        """What of ``extract`` a fine-tuning rests on, but for ``mirror``: the views that have orders, and how its orders were found."""
        if self.section != "finetune":
            return {}
        extract = self.recipe.extract
        stored = self.kind == "finetune" and (self.training.order or "stored") in FROM_EXTRACTION
        others = operational_fields(type(extract)) | {"mirror"}
        found: JsonObject = {
            f"extract.{name}": value
            for name, value in extract.model_dump(mode="json").items()
            if name == "views" or (stored and name not in others)
        }
        return found if self.predicted_id is None else {**found, "orders/predicted": self.predicted_id}

    @property
    def limits(self) -> frozenset[str]:
        """The limits among the settings that a training may resume with other values of."""
        return self._named(limit_fields(DataConfig), limit_fields(type(self.training)))

    @property
    def changeable(self) -> frozenset[str]:
        """All of the settings that a training may resume with other values of, by their names in the recipe."""
        parallel = {f"parallel.{name}" for name in changeable_fields(ParallelConfig)}
        return self.limits | parallel | self._named(changeable_fields(DataConfig), changeable_fields(type(self.training)))

    def changed_since(self, identity: JsonObject) -> dict[str, tuple[object, object]]:
        """The settings in which the job differs from a checkpoint's identity: what they were, and what they are now.

        A changeable one that the checkpoint does not know, because an older version wrote it, counts as unchanged.
        """
        then, now = self._by_name(identity), self._by_name(self.identity)
        names = sorted(now.keys() | then.keys() - self.changeable)
        later = {name for name in self._extraction() if name not in then}  # older versions did not write them
        known = [name for name in names if name in then or name not in self.changeable | later]
        return {name: (then.get(name), now.get(name)) for name in known if then.get(name, _ABSENT) != now.get(name, _ABSENT)}

    def _named(self, data: frozenset[str], training: frozenset[str]) -> frozenset[str]:
        return frozenset({f"data.{name}" for name in data} | {f"{self.section}.{name}" for name in training})

    def _by_name(self, identity: JsonObject) -> JsonObject:
        """The values of an identity by the names that they have in the recipe."""
        rest = {name: value for name, value in identity.items() if name not in RENAMED}
        values = {**rest, **{f"model.{name}": value for name, value in identity["model"].items()}}
        values |= {f"{self.section}.{name}": value for name, value in identity["training"].items()}
        values |= dict(zip(("data.canonical_streams", "data.shuffle_window_shards"), identity["streams"], strict=True))
        later = {"data": "max_bad_fraction", "parallel": "gradient_dtype"}  # older versions did not write them
        return values | {f"{section}.{name}": identity[name] for section, name in later.items() if name in identity}
