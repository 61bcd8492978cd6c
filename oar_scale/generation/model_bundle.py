"""What belongs together to draw images, and where it lies.

    an exported folder    config.json  model.safetensors  [vq.safetensors]  [text.model]
                          (a model above 5 GB: model-00001-of-0000N.safetensors ... and model.safetensors.index.json)
    on the hub            hf://owner/name[@revision][/folder], which holds an exported folder
    a run's folder        recipe.yaml  models/NAME.safetensors  tokenizers/vq.safetensors  tokenizers/text.model
    a model file          the model alone

``config.json`` describes the folder's contents, and is written last: a folder without it is incomplete.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import ClipTextConfig, Recipe, SampleConfig, SentencePieceConfig, TextConfig
from oar_scale.errors import UserError
from oar_scale.generation.folder_files import CONFIG, EXTRA_FILES, MODEL, MODEL_FILES, VQ
from oar_scale.json_object import JsonObject
from oar_scale.model import ModelSpec
from oar_scale.model.run_models import run_model_file
from oar_scale.names import file_name
from oar_scale.orders.order_files import OrderFiles, folder_files, run_files
from oar_scale.registry import current_name
from oar_scale.storage import join, open_storage
from oar_scale.tokenizers.image import TokenizerSpec
from oar_scale.tokenizers.prompts import TEXT_FILE
from oar_scale.tokenizers.safetensors_file import INDEX, SAFE

RECIPE = "recipe.yaml"
HUB = "hf://"


class TokenizerNote(BaseModel):
    """The image tokenizer of an exported folder."""

    kind: str
    id: str
    spec: JsonObject


class FolderConfig(BaseModel):
    """``config.json``."""

    model_config = ConfigDict(extra="ignore")  # a later version may say more

    format: Literal[1] = 1
    library: str
    source: str
    recipe: str | None = None
    model: ModelSpec
    vq: TokenizerNote | None = None
    text: TextConfig | None = None
    sample: SampleConfig = SampleConfig()
    """The recipe's way to draw."""
    license: str | None = None
    """Of the weights, as the hub writes it: ``cc-by-sa-4.0``."""


@dataclass(frozen=True)
class ModelBundle:
    """The files of one model and of what it is used with: where each lies."""

    where: str
    """Named in errors; of a model on the hub with the commit: ``hf://owner/name@COMMIT``."""
    model: str
    vq: str | None
    text: TextConfig | None
    text_folder: str
    sample: SampleConfig
    recipe: str | None
    root: str | None = None
    """The storage of the run that the model belongs to."""
    extracted: str = "orders"
    """The folder there with the extracted orders that belong to the model."""
    fetched: str | None = None
    """Of a model on the hub: the local folder with its files."""
    license: str | None = None
    """Of the weights, where the exported folder says it."""
    read_only: bool = False
    """Whoever draws writes nothing beside these files (``OrderFiles.read_only``)."""

    @property
    def folder(self) -> str:
        """Where the files lie."""
        return self.fetched or self.where

    @property
    def orders(self) -> OrderFiles:
        """The files that order policies read."""
        files = folder_files(self.folder) if self.root is None else run_files(self.root, self.extracted)
        return replace(files, read_only=self.read_only)


def find_bundle(path: str, model: str | None = None) -> ModelBundle:
    """The bundle at ``path``: an exported folder, also on the hub, a run's folder, or a model file.

    Args:
        model: which one of a run, ``ordered`` by default (``any_order`` of a raster run, which has no other).

    Raises:
        UserError: nothing of this kind is there; of the hub, also as :class:`~oar_scale.generation.hub.HubFolder`.
    """
    if not path.startswith(HUB) and _is_run(path):
        recipe = load_recipe(join(path, RECIPE))
        name = model_name(recipe, model)
        return run_bundle(path, recipe, _run_model(path, recipe, name), recipe.orders_of(name))
    if model is not None:
        raise UserError(f"{path}: {model!r} would be one of the models of a run's folder, and this is none.")
    if path.startswith(HUB):
        return _from_hub(path)
    if path.endswith((SAFE, SAFE + INDEX)):
        path = path.removesuffix(INDEX)
        return ModelBundle(path, path, None, None, "", SampleConfig(), None)
    if open_storage(path).exists(join(path, CONFIG)):
        return _exported(path)
    raise UserError(
        f"{path}: neither an exported folder ({CONFIG}), nor a run's folder ({RECIPE}), nor a model file (.safetensors). "
        "Check the path; a checkpoint of a training becomes a folder with: oar checkpoint export"
    )


def _is_run(path: str) -> bool:
    storage = open_storage(path)
    return storage.exists(join(path, RECIPE)) and not storage.exists(join(path, CONFIG))


