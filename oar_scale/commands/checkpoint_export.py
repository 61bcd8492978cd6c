"""``oar checkpoint export``: our weights for use elsewhere.

A model file, a run, or the shards of a training checkpoint become a folder that ``oar_scale.load`` opens, or a file that the code of
another project (RandAR, LlamaGen, ARPG, LPD, MaskGIT) opens.
"""

from __future__ import annotations

import os

from oar_scale.commands.peer_formats import (
    TOKENIZERS,
    TRUNKS,
    implied_prompts,
    library_version,
    model_family,
    require_unused,
    tokenizer_note,
    write_config,
)
from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import ClipTextConfig, SampleConfig, SentencePieceConfig, TextConfig
from oar_scale.distributed.checkpoints.layout import checkpoint_locations, is_step_uri
from oar_scale.distributed.checkpoints.whole_model import checkpoint_weights, whole_model
from oar_scale.errors import UserError
from oar_scale.generation import model_bundle
from oar_scale.generation.model_bundle import (
    CONFIG,
    MODEL,
    RECIPE,
    VQ,
    FolderConfig,
    ModelBundle,
    check_codes,
    find_bundle,
    run_bundle,
)
from oar_scale.model import AnyOrderModel, ModelSpec, load_model, model_id
from oar_scale.model.peer_weights import Family, export_peer
from oar_scale.model.spec import TextSpec
from oar_scale.model.weights import SHARD_BYTES, copy_weights, open_model, save_tensors
from oar_scale.orders.head import read_head, tables_id
from oar_scale.orders.order_files import folder_files, head_file
from oar_scale.orders.policies.mean import mean_order
from oar_scale.storage import Missing, join, open_storage
from oar_scale.storage.folders import new_folder
from oar_scale.tokenizers.peer_files import SAFE, Wrapping, write_peer_file
from oar_scale.tokenizers.prompts import TEXT_FILE
from oar_scale.tokenizers.safetensors_file import file_damage, read_weights
from oar_scale.tokenizers.vq import load_vq

_WRAPPINGS: dict[Family, Wrapping] = {
    "randar": "bare",
    "llamagen-c2i": "model",
    "llamagen-t2i": "model",
    "arpg": "model",
    "lpd": "model",
}


def export_checkpoint(source: str, out: str, form: str = "folder", name: str | None = None, *, average: bool = False) -> str:
    """Write a model, or an image tokenizer, for use elsewhere.

    Args:
        source: a model file, an exported or a run's folder, or a training checkpoint (``.../step-00000100``).
        out: a new folder, or a new file whose ending says how a peer's format is stored.
        form: ``folder``, or one of ``TRUNKS`` and ``TOKENIZERS``.
        name: which model of a run; default ``ordered``.
        average: of a training checkpoint, the moving average of the weights.

    Returns:
        ``out``.

    Raises:
        UserError: there is nothing to export at ``source``, the peer's code cannot compute it, or something is at ``out`` already.
    """
    if form in TOKENIZERS:
        _export_tokenizer(source, require_unused(out), form)
    elif form in TRUNKS:
        require_unused(out)
        model = whole_model(source, average=average) if is_step_uri(source) else _load(_bundle(source, name, average))
        write_peer_file(out, export_peer(model, model_family(form)), _WRAPPINGS[model_family(form)])
    else:
        with new_folder(out, last=CONFIG) as folder:
            _fill(folder, source, name, average)
    return out


def _load(bundle: ModelBundle) -> AnyOrderModel:
    return load_model(bundle.model, as_stored=True)


def _bundle(source: str, name: str | None, average: bool) -> ModelBundle:
    """The files at ``source`` that is no checkpoint of a training."""
    steps = [location.uri for location in checkpoint_locations(source) if location.committed] if "checkpoints" in source.split("/") else []
    if steps:
        raise UserError(f"{source}: holds the checkpoints of a training. Name one of them, the newest is {steps[-1]}")
    if average:
        raise UserError(
            f"{source}: --ema is for a training checkpoint (.../step-00000100). With ema_decay in its recipe, a run's models are averages."
        )
    return find_bundle(source, name)


