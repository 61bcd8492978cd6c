"""``oar checkpoint``: weights of other projects in, ours out.

    import   RandAR, LlamaGen, LlamaGen's and MaskGIT's tokenizers  ->  a folder that ``oar_scale.load`` opens, or one file
    export   a model file, a run, or the shards of a training checkpoint  ->  such a folder, or a file that the peer's code opens

What is imported and exported again has the same bits: tensors keep their dtypes, names are all that changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from oar_scale import __version__
from oar_scale.config.schema import ClipTextConfig, FeaturesConfig, LabelsConfig, SampleConfig, SentencePieceConfig, TextConfig
from oar_scale.errors import UserError
from oar_scale.generation.parts import (
    CONFIG,
    MODEL,
    TOWER,
    VQ,
    FolderConfig,
    Parts,
    TokenizerNote,
    check_codes,
    find_parts,
    is_file,
    read_config,
)
from oar_scale.model import AnyOrderModel, ModelSpec, load_model, save_model
from oar_scale.model.conversion import TEXT_ROWS, Family, export_peer, import_peer
from oar_scale.model.spec import ClassSpec, FeatureSpec
from oar_scale.storage import join, open_storage
from oar_scale.storage.folders import new_folder
from oar_scale.tokenizers.conversion import export_llamagen_vq, export_maskgit_vq, import_llamagen_vq, import_maskgit_vq
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.peer_files import SAFE, PeerFile, Wrapping, read_peer_file, write_peer_file
from oar_scale.tokenizers.prompts import TEXT_FILE
from oar_scale.tokenizers.vq import load_vq, vq_id
from oar_scale.tokenizers.weights import read_weights, save_weights

IMAGE_SIZE = 256
"""Of both tokenizers' training, in pixels."""
GRID = 16
"""Cells per side of those images."""


@dataclass(frozen=True)
class _TokenizerKind:
    kind: str
    """What our files call it."""
    read: Callable[[dict[str, Tensor], int, str], ImageTokenizer]
    write: Callable[[Any], dict[str, Tensor]]
    wrapping: Wrapping


TOKENIZERS = {
    "llamagen-vq": _TokenizerKind("vq", import_llamagen_vq, export_llamagen_vq, "model"),
    "maskgit-vq": _TokenizerKind("maskgit_vq", import_maskgit_vq, export_maskgit_vq, "bare"),
}
TRUNKS: tuple[Family, ...] = get_args(Family)
_TRUNK_WRAPPINGS: dict[str, Wrapping] = {"randar": "bare", "llamagen-c2i": "model", "llamagen-t2i": "model"}


@dataclass(frozen=True)
class ImportOptions:
    """What a peer's file does not say about itself; None: as usual for the kind."""

    heads: int | None = None
    grid: int | None = None
    text_rows: int | None = None
    image_size: int | None = None
    instructed: bool = False


def run_import(kind: str, file: str, out: str, options: ImportOptions) -> str:
    """Convert a peer's checkpoint.

    Args:
        kind: one of ``TRUNKS`` and ``TOKENIZERS``.
        file: ``.safetensors``, ``.pt``, ``.pth`` or ``.bin``, local or ``s3://``.
        out: a new folder, or a new file ending in ``.safetensors``; for a tokenizer, also a folder that a model was imported to.

    Returns:
        ``out``.

    Raises:
        UserError: the file cannot be used, an option does not apply or contradicts it, or something is at ``out`` already.
    """
    _check_options(kind, options)
    if kind in TOKENIZERS:
        return _import_tokenizer(kind, file, out, options)
    family = next(each for each in TRUNKS if each == kind)
    found = read_peer_file(file)
    model = import_peer(
        found.tensors,
        family,
        found.where,
        grid=_grid(options.grid, found),
        heads=options.heads,
        text_rows=options.text_rows or _setting(found, "cls_token_num") or TEXT_ROWS,
        start_instructed=options.instructed,
    )
    if out.endswith(SAFE):
        _refuse_existing(out)
        save_model(out, model)
        return out
    with new_folder(out, last=CONFIG) as folder:
        save_model(join(folder, MODEL), model)
        _write_config(folder, FolderConfig(library=_library(), source=f"{kind}: {file}", model=model.spec, text=_told(model.spec)))
    return out


def run_export(source: str, out: str, form: str = "folder", name: str | None = None) -> str:
    """Write a model for use elsewhere.

    Args:
        source: a model file, an exported or a run's folder, or a training checkpoint (``.../step-00000100``).
        out: a new folder, or a new file whose ending says how a peer's format is stored.
        form: ``folder``, or one of ``TRUNKS`` and ``TOKENIZERS``.
        name: which model of a run; default ``ordered``.

    Returns:
        ``out``.

    Raises:
        UserError: there is nothing to export at ``source``, the peer's code cannot compute it, or something is at ``out`` already.
    """
    if form in TOKENIZERS:
        return _export_tokenizer(source, out, form)
    if form in TRUNKS:
        family = next(each for each in TRUNKS if each == form)
        _, model = _open(source, name, as_stored=True)
        write_peer_file(out, export_peer(model, family), _TRUNK_WRAPPINGS[form])
        return out
    with new_folder(out, last=CONFIG) as folder:
        _fill(folder, source, name)
    return out


def _fill(folder: str, source: str, name: str | None) -> None:
    """The files of an exported folder."""
    parts, model = _open(source, name, as_stored=True)
    if parts is None or not parts.model:
        save_model(join(folder, MODEL), model)
    else:
        open_storage(parts.model).download(parts.model, join(folder, MODEL))
    vq = load_vq(parts.vq) if parts and parts.vq else None
    if parts and vq is not None:
        check_codes(model.spec, vq.spec, parts.where)
        open_storage(str(parts.vq)).download(str(parts.vq), join(folder, VQ))
    config = FolderConfig(
        library=_library(),
        source=f"{source}: {os.path.splitext(os.path.basename(parts.model))[0]}" if parts and parts.model else source,
        recipe=parts.recipe if parts else None,
        model=model.spec,
        vq=_note(vq) if vq else None,
        text=_copy_text(parts, folder) if parts else None,
        sample=parts.sample if parts else SampleConfig(),
    )
    _write_config(folder, config)


def _open(source: str, name: str | None, *, as_stored: bool) -> tuple[Parts | None, AnyOrderModel]:
    """The model of a source, and the parts that lie beside it; of a training checkpoint, the parts of the run it belongs to."""
    raise NotImplementedError
