"""An exported folder: all that a model needs to draw elsewhere, and how it was made.

config.json  model.safetensors  [vq.safetensors]  [text.model]  [mean-order.json]  [model.order-head.safetensors]
history.json  README.md  [order-map.png]  [samples.png]          what the run has recorded (run_history, model_card)
model_index.json  pipeline.py                                    for diffusers (diffusers_pipeline)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from oar_scale import __version__
from oar_scale.config.schema import ClipTextConfig, FeaturesConfig, LabelsConfig, SentencePieceConfig, TextConfig
from oar_scale.errors import UserError
from oar_scale.generation.folder_files import CARD, CONFIG, DIFFUSERS_CODE, DIFFUSERS_INDEX, HISTORY, MODEL, TOWER, VQ
from oar_scale.generation.model_bundle import (
    FolderConfig,
    ModelBundle,
    TokenizerNote,
    check_codes,
    is_file,
)
from oar_scale.generation.model_card import model_card
from oar_scale.generation.run_history import read_history, write_pictures
from oar_scale.model import ModelSpec, model_id
from oar_scale.model.spec import ClassSpec, FeatureSpec
from oar_scale.model.weights import SHARD_BYTES, copy_weights, open_model
from oar_scale.orders.head import read_head, tables_id
from oar_scale.orders.order_files import folder_files, head_file
from oar_scale.orders.policies.mean import mean_order
from oar_scale.storage import Missing, join, open_storage, write_json
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.prompts import TEXT_FILE
from oar_scale.tokenizers.safetensors_file import SAFE, file_damage
from oar_scale.tokenizers.vq import load_vq, vq_id

if TYPE_CHECKING:
    from oar_scale.generation.hub import HubPath  # brings huggingface_hub

_PIPELINE = "oar_scale.generation.diffusers_pipeline"
_INDEX = {"_class_name": ["pipeline", "OrderedPipeline"], "_diffusers_version": "0.42.0", "model": [_PIPELINE, "OrderedModel"]}
_CODE = f'''"""For diffusers, which loads this folder with trust_remote_code=True. Needs: pip install 'oar_scale[diffusers]'."""

from {_PIPELINE} import OrderedPipeline

__all__ = ["OrderedPipeline"]
'''


def complete_folder(
    folder: str, bundle: ModelBundle, spec: ModelSpec, *, license_id: str | None = None, public: HubPath | None = None
) -> None:
    """Put everything beside the model that is in a local folder already; ``config.json`` comes last.

    Args:
        license_id: of the weights, as the hub writes it; None: as it is known.
        public: where the folder will be published. Then nothing in it says where files lie on this machine.

    Raises:
        UserError: parts that do not fit together, a file is missing or damaged, or the licence is not written as the hub does.
    """
    if license_id is not None and not re.fullmatch("[a-z0-9][a-z0-9.+-]*", license_id):
        raise UserError(f"license {license_id!r}: the hub has names such as cc-by-sa-4.0, apache-2.0 or other")
    if bundle.sample.order == "mean":
        mean_order(bundle.orders, spec.grid)  # makes the file where there is none yet
    _copy_if_there(bundle.orders.mean, folder_files(folder).mean)
    if public and isinstance(bundle.text, ClipTextConfig) and is_file(bundle.text.weights) and not bundle.text.weights.endswith(SAFE):
        raise UserError(
            f"{bundle.text.weights}: the text tower's weights may hold code. From the hub, weights are read as {SAFE} alone, so nobody "
            "could load this model. Save them with safetensors, and name that file in tokenizer.text.weights."
        )
    note = None
    if bundle.vq is not None:
        vq = load_vq(bundle.vq)
        check_codes(spec, vq.spec, bundle.where)
        copy_file(bundle.vq, join(folder, VQ))
        note = tokenizer_note(vq)
    source = bundle.model.rpartition("/")[2] if public else bundle.model
    config = FolderConfig(
        library=library_version(),
        source=source,
        recipe=bundle.recipe,
        model=spec,
        vq=note,
        text=_copy_text(bundle, folder) or implied_prompts(spec),
        sample=bundle.sample,
        license=license_id or bundle.license,
    )
    history = read_history(bundle)
    if history:
        write_json(join(folder, HISTORY), history)
    write_pictures(bundle, history, folder, spec.grid)
    if config.vq is not None and config.text is not None:
        write_json(join(folder, DIFFUSERS_INDEX), _INDEX)
        _write_text(join(folder, DIFFUSERS_CODE), _CODE)
    _write_text(join(folder, CARD), model_card(folder, config, history, public))
    write_config(folder, config)


def copy_model(bundle: ModelBundle, folder: str) -> ModelSpec:
    """Copy a model into a folder, in its stored dtypes: it keeps its id, and its order head."""
    target = join(folder, MODEL)
    spec, stored = open_model(bundle.model)
    if len(stored.files) == 1 and stored.bytes <= SHARD_BYTES:
        copy_file(bundle.model, target)  # the same bytes
        if damage := file_damage(target):
            raise UserError(damage)
    else:
        copy_weights(stored, target, shard_bytes=SHARD_BYTES)
    _copy_head(bundle, join(folder, head_file(MODEL)))
    return spec


def copy_file(uri: str, path: str) -> None:
    """Copy an object to a local file. Raises Missing."""
    if not open_storage(uri).exists(uri):
        raise Missing(uri)
    open_storage(uri).download(uri, path)


def implied_prompts(spec: ModelSpec) -> TextConfig | None:
    """The prompt settings that follow from the model alone; None where its prompts need an encoder that has to be named."""
    if isinstance(spec.condition, ClassSpec):
        return LabelsConfig(type="labels", classes=spec.condition.classes)
    if isinstance(spec.condition, FeatureSpec) and spec.condition.tower is None:
        return FeaturesConfig(type="features", width=spec.condition.width, rows=spec.condition.rows)
    return None


def tokenizer_note(vq: ImageTokenizer) -> TokenizerNote:
    """The entry about the image tokenizer in the configuration of an exported folder."""
    return TokenizerNote(kind=vq.kind, id=vq_id(vq), spec=vq.spec.model_dump(mode="json"))


def write_config(folder: str, config: FolderConfig) -> None:
    """Write the configuration of an exported folder, a path or ``s3://``."""
    write_json(join(folder, CONFIG), config.model_dump(mode="json"))


