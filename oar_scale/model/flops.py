"""What a model costs: floating-point operations per image, by formula.

    forward   layers (L row + 4 L^2 D)  -  (L - N) end  +  2 N D V  +  condition encoder
    row       2 D (H + 2 kv_heads) head_dim + end                    the matrices of a block, for one row
    end       2 (D^2 + 3 D F),  grouped 2 (D^2 + 2 D F)              those after attention: the last block has N rows there
    L         T + N - 1 raster,  T + 2 N - 1 instructed and grouped,  T + N dual

    decoupled, L = T + N - 1:   n/2 (L row + 4 L^2 D)  +  L share  +  n/2 (N (row - share) + 4 L^2 D)  +  2 N D V  +  condition encoder
    share     2 D 2 kv_heads head_dim                                keys and values, which the second half does not make

N cells, V codes, T condition rows, D channels, H heads, F channels of the feed-forward. A multiply-add counts two. Matrix products
alone are counted: no norms, rotations, softmax or embeddings. Attention counts all L^2 pairs, as ``torch.utils.flop_counter`` does,
though causality leaves half of them; only :func:`useful_flops` does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from oar_scale.model.spec import HELD, STRIDE, FeatureSpec, ModelSpec, TextSpec


def forward_flops(spec: ModelSpec) -> int:
    """Teacher-forced forward pass of one image, its condition encoder included."""
    return _trunk(spec, spec.cells) + _head(spec, spec.cells) + _condition(spec)


def training_flops(spec: ModelSpec, *, recompute: bool = False) -> int:
    """Forward and backward pass of one image, as they are computed.

    The backward pass of a matrix product is two of its size; that of attention is five products for the forward's two, since it
    computes the scores again.

    Args:
        recompute: the trunk's blocks run once more in the backward pass (activation checkpointing).
    """
    rows, again = spec.rows, _blocks(spec, spec.cells) if recompute else 0
    backward = 2 * (forward_flops(spec) - _frozen_input(spec)) + _frozen_input(spec)
    scores_again = spec.layers * _attention(spec, rows, rows) // 2
    if isinstance(spec.condition, TextSpec):
        scores_again += spec.condition.encoder_layers * _attention(spec, spec.condition.rows, spec.condition.rows) // 2
    return forward_flops(spec) + backward + scores_again + again


def useful_flops(spec: ModelSpec) -> int:
    """The operations that training on one image needs, without recomputation, for model FLOPs utilisation (MFU).

    Three times the forward pass, with the L (L + 1) / 2 pairs that causality leaves; neither recomputed blocks nor recomputed scores.
    """
    rows = spec.rows
    causal = _attention(spec, rows, rows + 1) // 2
    seen = spec.layers * causal
    # The i-th question of a decoupled or grouped model sees the condition and the i codes before it; of a grouped one itself, too.
    asking = _attention(spec, 1, spec.cells * (2 * spec.condition.rows + spec.cells - 1) // 2)
    if spec.decoupled:
        seen = spec.layers // 2 * (causal + asking)
    elif spec.grouped:
        content = rows - spec.cells
        seen = spec.layers * (_attention(spec, content, content + 1) // 2 + asking + _attention(spec, 1, spec.cells))
    return 3 * (forward_flops(spec) - spec.layers * _attention(spec, rows, rows) + seen)


def extraction_flops(spec: ModelSpec, *, guided: bool = False, sizes: Sequence[int] | None = None, first_given: bool = False) -> int:
    """Order extraction of one image: rows for all empty cells at every step, over one shared prefix (``orders/extraction.py``).

    Exactly, that is N (N + 1) / 2 candidate rows, and no others but those of the codes: the winner's stays. Of several cells placed at once
    only one was scored about with what is in the cache then, and the others pass through the trunk once more.

    Args:
        guided: with a second, unconditional branch through the trunk; the head sees the mixture of both. (Its condition rows, one set for
            all images, are left out.)
        sizes: how many cells each step places (``orders/step_sizes.py``); default: one.
        first_given: the first step asks about one cell only.

    Raises:
        ValueError: a raster model, which has one order.
    """
    if spec.layout == "raster":
        raise ValueError("a raster model has one order, so there is nothing to extract; the other layouts take any order")
    begin = spec.condition.rows
    trunk = _entering(spec, begin, begin)
    stride, placed, candidates = STRIDE[spec.layout], 0, 0
    for size in [1] * spec.cells if sizes is None else sizes:
        scored = 1 if first_given and not placed else spec.cells - placed
        enters = int(placed > 0 and spec.layout != "dual")  # the row of the last code, before the candidates
        trunk += _entering(spec, enters, begin + stride * placed) + _asking(spec, scored, begin + stride * placed)
        candidates, placed = candidates + scored, placed + size
        if size > 1 and placed < spec.cells:
            kept = not (spec.decoupled or spec.grouped)  # the question of the last cell
            trunk += _entering(spec, stride * (size - 1), begin + stride * (placed - 1) + kept)
    return _condition(spec) + (1 + guided) * trunk + _head(spec, candidates)


def brute_force_flops(spec: ModelSpec, *, guided: bool = False, sizes: Sequence[int] | None = None, first_given: bool = False) -> int:
    """The same orders by a sequence of its own for every candidate (``orders.extraction.brute_force_orders``).

    The condition encoder is left out: it has run for the orders that these are compared with. The output head sees the last row of a
    sequence, the candidate's. Both branches have one: their logits are mixed.

    Args:
        guided, sizes, first_given: as of :func:`extraction_flops`.
    """
    placed, trunk, candidates = 0, 0, 0
    for size in [1] * spec.cells if sizes is None else sizes:
        scored = 1 if first_given and not placed else spec.cells - placed
        trunk += scored * _trunk(spec, placed + 1)
        candidates, placed = candidates + scored, placed + size
    return (1 + guided) * (trunk + _head(spec, candidates))


class DrawingStep(NamedTuple):
    """What one pass of drawing an image costs."""

    flops: int
    """Operations, of both branches under guidance."""
    rows: int
    """Rows of each branch that pass the trunk."""
    keys: int
    """Rows of each branch's cache that they attend to."""


