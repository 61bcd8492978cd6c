"""ARPG's weights as ours (layout ``decoupled``), and back.

    theirs                                              ours
    embeddings.weight [V + K + 3, D]                    tok_embeddings.weight [V], then row 0 of layout.question.weight,
                                                        conditioner.embedding_table.weight [K + 1], and row 1 of layout.question
    layers.self_dec.{i}.attn.{to_q, to_k, to_v, proj}   layers.{i}.attention.{wqkv, wo}
    layers.cross_dec.{i}.attn.{to_q, proj}              layers.{n / 2 + i}.attention.{wq, wo}
    layers.*_dec.{i}.{ffn.w*, attn_norm, ffn_norm}      layers.*.{feed_forward.w*, attention_norm, ffn_norm}
    layers.norm, layers.{to_k, to_v}                    layout.shared.norm, layout.shared.wkv
    norm, head                                          norm, output

Their code zeroes the condition's queries and keys, and its sampler lets the codes of one step see one another: the spec records both.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.model.peer_shapes import PeerShapes
from oar_scale.model.spec import ClassSpec, ModelSpec
from oar_scale.model.transformer import AnyOrderModel
from oar_scale.model.weights import model_of

_TABLE = "embeddings.weight"
_EXTRA = 3
"""Rows of their table beside codes and classes: question, null class, and a drop token that is never used."""

Parts = tuple[str, ...]


def import_arpg(tensors: dict[str, Tensor], where: str, *, grid: int, heads: int | None) -> AnyOrderModel:
    """As :func:`peer_weights.import_peer`, of ARPG's class models."""
    shapes = PeerShapes("arpg", where, tensors)
    spec = _spec(shapes, grid, heads)
    shapes.expect(_shapes(spec))
    # Tables of codes, question and classes are made of one; matrices that are one here are made of several.
    codes, table = spec.vocab_size, tensors[_TABLE]
    ours = {name: torch.cat([tensors[part] for part in parts]) if len(parts) > 1 else tensors[parts[0]] for name, parts in _parts(spec)}
    ours["tok_embeddings.weight"] = table[:codes].clone()
    ours["layout.question.weight"] = torch.stack([table[codes], table[-1]])
    ours["conditioner.embedding_table.weight"] = table[codes + 1 : -1].clone()
    return model_of(spec, ours, where)


def export_arpg(model: AnyOrderModel) -> dict[str, Tensor]:
    """The model's tensors under ARPG's names."""
    ours = model.state_dict()
    question, dropped = ours["layout.question.weight"].split(1)
    theirs = {_TABLE: torch.cat([ours["tok_embeddings.weight"], question, ours["conditioner.embedding_table.weight"], dropped])}
    for name, parts in _parts(model.spec):
        # Query, key and value rows of a matrix are as many each.
        theirs |= dict(zip(parts, ours[name].chunk(len(parts)), strict=True))
    return {name: theirs[name] for name in _shapes(model.spec)}


def _parts(spec: ModelSpec) -> Iterator[tuple[str, Parts]]:
    """Our tensors, and those of theirs that make up each, their table aside."""
    half = spec.layers // 2
    for layer in range(spec.layers):
        kind, number, ours = ("self", layer, f"layers.{layer}") if layer < half else ("cross", layer - half, f"layers.{layer}")
        theirs = f"layers.{kind}_dec.{number}"
        projections = ("to_q", "to_k", "to_v") if kind == "self" else ("to_q",)
        matrix = "wqkv" if kind == "self" else "wq"
        yield f"{ours}.attention.{matrix}.weight", tuple(f"{theirs}.attn.{each}.weight" for each in projections)
        yield f"{ours}.attention.wo.weight", (f"{theirs}.attn.proj.weight",)
        yield from ((f"{ours}.feed_forward.{each}.weight", (f"{theirs}.ffn.{each}.weight",)) for each in ("w1", "w3", "w2"))
        yield f"{ours}.attention_norm.weight", (f"{theirs}.attn_norm.weight",)
        yield f"{ours}.ffn_norm.weight", (f"{theirs}.ffn_norm.weight",)
    yield "layout.shared.norm.weight", ("layers.norm.weight",)
    yield "layout.shared.wkv.weight", ("layers.to_k.weight", "layers.to_v.weight")
    yield "norm.weight", ("norm.weight",)
    yield "output.weight", ("head.weight",)


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of all of ARPG's tensors."""
    assert isinstance(spec.condition, ClassSpec)
    dim, hidden = spec.dim, spec.ffn_hidden
    shapes: dict[str, tuple[int, ...]] = {_TABLE: (spec.vocab_size + spec.condition.classes + _EXTRA, dim)}
    for _, parts in _parts(spec):
        for name in parts:
            stem = name.removesuffix(".weight").rpartition(".")[2]
            if stem.endswith("norm"):
                shapes[name] = (dim,)
            else:
                shapes[name] = {"w1": (hidden, dim), "w3": (hidden, dim), "w2": (dim, hidden), "head": (spec.vocab_size, dim)}.get(
                    stem, (dim, dim)
                )
    return shapes


def _spec(shapes: PeerShapes, grid: int, heads: int | None) -> ModelSpec:
    first, where = "layers.self_dec.0", shapes.where
    norms = ((f"{first}.attn_norm.weight", 0), (f"{first}.ffn_norm.weight", 0))
    dim = shapes.size((_TABLE, 1), ("head.weight", 1), ("norm.weight", 0), *norms)
    heads = shapes.heads(dim, heads)
    codes, rows = shapes.size(("head.weight", 0)), shapes.size((_TABLE, 0))
    classes = rows - codes - _EXTRA
    if codes < 1:
        raise UserError(f"{where}: tensor head.weight has no rows. Copy the file again.")
    if classes < 1:
        raise UserError(
            f"{where}: tensor {_TABLE} has {rows} rows for {codes} codes, classes and {_EXTRA} more. Is it another kind of checkpoint?"
        )
    return shapes.spec(
        layout="decoupled",
        dim=dim,
        layers=2 * max(shapes.blocks("layers.self_dec."), shapes.blocks("layers.cross_dec."), 1),
        heads=heads,
        ffn_hidden=shapes.size((f"{first}.ffn.w1.weight", 0), (f"{first}.ffn.w3.weight", 0), (f"{first}.ffn.w2.weight", 1)),
        vocab_size=codes,
        grid=grid,
        condition=ClassSpec(classes=classes),
        condition_rotation="zero",
        step_attention="mutual",
    )
