"""``oar checkpoint import``: weights of other projects as ours.

RandAR, LlamaGen, ARPG, LPD, LlamaGen's and MaskGIT's tokenizers become a folder that ``oar_scale.load`` opens, or one file. Tensors keep
their dtypes and only their names change (and how ARPG's are cut), so what is imported and exported again has the same bits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from oar_scale.commands.peer_formats import (
    TOKENIZERS,
    TRUNKS,
    model_family,
    require_unused,
)
from oar_scale.errors import UserError
from oar_scale.generation.exported_folder import implied_prompts, library_version, tokenizer_note, write_config
from oar_scale.generation.folder_files import CONFIG, MODEL, VQ
from oar_scale.generation.model_bundle import FolderConfig, check_codes, read_config
from oar_scale.model import save_model
from oar_scale.model.peer_weights import TEXT_ROWS, import_peer
from oar_scale.model.weights import SHARD_BYTES
from oar_scale.storage import join, open_storage
from oar_scale.storage.folders import new_folder
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.peer_files import SAFE, PeerFile, read_peer_file
from oar_scale.tokenizers.safetensors_file import save_weights

IMAGE_SIZE = 256
"""Side in pixels of the images that both tokenizers were trained on."""


@dataclass(frozen=True)
class ImportOptions:
    """Settings that the file of another project does not contain; None: the usual value for its kind."""

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


def import_checkpoint(kind: str, file: str, out: str, options: ImportOptions) -> str:
    """Convert the checkpoint of another project.

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
    peer_file = read_peer_file(file)
    if kind in TOKENIZERS:
        _import_tokenizer(kind, peer_file, out, options)
        return out
    model = import_peer(
        peer_file.tensors,
        model_family(kind),
        peer_file.where,
        grid=_grid(peer_file, options.grid),
        heads=options.heads,
        text_rows=options.text_rows or _setting(peer_file, "cls_token_num") or TEXT_ROWS,
        start_instructed=bool(options.instructed),
    )
    if out.endswith(SAFE):
        save_model(require_unused(out), model)
        return out
    with new_folder(out, last=CONFIG) as folder:
        save_model(join(folder, MODEL), model, shard_bytes=SHARD_BYTES)
        write_config(
            folder, FolderConfig(library=library_version(), source=f"{kind}: {file}", model=model.spec, text=implied_prompts(model.spec))
        )
    return out


def _import_tokenizer(kind: str, peer_file: PeerFile, out: str, options: ImportOptions) -> None:
    peer = TOKENIZERS[kind]
    vq = peer.read(peer_file.tensors, options.image_size or IMAGE_SIZE, peer_file.where)
    if out.endswith(SAFE):
        return _save_tokenizer(require_unused(out), vq, peer_file)
    if not open_storage(out).exists(join(out, CONFIG)):
        raise UserError(f"{out}: no model was imported here that the tokenizer could join. Name its folder, or a file ending in {SAFE}.")
    config = read_config(out)
    if config.vq is not None:
        raise UserError(f"{out}: has an image tokenizer already ({config.vq.kind} {config.vq.id}). Import into another folder.")
    if options.image_size is None:
        vq.spec = vq.spec.model_copy(update={"image_size": config.model.grid * vq.spec.image_size // vq.spec.grid})
    check_codes(config.model, vq.spec, f"{peer_file.where} for {out}")
    _save_tokenizer(join(out, VQ), vq, peer_file)
    write_config(out, config.model_copy(update={"vq": tokenizer_note(vq)}))


def _save_tokenizer(uri: str, vq: ImageTokenizer, peer_file: PeerFile) -> None:
    """Store the file's own tensors, since ``vq`` holds them in float32 only."""
    save_weights(uri, peer_file.tensors, {"kind": vq.kind, "spec": vq.spec.model_dump_json()})


def _check_options(kind: str, options: ImportOptions) -> None:
    for name, value in asdict(options).items():
        option = f"--{name.replace('_', '-')}"
        if value is not None and kind not in _APPLIES[name]:
            raise UserError(f"{option} does not apply to {kind}, only to {', '.join(_APPLIES[name])}")
        if value is not None and value < 1:
            raise UserError(f"{option} {value} must be at least 1")


def _grid(peer_file: PeerFile, requested: int | None) -> int | None:
    """Cells per side; None: the usual. LlamaGen's training checkpoints contain them, beside the weights."""
    pixels, factor = _setting(peer_file, "image_size"), _setting(peer_file, "downsample_size")
    if not (pixels and factor):
        return requested
    if requested not in (None, pixels // factor):
        raise UserError(
            f"{peer_file.where}: was trained on {pixels} px images, which are {pixels // factor} x {pixels // factor} codes; "
            f"--grid {requested} contradicts it. Leave --grid out."
        )
    return pixels // factor


def _setting(peer_file: PeerFile, name: str) -> int | None:
    value = peer_file.settings.get(name)
    return value if isinstance(value, int) and value > 0 else None