def _bundle_of_checkpoint(checkpoint: str, spec: ModelSpec) -> ModelBundle:
    """The bundle of the run that ``ROOT/checkpoints/STAGE/step-N`` belongs to, as far as the storage shows it."""
    location = checkpoint if checkpoint.startswith("s3://") else os.path.abspath(checkpoint)
    root = location.rstrip("/").rsplit("/", 3)[0]
    recipe, vq, text = join(root, RECIPE), join(root, "tokenizers", VQ), join(root, "tokenizers", TEXT_FILE)
    storage = open_storage(checkpoint)
    if storage.exists(recipe):
        return run_bundle(root, load_recipe(recipe), checkpoint)
    text_config = implied_prompts(spec)
    if isinstance(spec.condition, TextSpec) and storage.exists(text):
        text_config = SentencePieceConfig(max_tokens=spec.condition.rows)
    return ModelBundle(
        checkpoint, checkpoint, vq if storage.exists(vq) else None, text_config, join(root, "tokenizers"), SampleConfig(), None
    )


def _fill(folder: str, source: str, name: str | None, average: bool) -> None:
    """The files of an exported folder."""
    target = join(folder, MODEL)
    if is_step_uri(source):
        with checkpoint_weights(source, average=average) as (spec, tensors):
            bundle = _bundle_of_checkpoint(source, spec)
            save_tensors(target, spec, tensors, shard_bytes=SHARD_BYTES)
    else:
        bundle = _bundle(source, name, average)
        spec = _copy_model(bundle, target)
        _copy_head(bundle, join(folder, head_file(MODEL)))
    if bundle.sample.order == "mean":
        mean_order(bundle.orders, spec.grid)  # makes the file where there is none yet
    _copy_if_there(bundle.orders.mean, folder_files(folder).mean)
    note = None
    if bundle.vq is not None:
        vq = load_vq(bundle.vq)
        check_codes(spec, vq.spec, bundle.where)
        _copy(bundle.vq, join(folder, VQ))
        note = tokenizer_note(vq)
    config = FolderConfig(
        library=library_version(),
        source=bundle.model,
        recipe=bundle.recipe,
        model=spec,
        vq=note,
        text=_copy_text(bundle, folder) or implied_prompts(spec),
        sample=bundle.sample,
    )
    write_config(folder, config)


def _copy_model(bundle: ModelBundle, target: str) -> ModelSpec:
    """Copy a model, in its stored dtypes: it keeps its id, and its order head."""
    spec, stored = open_model(bundle.model)
    if len(stored.files) == 1 and stored.bytes <= SHARD_BYTES:
        _copy(stored.uri, target)  # the same bytes
        if damage := file_damage(target):
            raise UserError(damage)
    else:
        copy_weights(stored, target, shard_bytes=SHARD_BYTES)
    return spec


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
        _copy(uri, target)


def _copy_if_there(source: str, target: str) -> None:
    if open_storage(source).exists(source):
        _copy(source, target)


def _copy_text(bundle: ModelBundle, folder: str) -> TextConfig | None:
    """Bring along what the prompt encoder needs; returns its settings as they are from the folder's point of view."""
    text = bundle.text
    if isinstance(text, SentencePieceConfig):
        _copy(join(bundle.text_folder, TEXT_FILE), join(folder, TEXT_FILE))
        return text.model_copy(update={"weights": None})
    if isinstance(text, ClipTextConfig) and model_bundle.is_file(text.weights):
        own = model_bundle.TOWER + os.path.splitext(text.weights)[1]
        _copy(text.weights, join(folder, own))
        return text.model_copy(update={"weights": own})
    return text


def _export_tokenizer(source: str, out: str, form: str) -> None:
    uri = _tokenizer_of(source)
    stored = read_weights(uri, *(peer.stored for peer in TOKENIZERS.values()))
    if stored.kind != TOKENIZERS[form].stored:
        fits = next(name for name, peer in TOKENIZERS.items() if peer.stored == stored.kind)
        raise UserError(f"{uri}: is no tokenizer of the kind {form}. Export it as {fits}.")
    tensors = TOKENIZERS[form].write(load_vq(uri))
    write_peer_file(out, {**tensors, **stored.tensors}, TOKENIZERS[form].wrapping)


def _tokenizer_of(source: str) -> str:
    if source.endswith(SAFE):
        return source
    recipe = join(source, RECIPE)
    if open_storage(source).exists(recipe):  # a run has its tokenizer long before it has a model
        vq = run_bundle(source, load_recipe(recipe), "").vq
    else:
        vq = find_bundle(source).vq
    if vq is None:
        raise UserError(f"{source}: has no image tokenizer.")
    return vq


def _copy(uri: str, path: str) -> None:
    if not open_storage(uri).exists(uri):
        raise Missing(uri)
    open_storage(uri).download(uri, path)