def drawing_steps(spec: ModelSpec, sizes: Sequence[int], *, guided: bool = False, ordered: bool = False) -> list[DrawingStep]:
    """The passes that draw one image (``generation/sampling.py``): that of the condition, then one for each step.

    By confidence a step asks about all empty cells, as extraction does, and the output head sees those that are placed once more, to draw
    their codes. Along a given order a step asks about the cells that it places.

    Args:
        sizes: how many cells each step places (``orders.step_sizes.cells_per_step``).
        guided: with a second, unconditional branch through the trunk; the head sees the mixture of both.
        ordered: along a given order, as a raster model always draws.
    """
    ordered = ordered or spec.layout == "raster"
    jointly, keeps_questions = spec.layout in ("instructed", "grouped"), not (spec.decoupled or spec.grouped)
    cached, waiting, left = spec.condition.rows - HELD[spec.layout], 0, spec.cells
    steps = [DrawingStep(_condition(spec) + (1 + guided) * _entering(spec, cached, cached), cached, cached)]
    for size in sizes:
        asked = size if ordered else left
        enters = _waiting_rows(spec, waiting)
        keys, rows = cached + enters, enters + asked
        if ordered and size > 1 and jointly:  # questions of a parallel step are in the cache for as long as it takes
            keys += size
            trunk = _entering(spec, rows, keys)
        else:
            trunk = _entering(spec, enters, keys) + _asking(spec, asked, keys)
        cached, waiting, left = cached + enters + keeps_questions, size, left - size
        if not ordered and left:  # of several cells the others did not see the first: they pass the trunk once more
            again, waiting = STRIDE[spec.layout] * (size - 1), 1
            cached, rows = cached + again, rows + again
            trunk += _entering(spec, again, cached)
        steps.append(DrawingStep((1 + guided) * trunk + _head(spec, asked + (0 if ordered else size)), rows, keys))
    return steps


