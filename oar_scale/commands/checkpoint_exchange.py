"""``oar checkpoint import | export``: weights of other projects in, ours out.

    import   RandAR, LlamaGen, LlamaGen's and MaskGIT's tokenizers  ->  a folder that ``oar_scale.load`` opens, or one file
    export   a model file, a run, or the shards of a training checkpoint  ->  such a folder, or a file that the peer's code opens

What is imported and exported again has the same bits: tensors keep their dtypes, names are all that changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, get_args

from torch import Tensor

from oar_scale import __version__
from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import ClipTextConfig, FeaturesConfig, LabelsConfig, SampleConfig, SentencePieceConfig, TextConfig
from oar_scale.distributed.checkpoints.layout import is_step, places
from oar_scale.distributed.checkpoints.whole_model import whole_model
from oar_scale.errors import UserError
from oar_scale.generation import model_bundle as model_bundle
from oar_scale.generation.model_bundle import (
    CONFIG,
    MODEL,
    RECIPE,
    VQ,
    FolderConfig,
    ModelBundle,
    TokenizerNote,
    check_codes,
    find_bundle,
    read_config,
    run_bundle,
)
from oar_scale.model import AnyOrderModel, ModelSpec, load_model, model_id, save_model
from oar_scale.model.peer_weights import GRID, TEXT_ROWS, Family, export_peer, import_peer
from oar_scale.model.spec import ClassSpec, FeatureSpec, TextSpec
from oar_scale.orders.head import load_head, tables_id
from oar_scale.orders.order_files import folder_files, head_file
from oar_scale.orders.policies.mean import mean_order
from oar_scale.storage import Missing, join, open_storage, write_json
from oar_scale.storage.folders import new_folder
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.maskgit_vq import MaskGITVQ
from oar_scale.tokenizers.peer_files import SAFE, PeerFile, Wrapping, read_peer_file, write_peer_file
from oar_scale.tokenizers.peer_vq import export_llamagen_vq, export_maskgit_vq, import_llamagen_vq, import_maskgit_vq
from oar_scale.tokenizers.prompts import TEXT_FILE
from oar_scale.tokenizers.safetensors_file import read_weights, save_weights
from oar_scale.tokenizers.vq import VQTokenizer, load_vq, vq_id

IMAGE_SIZE = 256
"""Side in pixels of the images that both tokenizers were trained on."""


@dataclass(frozen=True)
class _TokenizerKind:
    stored: str
    """What our own files call it."""
    read: Callable[[dict[str, Tensor], int, str], ImageTokenizer]
    write: Callable[[Any], dict[str, Tensor]]
    wrapping: Wrapping


TRUNKS: tuple[Family, ...] = get_args(Family)
TOKENIZERS = {
    "llamagen-vq": _TokenizerKind(VQTokenizer.kind, import_llamagen_vq, export_llamagen_vq, "model"),
    "maskgit-vq": _TokenizerKind(MaskGITVQ.kind, import_maskgit_vq, export_maskgit_vq, "bare"),
}
_WRAPPINGS: dict[Family, Wrapping] = {"randar": "bare", "llamagen-c2i": "model", "llamagen-t2i": "model"}


@dataclass(frozen=True)
class ImportOptions:
    """What a peer's file does not say about itself; None: as usual for its kind."""

    heads: int | None = None
    grid: int | None = None
    text_rows: int | None = None
    image_size: int | None = None
    instructed: bool | None = None
    """Make an instructed model of a raster one."""


_APPLIES: dict[str, tuple[str, ...]] = {
    "heads": TRUNKS,
    "grid": TRUNKS,
    "text_rows": ("llamagen-t2i",),
    "image_size": tuple(TOKENIZERS),
    "instructed": ("llamagen-c2i", "llamagen-t2i"),
}


