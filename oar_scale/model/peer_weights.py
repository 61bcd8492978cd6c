"""Weights of RandAR and LlamaGen as ours, and back: the same tensors under other names.

ARPG's: ``arpg_weights.py``, LPD's: ``lpd_weights.py``.

    theirs                           ours
    cls_embedding.*                  conditioner.*
    pos_instruct_embeddings          layout.pos_instruct_embeddings
    all others                       the same

A spec is read off the shapes. Shapes do not tell the number of heads or the grid: heads come from the peers' table of sizes
(64 channels a head, 100 for their 3B, 128 for their 7B), unless given. Several tensors have each width, and what most of
them say counts, so that a wrong tensor is named itself and not those it contradicts.

All of these (LPD does not) multiply the condition's queries and keys by zero, and LlamaGen's text models have a null that was never
trained; the spec records both, or their weights would not mean the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.model.arpg_weights import export_arpg, import_arpg
from oar_scale.model.lpd_weights import export_lpd, import_lpd
from oar_scale.model.peer_shapes import PeerShapes
from oar_scale.model.spec import ClassSpec, FeatureSpec, ModelSpec
from oar_scale.model.transformer import AnyOrderModel
from oar_scale.model.weights import model_of

Family = Literal["randar", "llamagen-c2i", "llamagen-t2i", "arpg", "lpd"]

_INSTRUCTION = "layout.pos_instruct_embeddings"
_THEIRS = {"conditioner.": "cls_embedding.", _INSTRUCTION: "pos_instruct_embeddings"}
_OWN: dict[Family, str] = {"arpg": "layers.self_dec.", "lpd": "blocks."}
"""How names of tensors begin that a family alone has, and each of its models."""
_WIDE_HEADS = {3200: 100, 4096: 128}
TEXT_ROWS = 120
"""Condition rows of LlamaGen's text models."""
GRID = 16
"""Cells per side of all peers' 256 px images."""


def import_peer(
    tensors: dict[str, Tensor],
    family: Family,
    where: str,
    *,
    grid: int | None = None,
    heads: int | None = None,
    text_rows: int = TEXT_ROWS,
    start_instructed: bool = False,
) -> AnyOrderModel:
    """A model that computes what the peer's code computes with these tensors.

    Args:
        tensors: a peer's state dict, without wrapping.
        where: names the file in errors.
        grid: cells per side; None: of the peers' 256 px images, or of LPD's table of positions, which is interpolated for another one.
        heads: attention heads; None: from the peers' table of sizes.
        text_rows: condition rows T of a text model.
        start_instructed: make an ``instructed`` model of a LlamaGen one, to continue training in any order: its position
            instruction vector, which a raster model does not have, starts as Normal(0, 0.02).

    Raises:
        UserError: a tensor is missing, unknown, or of the wrong shape; names it and both shapes.
    """
    _expect_own(tensors, family, where)
    if family == "lpd":
        return import_lpd(tensors, where, grid=grid, heads=heads)
    grid = grid or GRID
    if family == "arpg":
        return import_arpg(tensors, where, grid=grid, heads=heads)
    ours = {_renamed(name, {theirs: our for our, theirs in _THEIRS.items()}): tensor for name, tensor in tensors.items()}
    _expect_family(ours, family, where)
    spec = _spec(PeerShapes(family, where, tensors), family, grid, heads, text_rows)
    if start_instructed:
        spec = spec.model_copy(update={"layout": "instructed"})
        fresh = torch.empty(1, spec.dim).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))
        ours.setdefault(_INSTRUCTION, fresh.to(ours["tok_embeddings.weight"].dtype))
    return model_of(spec, ours, where, shown=_theirs)


def export_peer(model: AnyOrderModel, family: Family) -> dict[str, Tensor]:
    """The model's tensors under the peer's names.

    Raises:
        UserError: the peer's code cannot compute this model, with the reason.
    """
    spec = model.spec
    wanted = {
        "randar": ("instructed", "class"),
        "llamagen-c2i": ("raster", "class"),
        "llamagen-t2i": ("raster", "features"),
        "arpg": ("decoupled", "class"),
        "lpd": ("grouped", "class"),
    }[family]
    if (spec.layout, spec.condition.type) != wanted:
        raise UserError(
            f"{family} models have layout {wanted[0]} and condition {wanted[1]}; this one has layout {spec.layout} and condition "
            f"{spec.condition.type}. Export it as a folder instead (--format folder)."
        )
    if family != "lpd" and spec.condition_rotation != "zero":
        raise UserError(
            f"{family}'s code multiplies the condition's queries and keys by zero, this model was trained with them: there it would draw "
            "something else. Export it as a folder instead (--format folder)."
        )
    if family in ("arpg", "lpd") and spec.kv_heads not in (None, spec.heads):
        raise UserError(
            f"{family}'s code has as many heads of keys and values as of queries, this model {spec.kv_heads} and {spec.heads}. Export it "
            "as a folder instead (--format folder)."
        )
    if family == "lpd":
        return export_lpd(model)
    return export_arpg(model) if family == "arpg" else {_theirs(name): tensor for name, tensor in model.state_dict().items()}


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _theirs(name: str) -> str:
    return _renamed(name, _THEIRS)


