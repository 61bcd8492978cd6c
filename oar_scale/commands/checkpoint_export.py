"""``oar checkpoint export``: our weights for use elsewhere.

A model file, a run, or the shards of a training checkpoint become a folder that ``oar_scale.load`` opens, or a file that the code of
another project (RandAR, LlamaGen, ARPG, LPD, MaskGIT) opens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from oar_scale.commands.peer_formats import TOKENIZERS, TRUNKS, model_family, require_unused
from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import SampleConfig, SentencePieceConfig
from oar_scale.distributed.checkpoints.layout import checkpoint_locations, is_step_uri
from oar_scale.distributed.checkpoints.whole_model import checkpoint_weights, whole_model
from oar_scale.errors import UserError
from oar_scale.generation.exported_folder import complete_folder, copy_model, implied_prompts
from oar_scale.generation.folder_files import CONFIG, MODEL, VQ
from oar_scale.generation.model_bundle import RECIPE, ModelBundle, find_bundle, run_bundle
from oar_scale.model import AnyOrderModel, ModelSpec, load_model
from oar_scale.model.peer_weights import Family, export_peer
from oar_scale.model.spec import TextSpec
from oar_scale.model.weights import SHARD_BYTES, save_tensors
from oar_scale.storage import absolute, join, open_storage
from oar_scale.storage.folders import new_folder
from oar_scale.tokenizers.peer_files import SAFE, Wrapping, write_peer_file
from oar_scale.tokenizers.prompts import TEXT_FILE
from oar_scale.tokenizers.safetensors_file import read_weights
from oar_scale.tokenizers.vq import load_vq

if TYPE_CHECKING:
    from oar_scale.generation.hub import HubPath  # brings huggingface_hub

_WRAPPINGS: dict[Family, Wrapping] = {
    "randar": "bare",
    "llamagen-c2i": "model",
    "llamagen-t2i": "model",
    "arpg": "model",
    "lpd": "model",
}


def export_checkpoint(
    source: str, out: str, form: str = "folder", name: str | None = None, *, average: bool = False, license_id: str | None = None
) -> str:
    """Write a model, or an image tokenizer, for use elsewhere.

    Args:
        source: a model file, an exported or a run's folder, or a training checkpoint (``.../step-00000100``).
        out: a new folder, or a new file whose ending says how a peer's format is stored.
        form: ``folder``, or one of ``TRUNKS`` and ``TOKENIZERS``.
        name: which model of a run; default ``ordered``.
        average: of a training checkpoint, the moving average of the weights.
        license_id: of a folder's weights, as the hub writes it: ``cc-by-sa-4.0``.

    Returns:
        ``out``.

    Raises:
        UserError: there is nothing to export at ``source``, the peer's code cannot compute it, or something is at ``out`` already.
    """
    _refuse_unused(source, form, name, license_id, average=average)
    if form in TOKENIZERS:
        _export_tokenizer(source, require_unused(out), form)
    elif form in TRUNKS:
        require_unused(out)
        model = whole_model(source, average=average) if is_step_uri(source) else _load(_bundle(source, name, average))
        write_peer_file(out, export_peer(model, model_family(form)), _WRAPPINGS[model_family(form)])
    else:
        with new_folder(out, last=CONFIG) as folder:
            _export_folder(folder, source, name, average, license_id)
    return out


def _refuse_unused(source: str, form: str, name: str | None, license_id: str | None, *, average: bool) -> None:
    """Raise UserError for an option that would do nothing."""
    if license_id is not None and form != "folder":
        raise UserError(f"--license means nothing with --format {form}, which has no model card: leave it out")
    if form in TOKENIZERS and (name is not None or average):
        raise UserError(
            f"{'--ema' if average else '--model'} means nothing with --format {form}, the run's one image tokenizer: leave it out"
        )
    if name is not None and is_step_uri(source):
        raise UserError(
            f"--model means nothing of a training checkpoint, which holds one model: leave it out, or name the run for {name!r}"
        )


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
    root, _, stage, _ = absolute(checkpoint).rstrip("/").rsplit("/", 3)
    recipe, vq, text = join(root, RECIPE), join(root, "tokenizers", VQ), join(root, "tokenizers", TEXT_FILE)
    storage = open_storage(checkpoint)
    if storage.exists(recipe):
        made = load_recipe(recipe)
        return run_bundle(root, made, checkpoint, next((each.orders for each in made.stages() if each.name == stage), "orders"))
    text_config = implied_prompts(spec)
    if isinstance(spec.condition, TextSpec) and storage.exists(text):
        text_config = SentencePieceConfig(max_tokens=spec.condition.rows)
    return ModelBundle(
        checkpoint, checkpoint, vq if storage.exists(vq) else None, text_config, join(root, "tokenizers"), SampleConfig(), None
    )


def push_checkpoint(
    source: str, uri: str, name: str | None = None, *, average: bool = False, private: bool | None = None, license_id: str | None = None
) -> str:
    """Export a model as a folder, and publish that on the Hugging Face hub in one commit.

    Args:
        source, name, average, license_id: as of :func:`export_checkpoint`.
        uri: ``hf://owner/name[@branch][/folder]``.
        private: of a new repository; None: as the account says.

    Returns:
        The URI of the commit.

    Raises:
        UserError: as :func:`export_checkpoint`, and :func:`~oar_scale.generation.hub.publish`.
    """
    from oar_scale.generation.hub import publish  # brings huggingface_hub

    _refuse_unused(source, "folder", name, license_id, average=average)

    def fill(folder: str, public: HubPath) -> None:
        _export_folder(folder, source, name, average, license_id, public)

    return publish(uri, fill, private=private)


def _export_folder(
    folder: str, source: str, name: str | None, average: bool, license_id: str | None, public: HubPath | None = None
) -> None:
    """Fill a local folder."""
    if is_step_uri(source):
        with checkpoint_weights(source, average=average) as (spec, tensors):
            bundle = _bundle_of_checkpoint(source, spec)
            save_tensors(join(folder, MODEL), spec, tensors, shard_bytes=SHARD_BYTES)
    else:
        bundle = _bundle(source, name, average)
        spec = copy_model(bundle, folder)
    complete_folder(folder, bundle, spec, license_id=license_id, public=public)


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