def run_import(kind: str, file: str, out: str, options: ImportOptions) -> str:
    """Convert a peer's checkpoint.

    Args:
        kind: one of ``TRUNKS`` and ``TOKENIZERS``.
        file: ``.safetensors``, ``.pt``, ``.pth`` or ``.bin``, local or ``s3://``.
        out: a new file ending in ``.safetensors``; for a model a new folder; for a tokenizer the folder of a model.

    Returns:
        ``out``.

    Raises:
        UserError: the file cannot be used, an option does not apply or contradicts it, or something is at ``out`` already.
    """
    _check_options(kind, options)
    found = read_peer_file(file)
    if kind in TOKENIZERS:
        _import_tokenizer(kind, found, out, options)
        return out
    model = import_peer(
        found.tensors,
        _family(kind),
        found.where,
        grid=_grid(found, options.grid),
        heads=options.heads,
        text_rows=options.text_rows or _setting(found, "cls_token_num") or TEXT_ROWS,
        start_instructed=bool(options.instructed),
    )
    if out.endswith(SAFE):
        save_model(_unused(out), model)
        return out
    with new_folder(out, last=CONFIG) as folder:
        save_model(join(folder, MODEL), model)
        _write_config(folder, FolderConfig(library=_library(), source=f"{kind}: {file}", model=model.spec, text=_only_prompts(model.spec)))
    return out


def run_export(source: str, out: str, form: str = "folder", name: str | None = None, *, average: bool = False) -> str:
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
        _export_tokenizer(source, _unused(out), form)
    elif form in TRUNKS:
        _unused(out)
        _, model = _open(source, name, average)
        write_peer_file(out, export_peer(model, _family(form)), _WRAPPINGS[_family(form)])
    else:
        with new_folder(out, last=CONFIG) as folder:
            _fill(folder, source, name, average)
    return out


# -- models -----------------------------------------------------------------------------------------------------------------


def _open(source: str, name: str | None, average: bool) -> tuple[ModelBundle, AnyOrderModel]:
    """A source's model in its stored dtypes, and the files that lie beside it."""
    if is_step(source):
        model = whole_model(source, average=average)
        return _bundle_of_checkpoint(source, model.spec), model
    steps = [place.uri for place in places(source) if place.committed] if "checkpoints" in source.split("/") else []
    if steps:
        raise UserError(f"{source}: holds the checkpoints of a training. Name one of them, the newest is {steps[-1]}")
    if average:
        raise UserError(
            f"{source}: --ema is for a training checkpoint (.../step-00000100). A run's models are averages where its recipe says so."
        )
    bundle = find_bundle(source, name)
    return bundle, load_model(bundle.model, as_stored=True)


def _bundle_of_checkpoint(checkpoint: str, spec: ModelSpec) -> ModelBundle:
    """What the run has that ``ROOT/checkpoints/STAGE/step-N`` belongs to, as far as it can be text_config from here."""
    place = checkpoint if checkpoint.startswith("s3://") else os.path.abspath(checkpoint)
    root = place.rstrip("/").rsplit("/", 3)[0]
    recipe, vq, text = join(root, RECIPE), join(root, "tokenizers", VQ), join(root, "tokenizers", TEXT_FILE)
    storage = open_storage(checkpoint)
    if storage.exists(recipe):
        return run_bundle(root, load_recipe(recipe), checkpoint)
    text_config = _only_prompts(spec)
    if isinstance(spec.condition, TextSpec) and storage.exists(text):
        text_config = SentencePieceConfig(max_tokens=spec.condition.rows)
    return ModelBundle(
        checkpoint, checkpoint, vq if storage.exists(vq) else None, text_config, join(root, "tokenizers"), SampleConfig(), None
    )


def _fill(folder: str, source: str, name: str | None, average: bool) -> None:
    """The files of an exported folder."""
    bundle, model = _open(source, name, average)
    if bundle.model.endswith(SAFE):
        _copy(bundle.model, join(folder, MODEL))  # the same bytes: the model keeps its id, and its order head
        _copy_head(bundle, model, join(folder, head_file(MODEL)))
    else:
        save_model(join(folder, MODEL), model)
    if bundle.sample.order == "mean":
        mean_order(bundle.orders, model.spec.grid)  # is there from now on
    _copy_if_there(bundle.orders.mean, folder_files(folder).mean)
    note = None
    if bundle.vq is not None:
        vq = load_vq(bundle.vq)
        check_codes(model.spec, vq.spec, bundle.where)
        _copy(bundle.vq, join(folder, VQ))
        note = _note(vq)
    config = FolderConfig(
        library=_library(),
        source=bundle.model,
        recipe=bundle.recipe,
        model=model.spec,
        vq=note,
        text=_copy_text(bundle, folder) or _only_prompts(model.spec),
        sample=bundle.sample,
    )
    _write_config(folder, config)


