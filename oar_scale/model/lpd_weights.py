"""LPD's weights as ours (layout ``grouped``), and back.

    theirs                                       ours
    class_emb.weight [K, D], fake_latent [1, D]  conditioner.embedding_table.weight [K + 1, D]: the null comes last
    token_emb, head                              tok_embeddings, output
    pos_embed [1, N + 1, D]                      layout.positions.weight [N + 1, D]
    mask_token [1, 1, D]                         layout.question.weight [1, D]
    z_proj_ln, norm                              layout.rows_norm, norm
    blocks.{i}.{norm1, norm2}                    layers.{i}.{attention_norm, ffn_norm}
    blocks.{i}.attn.{qkv, proj}                  layers.{i}.attention.{wqkv, wo}
    blocks.{i}.mlp.{fc1, fc2}                    layers.{i}.feed_forward.{w1, w2}

The table of positions says how large the grid is. For another grid it is drawn out like a picture, as LPD's code does to continue at 512
pixels with the weights of 256.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from oar_scale.config.training_sections import GROUPED_EPS
from oar_scale.errors import UserError
from oar_scale.model.peer_shapes import PeerShapes
from oar_scale.model.spec import ClassSpec, ModelSpec
from oar_scale.model.transformer import AnyOrderModel
from oar_scale.model.weights import model_of

_CLASSES, _NULL, _POSITIONS, _QUESTION = "class_emb.weight", "fake_latent", "pos_embed", "mask_token"


def import_lpd(tensors: dict[str, Tensor], where: str, *, grid: int | None, heads: int | None) -> AnyOrderModel:
    """As :func:`peer_weights.import_peer`, of LPD's class models; ``grid`` None is that of the file."""
    shapes = PeerShapes("lpd", where, tensors)
    spec = _spec(shapes, heads)
    shapes.expect(_shapes(spec))
    ours = {name: tensors[theirs] for name, theirs in _names(spec)}
    ours["conditioner.embedding_table.weight"] = torch.cat([tensors[_CLASSES], tensors[_NULL]])
    ours["layout.question.weight"] = tensors[_QUESTION][0]
    positions = tensors[_POSITIONS][0]
    if grid not in (None, spec.grid):
        positions, spec = _drawn_out(positions, spec.grid, grid), spec.model_copy(update={"grid": grid})
    ours["layout.positions.weight"] = positions
    return model_of(spec, ours, where)


def export_lpd(model: AnyOrderModel) -> dict[str, Tensor]:
    """The model's tensors under LPD's names. Raises UserError where its code cannot compute this model."""
    spec, ours = model.spec, model.state_dict()
    if spec.ffn_hidden != 4 * spec.dim or spec.norm_eps != GROUPED_EPS:
        raise UserError(
            f"lpd's code has a feed-forward of four times the width and norms with an epsilon of {GROUPED_EPS:g}, this model "
            f"{spec.ffn_hidden / spec.dim:g} times and {spec.norm_eps:g}. Export it as a folder instead (--format folder)."
        )
    classes, null = ours["conditioner.embedding_table.weight"].split([len(ours["conditioner.embedding_table.weight"]) - 1, 1])
    theirs = {_CLASSES: classes, _NULL: null}
    theirs |= {_QUESTION: ours["layout.question.weight"][None], _POSITIONS: ours["layout.positions.weight"][None]}
    theirs |= {name: ours[own] for own, name in _names(spec)}
    return {name: theirs[name] for name in _shapes(spec)}


def _names(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Our names and theirs, of tensors that are the same."""
    yield from (("tok_embeddings.weight", "token_emb.weight"), ("output.weight", "head.weight"))
    modules = {"layout.rows_norm": "z_proj_ln", "norm": "norm"}
    for layer in range(spec.layers):
        ours, theirs = f"layers.{layer}", f"blocks.{layer}"
        modules |= {
            f"{ours}.attention_norm": f"{theirs}.norm1",
            f"{ours}.attention.wqkv": f"{theirs}.attn.qkv",
            f"{ours}.attention.wo": f"{theirs}.attn.proj",
            f"{ours}.ffn_norm": f"{theirs}.norm2",
            f"{ours}.feed_forward.w1": f"{theirs}.mlp.fc1",
            f"{ours}.feed_forward.w2": f"{theirs}.mlp.fc2",
        }
    yield from ((f"{own}.{part}", f"{name}.{part}") for own, name in modules.items() for part in ("weight", "bias"))


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of all of LPD's tensors."""
    assert isinstance(spec.condition, ClassSpec)
    dim, hidden, codes = spec.dim, spec.ffn_hidden, spec.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        _NULL: (1, dim),
        _POSITIONS: (1, spec.cells + 1, dim),
        _QUESTION: (1, 1, dim),
        _CLASSES: (spec.condition.classes, dim),
    }
    matrices = {"token_emb": (codes, dim), "head": (codes, dim), "qkv": (3 * dim, dim), "fc1": (hidden, dim), "fc2": (dim, hidden)}
    for _, name in _names(spec):
        module, part = name.split(".")[-2:]
        matrix = (dim, dim) if module == "proj" else matrices.get(module, (dim,))
        shapes[name] = matrix if part == "weight" else matrix[:1]
    return shapes


def _spec(shapes: PeerShapes, heads: int | None) -> ModelSpec:
    """The sizes of the model, and the grid of its table of positions."""
    dim = shapes.size(("token_emb.weight", 1), ("head.weight", 1), (_POSITIONS, 2), ("norm.weight", 0), ("norm.bias", 0))
    cells = shapes.size((_POSITIONS, 1)) - 1
    grid = math.isqrt(max(cells, 0))
    if grid < 1 or grid * grid != cells:
        raise UserError(f"{shapes.where}: tensor {_POSITIONS} has {cells + 1} rows, one and those of a square grid are expected.")
    # Where the two tables disagree, one that is as wide as the model.
    tables = [name for name in ("token_emb.weight", "head.weight") if shapes.rows(name, dim)]
    codes = shapes.rows(tables[0], dim) if tables else shapes.size(("token_emb.weight", 0))
    first = "blocks.0.mlp"
    return shapes.spec(
        layout="grouped",
        dim=dim,
        layers=shapes.blocks("blocks."),
        heads=shapes.heads(dim, heads, multiple=1),
        ffn_hidden=shapes.size((f"{first}.fc1.weight", 0), (f"{first}.fc1.bias", 0), (f"{first}.fc2.weight", 1)),
        vocab_size=max(codes, 1),
        grid=grid,
        condition=ClassSpec(classes=max(shapes.size((_CLASSES, 0)), 1)),
        norm_eps=GROUPED_EPS,
    )


def _drawn_out(positions_RD: Tensor, before: int, after: int) -> Tensor:
    """The table of positions for another grid, bicubically interpolated; row 0 lies nowhere and stays."""
    picture_1DGG = positions_RD[1:].float().t().unflatten(1, (before, before))[None]
    drawn_DGG = F.interpolate(picture_1DGG, size=(after, after), mode="bicubic", align_corners=False)[0]
    return torch.cat([positions_RD[:1], drawn_DGG.flatten(1).t().to(positions_RD.dtype)])
