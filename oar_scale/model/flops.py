"""What a model costs: floating-point operations per image, by formula.

    forward   layers (L row + 4 L^2 D)  -  (L - N) end  +  2 N D V  +  condition encoder
    row       2 D (H + 2 kv_heads) head_dim + end                    the matrices of a block, for one row
    end       2 (D^2 + 3 D F)                                        those after attention: the last block has N rows there
    L         T + N - 1 raster,  T + 2 N - 1 instructed,  T + N dual

N cells, V codes, T condition rows, D channels, H heads, F channels of the feed-forward. A multiply-add counts two. Matrix products
alone are counted: no norms, rotations, softmax or embeddings. Attention counts all L^2 pairs, as ``torch.utils.flop_counter`` does,
though causality leaves half of them; only :func:`useful_flops` does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from oar_scale.model.spec import STRIDE, FeatureSpec, ModelSpec, TextSpec


def forward_flops(spec: ModelSpec) -> int:
    """Teacher-forced forward pass of one image, its condition encoder included."""
    return _trunk(spec) + _head(spec, spec.cells) + _condition(spec)


def training_flops(spec: ModelSpec, *, recompute: bool = False) -> int:
    """Forward and backward pass of one image, as they are computed.

    The backward pass of a matrix product is two of its size; that of attention is five products for the forward's two, since it
    computes the scores again.

    Args:
        recompute: the trunk's blocks run once more in the backward pass (activation checkpointing).
    """
    rows, again = spec.rows, _trunk(spec) if recompute else 0
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
    masked = spec.layers * (_attention(spec, rows, rows) - _attention(spec, rows, rows + 1) // 2)
    return 3 * (forward_flops(spec) - masked)


def extraction_flops(spec: ModelSpec, *, guided: bool = False, sizes: Sequence[int] | None = None, first_given: bool = False) -> int:
    """Order extraction of one image: rows for all empty cells at every step, over one shared prefix (``orders/extraction.py``).

    Exactly, that is N (N + 1) / 2 candidate rows, and no others: the winner's stays. Of several cells placed at once only one was scored
    about with what is in the cache then, and the others pass through the trunk once more.

    Args:
        guided: with a second, unconditional branch through the trunk; the head sees the mixture of both. (Its condition rows, one set for
            all images, are left out.)
        sizes: how many cells each step places (``orders/step_sizes.py``); default: one.
        first_given: the first step asks about one cell only.

    Raises:
        ValueError: a raster model, which has one order.
    """
    if spec.layout == "raster":
        raise ValueError("a raster model has one order, so there is nothing to extract; layouts instructed and dual take any order")
    begin = spec.condition.rows
    trunk = begin * _block_row(spec) + _attention(spec, begin, begin)
    stride, placed, candidates = STRIDE[spec.layout], 0, 0
    for size in [1] * spec.cells if sizes is None else sizes:
        scored = 1 if first_given and not placed else spec.cells - placed
        rows = scored + (stride - 1 if placed else 0)  # an instructed model's last code row enters the cache with the candidates
        trunk += rows * _block_row(spec) + _attention(spec, rows, begin + stride * placed)
        candidates, placed = candidates + scored, placed + size
        if size > 1 and placed < spec.cells:
            rows = stride * (size - 1)
            trunk += rows * _block_row(spec) + _attention(spec, rows, begin + stride * (placed - 1) + 1)
    return _condition(spec) + (1 + guided) * spec.layers * trunk + _head(spec, candidates)


_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""Dense bfloat16 operations a second by the makers' data sheets, by a part of the GPU's name."""


def peak_flops(device: str, precision: str) -> float | None:
    """Peak operations a second of a GPU of this name; None where it is not known, and for float32."""
    return next((peak for name, peak in _PEAKS.items() if name in device), None) if precision == "bf16" else None


def _trunk(spec: ModelSpec) -> int:
    rows = spec.rows
    return spec.layers * (rows * _block_row(spec) + _attention(spec, rows, rows)) - (rows - spec.cells) * _end_row(spec)


def _block_row(spec: ModelSpec) -> int:
    """The matrices of a block, for one row."""
    return 2 * spec.dim * (spec.heads + 2 * (spec.kv_heads or spec.heads)) * spec.head_dim + _end_row(spec)


def _end_row(spec: ModelSpec) -> int:
    """The matrices of a block after attention, for one row."""
    return 2 * spec.dim * (spec.dim + 3 * spec.ffn_hidden)


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