def _expect_own(tensors: dict[str, Tensor], family: Family, where: str) -> None:
    """Raise UserError for a file of ARPG's or LPD's under another kind, or the other way round."""
    for other, prefix in _OWN.items():
        if family != other and any(name.startswith(prefix) for name in tensors):
            raise UserError(f"{where}: has the tensors {prefix}*, which no {family} model has. Import it as {other}.")
    if family in _OWN and not any(name.startswith(_OWN[family]) for name in tensors):
        raise UserError(
            f"{where}: has no tensor {_OWN[family]}*, which every {family} model has. Is it RandAR's (randar) or LlamaGen's (llamagen-c2i)?"
        )


def _expect_family(tensors: dict[str, Tensor], family: Family, where: str) -> None:
    """The mistakes that are easily made: a file of the sister project, or of the same project's other models."""
    if family == "randar" and _INSTRUCTION not in tensors and "tok_embeddings.weight" in tensors:
        raise UserError(
            f"{where}: has no tensor pos_instruct_embeddings, which every RandAR model has. Is it LlamaGen's? Then import it as "
            "llamagen-c2i, with --instructed if it is to learn any order."
        )
    if family != "randar" and _INSTRUCTION in tensors:
        raise UserError(f"{where}: has the tensor pos_instruct_embeddings, which no LlamaGen model has. Import it as randar.")
    other = {"llamagen-t2i": "conditioner.embedding_table.weight", "llamagen-c2i": "conditioner.cap_proj.fc1.weight"}.get(family)
    if other in tensors:
        meant = "llamagen-c2i" if family == "llamagen-t2i" else "llamagen-t2i"
        raise UserError(f"{where}: has the tensor {_theirs(str(other))}, which no {family} model has. Import it as {meant}.")


def _spec(shapes: PeerShapes, family: Family, grid: int, heads: int | None, text_rows: int) -> ModelSpec:
    first = "layers.0"
    norms = ((f"{first}.attention_norm.weight", 0), (f"{first}.ffn_norm.weight", 0))
    dim = shapes.size(("tok_embeddings.weight", 1), ("output.weight", 1), ("norm.weight", 0), *norms)
    heads = shapes.heads(dim, heads, width=_WIDE_HEADS.get(dim, 64))
    condition: ClassSpec | FeatureSpec
    if family == "llamagen-t2i":
        null_rows = shapes.size(("cls_embedding.uncond_embedding", 0))
        if null_rows < text_rows:
            raise UserError(
                f"{shapes.where}: tensor cls_embedding.uncond_embedding has {null_rows} rows, fewer than the {text_rows} condition rows "
                f"asked for. Give at most {null_rows} with --text-rows."
            )
        width = shapes.size(("cls_embedding.uncond_embedding", 1), ("cls_embedding.cap_proj.fc1.weight", 1))
        condition = FeatureSpec(width=width, rows=text_rows, null_rows=null_rows, absent="zero")
    else:
        condition = ClassSpec(classes=max(1, shapes.size(("cls_embedding.embedding_table.weight", 0)) - 1))
    kv_heads = (shapes.size((f"{first}.attention.wqkv.weight", 0)) - dim) // (2 * (dim // heads))
    feed_forward = tuple((f"{first}.feed_forward.{name}.weight", axis) for name, axis in (("w1", 0), ("w3", 0), ("w2", 1)))
    return shapes.spec(
        layout="instructed" if family == "randar" else "raster",
        dim=dim,
        layers=shapes.blocks("layers."),
        heads=heads,
        kv_heads=None if kv_heads < 1 or kv_heads >= heads or heads % kv_heads else kv_heads,
        ffn_hidden=shapes.size(*feed_forward),
        vocab_size=shapes.size(("tok_embeddings.weight", 0), ("output.weight", 0)),
        grid=grid,
        condition=condition,
        condition_rotation="zero",
        trainable_null=family != "llamagen-t2i",
    )