def look_ahead_flops(spec: ModelSpec, sizes: Sequence[int], samples: int, candidates: int | None) -> int:
    """What score ``info_gain`` adds to :func:`extraction_flops` of one image (``orders/look_ahead.py``).

    Args:
        sizes: how many cells each step places.
        samples: codes tried in each cell; 0: the vocabulary.
        candidates: cells looked at in a step at most; None: all that are empty.
    """
    begin, stride, placed, operations = spec.condition.rows, STRIDE[spec.layout], 0, 0
    keeps_questions = not (spec.decoupled or spec.grouped)
    for size in sizes:
        left = spec.cells - placed
        asked = min(candidates or left, left)
        seen = begin + stride * (placed + 1)
        # A hypothesis writes the question of its cell and, in all layouts but dual, its code before the questions about the others.
        each = _entering(spec, int(keeps_questions), begin + stride * placed + 1) + _entering(spec, int(spec.layout != "dual"), seen)
        each += _asking(spec, left - 1, seen) + _head(spec, left - 1)
        if left > 1:
            operations += asked * ((samples or spec.vocab_size) * each) + _head(spec, asked)
        placed += size
    return operations


def _trunk(spec: ModelSpec, cells: int) -> int:
    """The trunk, for the first cells of a sequence, all codes but the last one known."""
    return _blocks(spec, cells) + (spec.rows_of(cells) * _shared_row(spec) if spec.decoupled else 0)


def _blocks(spec: ModelSpec, cells: int) -> int:
    """All blocks of it."""
    rows = spec.rows_of(cells)
    if not spec.decoupled:
        return spec.layers * (rows * _block_row(spec) + _attention(spec, rows, rows)) - (rows - cells) * _end_row(spec)
    # Questions attend as if they were as many as the keys (``CrossBlock.forward``).
    of_all = rows * _block_row(spec) + cells * (_block_row(spec) - _shared_row(spec)) + 2 * _attention(spec, rows, rows)
    return spec.layers // 2 * of_all


def _entering(spec: ModelSpec, rows: int, keys: int) -> int:
    """Rows that pass the trunk into the cache, and attend to ``keys`` rows."""
    layers = spec.layers // 2 if spec.decoupled else spec.layers
    return layers * (rows * _block_row(spec) + _attention(spec, rows, keys)) + (rows * _shared_row(spec) if spec.decoupled else 0)


def _asking(spec: ModelSpec, rows: int, keys: int) -> int:
    """Candidate rows, which attend to ``keys`` rows."""
    if not spec.decoupled:
        return _entering(spec, rows, keys)
    return spec.layers // 2 * (rows * (_block_row(spec) - _shared_row(spec)) + _attention(spec, rows, keys))


def _waiting_rows(spec: ModelSpec, codes: int) -> int:
    """Rows that enter the cache before anything is asked, where so many codes were placed by the last step (``RowLayout.entering``)."""
    match spec.layout:
        case "instructed":
            return max(0, 2 * codes - 1)
        case "decoupled" | "grouped":
            return codes
    return 0


def _block_row(spec: ModelSpec) -> int:
    """The matrices of a block, for one row."""
    return 2 * spec.dim * (spec.heads + 2 * (spec.kv_heads or spec.heads)) * spec.head_dim + _end_row(spec)


def _shared_row(spec: ModelSpec) -> int:
    """The projection to keys and values, for one row; what a question of a decoupled model does not have in its blocks."""
    return 2 * spec.dim * 2 * (spec.kv_heads or spec.heads) * spec.head_dim


def _end_row(spec: ModelSpec) -> int:
    """The matrices of a block after attention, for one row."""
    return 2 * spec.dim * (spec.dim + (3 if spec.block == "llama" else 2) * spec.ffn_hidden)


def _attention(spec: ModelSpec, queries: int, keys: int) -> int:
    """Scores and values of one block."""
    return 4 * queries * keys * spec.dim


def _head(spec: ModelSpec, rows: int) -> int:
    return 2 * rows * spec.dim * spec.vocab_size


def _condition(spec: ModelSpec) -> int:
    kind, rows = spec.condition, spec.condition.rows
    if isinstance(kind, TextSpec):
        return kind.encoder_layers * (rows * _block_row(spec) + _attention(spec, rows, rows))
    if isinstance(kind, FeatureSpec):
        return 2 * rows * spec.dim * (kind.width + spec.dim)
    return 0


def _frozen_input(spec: ModelSpec) -> int:
    """The first matrix of the feature MLP where the null is frozen too: nobody needs the gradient of its input."""
    kind = spec.condition
    return 2 * kind.rows * kind.width * spec.dim if isinstance(kind, FeatureSpec) and not spec.trainable_null else 0