def _copy_head(bundle: ModelBundle, model: AnyOrderModel, target: str) -> None:
    """The order head, if it is one of this model and of these orders: nobody could tell from the exported folder that it is an old one.

    Raises:
        UserError: it is not, and the recipe draws with it.
    """
    uri = head_file(bundle.model)
    if not open_storage(uri).exists(uri):
        return
    try:
        load_head(uri, model, model_id(bundle.model), tables_id(bundle.orders))
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


def _only_prompts(spec: ModelSpec) -> TextConfig | None:
    """The prompts of a model that leaves no choice."""
    if isinstance(spec.condition, ClassSpec):
        return LabelsConfig(type="labels", classes=spec.condition.classes)
    if isinstance(spec.condition, FeatureSpec) and spec.condition.tower is None:
        return FeaturesConfig(type="features", width=spec.condition.width, rows=spec.condition.rows)
    return None


# -- image tokenizers -------------------------------------------------------------------------------------------------------


def _import_tokenizer(kind: str, found: PeerFile, out: str, options: ImportOptions) -> None:
    peer = TOKENIZERS[kind]
    vq = peer.read(found.tensors, options.image_size or IMAGE_SIZE, found.where)
    if out.endswith(SAFE):
        return _save_tokenizer(_unused(out), vq, found)
    if not open_storage(out).exists(join(out, CONFIG)):
        raise UserError(f"{out}: no model was imported here that the tokenizer could join. Name its folder, or a file ending in {SAFE}.")
    config = read_config(out)
    if config.vq is not None:
        raise UserError(f"{out}: has an image tokenizer already ({config.vq.kind} {config.vq.id}). Import into another folder.")
    if options.image_size is None:
        vq.spec = vq.spec.model_copy(update={"image_size": config.model.grid * vq.spec.image_size // vq.spec.grid})
    check_codes(config.model, vq.spec, f"{found.where} for {out}")
    _save_tokenizer(join(out, VQ), vq, found)
    _write_config(out, config.model_copy(update={"vq": _note(vq)}))


def _save_tokenizer(uri: str, vq: ImageTokenizer, found: PeerFile) -> None:
    """The file's own tensors, which ``vq`` holds in float32 only."""
    save_weights(uri, found.tensors, {"kind": vq.kind, "spec": vq.spec.model_dump_json()})


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


def _note(vq: ImageTokenizer) -> TokenizerNote:
    return TokenizerNote(kind=vq.kind, id=vq_id(vq), spec=vq.spec.model_dump(mode="json"))


# -- options and small things -----------------------------------------------------------------------------------------------


def _check_options(kind: str, options: ImportOptions) -> None:
    for name, value in asdict(options).items():
        option = f"--{name.replace('_', '-')}"
        if value is not None and kind not in _APPLIES[name]:
            raise UserError(f"{option} does not apply to {kind}, only to {', '.join(_APPLIES[name])}")
        if value is not None and value < 1:
            raise UserError(f"{option} {value} must be at least 1")


def _grid(found: PeerFile, asked: int | None) -> int:
    """Cells per side. Weights do not tell them; LlamaGen's training checkpoints do, beside the weights."""
    pixels, factor = _setting(found, "image_size"), _setting(found, "downsample_size")
    if not (pixels and factor):
        return asked or GRID
    if asked not in (None, pixels // factor):
        raise UserError(
            f"{found.where}: was trained on {pixels} px images, which are {pixels // factor} x {pixels // factor} codes; "
            f"--grid {asked} contradicts it. Leave --grid out."
        )
    return pixels // factor


def _setting(found: PeerFile, name: str) -> int | None:
    value = found.settings.get(name)
    return value if isinstance(value, int) and value > 0 else None


def _family(kind: str) -> Family:
    return next(family for family in TRUNKS if family == kind)


def _unused(uri: str) -> str:
    if open_storage(uri).exists(uri):
        raise UserError(f"{uri}: there is a file of this name. Delete it, or choose another name.")
    return uri


def _copy(uri: str, path: str) -> None:
    if not open_storage(uri).exists(uri):
        raise Missing(uri)
    open_storage(uri).download(uri, path)


def _write_config(folder: str, config: FolderConfig) -> None:
    write_json(join(folder, CONFIG), config.model_dump(mode="json"))


def _library() -> str:
    return f"oar_scale {__version__}"