def read_config(folder: str, shown: str | None = None) -> FolderConfig:
    """Raises UserError for what is not the ``config.json`` of an exported folder, which errors call ``shown``."""
    uri = join(folder, CONFIG)
    try:
        return FolderConfig.model_validate_json(open_storage(uri).read(uri))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "the file"
        where = join(shown or folder, CONFIG)
        raise UserError(f"{where}: not the configuration of an exported folder ({at}: {first['msg']}). Export it again.") from error


def model_name(recipe: Recipe, model: str | None) -> str:
    """The name of the run's model that is asked for; None: the one that a run is there for."""
    return current_name(model or ("any_order" if recipe.model.layout == "raster" else "ordered"))


def run_bundle(path: str, recipe: Recipe, model: str, extracted: str = "orders") -> ModelBundle:
    """The model file ``model`` and what lies beside it in the run whose local folder is ``path``; ``extracted`` as in the bundle."""
    root = recipe.storage.root or path
    tokenizers = join(root, "tokenizers")
    vq = join(tokenizers, VQ)
    return ModelBundle(
        path,
        model,
        vq if open_storage(vq).exists(vq) else None,
        recipe.tokenizer.text,
        tokenizers,
        recipe.sample,
        recipe.name,
        root,
        extracted,
    )


def _run_model(path: str, recipe: Recipe, wanted: str) -> str:
    """The file of a run's model, if it is there."""
    root = recipe.storage.root or path
    there = {name: uri for name in recipe.models() if open_storage(uri := run_model_file(root, name)).exists(uri)}
    if wanted not in there:
        has = f"It has: {', '.join(there)}. Name one of them, or resume the run." if there else "Run its training first."
        raise UserError(f"{path}: this run has no model {wanted!r}. {has}")
    return there[wanted]


def check_codes(model: ModelSpec, vq: TokenizerSpec, where: str) -> None:
    """Check that a model and an image tokenizer use the same codes.

    Raises:
        UserError: another vocabulary, or another grid.
    """
    if model.vocab_size != vq.codebook_size:
        raise UserError(
            f"{where}: the image tokenizer has {vq.codebook_size} codes, the model a vocabulary of {model.vocab_size}. "
            "Use the tokenizer that the model was trained with."
        )
    if model.grid != vq.grid:
        fits = model.grid * vq.image_size // vq.grid
        raise UserError(
            f"{where}: the image tokenizer makes {vq.grid} x {vq.grid} codes of {vq.image_size} px, the model draws "
            f"{model.grid} x {model.grid}. Where the same tokenizer is to be used on {fits} px, import it with --image-size {fits}."
        )


def _from_hub(uri: str) -> ModelBundle:
    """Fetch what the configuration names, and nothing else: what else lies there is not looked at."""
    from oar_scale.generation.hub import HubFolder  # brings huggingface_hub

    remote = HubFolder.open(uri)
    config = read_config(os.path.dirname(remote.fetch_file(CONFIG)), str(remote.path))
    needed = [VQ] if config.vq else []
    if isinstance(config.text, SentencePieceConfig):
        needed.append(TEXT_FILE)
    if isinstance(config.text, ClipTextConfig) and is_file(config.text.weights):
        if not config.text.weights.endswith(SAFE):
            raise UserError(f"{remote.path}: {config.text.weights} may hold code. From the hub, weights are read as {SAFE} alone.")
        needed.append(_beside(config.text.weights, join(str(remote.path), CONFIG)))
    folder = remote.fetch([*MODEL_FILES, *needed, *EXTRA_FILES])
    there = set(os.listdir(folder))
    for name in (MODEL + INDEX if MODEL + INDEX in there else MODEL, *needed):
        if name not in there:
            raise UserError(
                f"{remote.path}: {name} is missing, which its {CONFIG} asks for. The repository is not complete: push it again."
            )
    return replace(_exported(folder), where=str(remote.path), fetched=folder)


def _exported(path: str) -> ModelBundle:
    config = read_config(path)
    text = config.text
    if isinstance(text, ClipTextConfig) and is_file(text.weights):
        text = text.model_copy(update={"weights": join(path, _beside(text.weights, join(path, CONFIG)))})
    vq = join(path, VQ) if config.vq else None
    return ModelBundle(path, join(path, MODEL), vq, text, path, config.sample, config.recipe, license=config.license)


def _beside(weights: str, config: str) -> str:
    """The name of a text tower's weights. Raises UserError for a path that leads elsewhere."""
    try:
        return file_name(weights)
    except ValueError as error:
        raise UserError(f"{config}: text.weights: {error}: it must lie beside the model. Export the folder again.") from error


def is_file(weights: str) -> bool:
    """Whether an open_clip ``weights`` names a file, and not one of its tags, as ``ClipText.load`` understands it."""
    return "/" in weights or bool(os.path.splitext(weights)[1])