def library_version() -> str:
    """Name and version of this library, for the configuration of an exported folder."""
    return f"oar_scale {__version__}"


def _copy_head(bundle: ModelBundle, target: str) -> None:
    """Copy the order head if it was trained for this model and these order tables: in the exported folder a stale one would go unnoticed.

    Raises:
        UserError: it is not, and the recipe draws with it.
    """
    uri = head_file(bundle.model)
    if not open_storage(uri).exists(uri):
        return
    try:
        read_head(uri, model_id(bundle.model), tables_id(bundle.orders))
    except UserError:
        if bundle.sample.order == "order-head":
            raise
    else:
        copy_file(uri, target)


def _copy_if_there(source: str, target: str) -> None:
    if open_storage(source).exists(source):
        copy_file(source, target)


def _copy_text(bundle: ModelBundle, folder: str) -> TextConfig | None:
    """Bring along what the prompt encoder needs; returns its settings as they are from the folder's point of view."""
    text = bundle.text
    if isinstance(text, SentencePieceConfig):
        copy_file(join(bundle.text_folder, TEXT_FILE), join(folder, TEXT_FILE))
        return text.model_copy(update={"weights": None})
    if isinstance(text, ClipTextConfig) and is_file(text.weights):
        own = TOWER + (SAFE if text.weights.endswith(SAFE) else ".pt")  # which says how it is read
        copy_file(text.weights, join(folder, own))
        return text.model_copy(update={"weights": own})
    return text


def _write_text(path: str, text: str) -> None:
    open_storage(path).write(path, text.encode())
