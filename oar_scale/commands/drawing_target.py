"""What ``oar sample`` draws from: a recipe, the folder of its run, an exported folder, or a model file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from oar_scale.config.loading import load_recipe, override_sample
from oar_scale.config.schema import FeaturesConfig, LabelsConfig
from oar_scale.data.balanced_labels import balanced_labels
from oar_scale.data.prompt_files import GivenPrompt
from oar_scale.errors import UserError
from oar_scale.generation.folder_files import CONFIG
from oar_scale.generation.model_bundle import RECIPE, ModelBundle, find_bundle, model_name, run_bundle
from oar_scale.model.spec import ClassSpec
from oar_scale.model.weights import read_spec
from oar_scale.run.artifacts import read_tokens, require, require_model
from oar_scale.run.context import Run
from oar_scale.storage import join
from oar_scale.tokenizers.prompts import Field, Prompt
from oar_scale.tokenizers.safetensors_file import INDEX, SAFE

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class DrawingTarget:
    """A model with what it is used with, and the run that it is of."""

    bundle: ModelBundle
    run: Run | None
    """None of an exported folder or a model file."""

    def dtype(self, precision: Precision | None) -> torch.dtype:
        """That the model computes in: as asked for, else as the recipe says, else float32."""
        own = self.run.recipe.parallel.precision if self.run else "fp32"
        return torch.bfloat16 if (precision or own) == "bf16" else torch.float32

    def balanced_prompts(self, images: int, seed: int) -> list[GivenPrompt]:
        """Every label of a model of classes equally often. Raises UserError for any other model, or images that cannot be shared out."""
        condition = read_spec(self.bundle.model).condition
        if not isinstance(condition, ClassSpec):
            raise UserError(f"{self.bundle.where}: --labels are of models of classes, and this one draws captions. Give --prompts FILE.")
        return balanced_labels(condition.classes, images, seed)

    def heldout_prompts(self) -> list[Prompt]:
        """The first held-out prompts of the run, as many as its report draws. Raises UserError where there are none."""
        if self.run is None:
            raise UserError(f'{self.bundle.where}: there are no held-out captions here. Give some: oar sample {self.bundle.where} "a cat"')
        match self.run.recipe.tokenizer.text:
            case LabelsConfig():
                field: Field = "label"
            case FeaturesConfig():
                field = "features"
            case _:  # also of a text tower whose features were precomputed: it runs on the captions
                field = "txt"
        return read_tokens(self.run, "heldout", self.run.recipe.sample.images, field).prompts


def find_target(path: str, overrides: Sequence[str] = (), model: str | None = None) -> DrawingTarget:
    """The model at ``path``.

    Args:
        overrides: fields of the recipe; of anything else those of ``sample`` alone.
        model: which one of a run; default: ``ordered``, of a raster run ``any_order``.

    Raises:
        UserError: nothing that can draw is there, or a stage has not finished.
    """
    in_folder = os.path.isfile(join(path, RECIPE)) and not os.path.exists(join(path, CONFIG))
    if in_folder or path.lower().endswith((".yaml", ".yml")) or (os.path.isfile(path) and not path.endswith((SAFE, SAFE + INDEX))):
        return _of_run(path, in_folder, overrides, model)
    bundle = find_bundle(path, model)
    return DrawingTarget(replace(bundle, sample=override_sample(bundle.sample, overrides, path)), None)


def _of_run(path: str, in_folder: bool, overrides: Sequence[str], model: str | None) -> DrawingTarget:
    recipe = load_recipe(join(path, RECIPE) if in_folder else path, overrides)
    if in_folder:  # wherever it was made
        recipe = recipe.model_copy(update={"run_dir": path})
    return run_target(Run(recipe), model)


def run_target(run: Run, model: str | None) -> DrawingTarget:
    """A model of a run. Raises UserError as :func:`find_target`."""
    wanted = model_name(run.recipe, model)
    require(run, run.vq_uri, "tokenizer")
    file = require_model(run, wanted)
    recipe = run.recipe.model_copy(update={"storage": run.recipe.storage.model_copy(update={"root": run.at()})})
    return DrawingTarget(run_bundle(run.local(), recipe, file, recipe.orders_of(wanted)), run)
