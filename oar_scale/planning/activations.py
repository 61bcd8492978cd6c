"""Activation memory of training, by formula, in bytes: all that is held besides parameters, their gradients and the optimizer's state.

One block, for each row of the sequence
(D channels, F of the feed-forward, H heads and G of keys and values, d channels each, e bytes a number):

    kept           its input D e, both normed inputs 2 D e, the sum between them D e, queries, keys and values (H + 2 G) d e,
                   attention's output H d e and its log-sum-exp 4 H, gate and up 2 F e, two scales 8, two dropout masks 2 D
    selective      its input D e, the outputs of its matrix products ((H + 2 G) d + 2 D + 2 F) e, attention's output and log-sum-exp
    full           its input D e
    working        the backward pass of the feed-forward: three of its width, one of D                     (3 F + D) e

Blocks of a grouped model have one tensor of the feed-forward's width (before its GELU) where the others have gate and up, one again in
their backward pass, and two numbers a norm where they have one scale.

A block of the questions of a decoupled model has its N rows where another has the rows of the sequence, and no keys and values: those
that all of them share are kept once, with the norm before them.

``none``, ``selective`` and ``full`` are the kinds of activation checkpointing (``none`` keeps everything: the first row). After its
attention the last block continues with the N rows that predict a code only. The head's logits exist for a chunk of rows at a time
(``model/loss.py``). ``trace.py`` measures the same by running the model; the two agree to a few per cent
(tests/planning/test_activation_memory.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from oar_scale.config.schema import Layout
from oar_scale.model.spec import FeatureSpec, ModelSpec, TextSpec
from oar_scale.planning.shape import block_parameters, parameters

Precision = Literal["bf16", "fp32"]
Checkpointing = Literal["none", "selective", "full"]
BYTES: dict[Precision, int] = {"bf16": 2, "fp32": 4}

CHUNK_NUMBERS = {"cpu": 2**22, "cuda": 2**27}
"""``model.loss.CHUNK_NUMBERS``, which this module cannot import without torch; a test compares them."""
ROWS_AT_ONCE = {"cpu": 512, "cuda": 2**16}
"""``model.decoding.ROWS_AT_ONCE``, likewise."""
SCORE_BLOCK = {"cpu": (512, 2048), "cuda": (2**13, 2**14)}
"""``orders.scores.BLOCK``, likewise."""
TABLES: dict[Layout, Callable[[int], int]] = {
    "raster": lambda grid: 0,
    "instructed": lambda grid: grid * grid,
    "dual": lambda grid: grid * grid + (2 * grid - 1) ** 2,
    "decoupled": lambda grid: 0,
    "grouped": lambda grid: grid * grid,
}
"""Rows of a layout's position tables as a function of the grid's side; each is stored with its rotation in float32."""
GPU_HEAD = 8
"""Flash attention on a GPU needs a head width that is a multiple of this; heads of other widths are padded in a copy."""


class TrunkActivations(NamedTuple):
    """Bytes of condition and trunk, in the forward and the backward pass."""

    kept: int
    """After the forward pass, including the rows that go to the head."""
    peak: int
    """Maximum over both passes, without gradients of parameters."""
    late: int
    """Maximum from the first block's backward pass to the end, with the gradients of parameters that exist by then."""


class HeadActivations(NamedTuple):
    """Bytes of the output head and its loss."""

    working: int
    """While the loss is computed: a chunk's logits, and the gradients so far."""
    kept: int
    """Afterwards: the gradient of the head's weight. (That of the rows counts with the trunk's backward pass.)"""


def trunk(spec: ModelSpec, micro_batch: int, precision: Precision, checkpointing: Checkpointing) -> TrunkActivations:
    """The formula of the module's docstring for a micro-batch, through all layers, the condition and the embeddings."""
    block = _BlockActivations(spec, micro_batch, BYTES[precision])
    ending = _QuestionActivations(spec, micro_batch, BYTES[precision]) if spec.decoupled else block
    # Blocks whose rows all leave them, and those at the end, where only the rows that predict a code do.
    ends = spec.layers // 2 if spec.decoupled else 1
    whole = spec.layers - ends
    rows, cells = block.rows, block.cells
    inputs = whole * rows * block.row  # of all blocks, which every kind of checkpointing keeps
    base = _surroundings(spec, micro_batch, block.e)
    out = cells * (2 * block.row + block.scale)  # what leaves the last block, its scale, and the normed rows
    # What a block keeps beside its input, and what its backward pass computes again.
    middle, last = (_kept_and_computed_again(each, checkpointing, rows, leaving) for each, leaving in ((block, rows), (ending, cells)))
    shared = rows * (2 * block.row + 4 + block.kv) if spec.decoupled else 0
    # Three moments compete for the peak: the last block's backward pass (everything is still kept), a middle block's, the first block's
    # (least activations, but the gradients of all other blocks).
    before = inputs + whole * middle.kept  # kept once the last blocks are done
    kept = base + before + shared + ends * (ending.input + last.kept) + out
    in_last = kept + cells * block.row + last.again + block.working(cells)
    in_middle = base + before + rows * block.row + middle.again + block.working(rows) if whole else 0
    # Gradients come block by block, that of the embeddings last; the head's is counted with the loss.
    counts = parameters(spec)
    of_blocks = (counts.blocks - block_parameters(spec)) * block.e
    all_but_head = (counts.total - spec.vocab_size * spec.dim) * block.e
    in_first = base + 2 * rows * block.row + block.kept(rows, rows) + block.working(rows) + of_blocks
    at_end = base + 2 * rows * block.row + all_but_head
    return TrunkActivations(kept, max(in_last, in_middle), max(in_first if whole else in_last, at_end))


def head(spec: ModelSpec, micro_batch: int, precision: Precision, *, gpu: bool) -> HeadActivations:
    """Bytes of the loss, computed in chunks of rows as ``model/loss.py`` does."""
    e, rows, weight = BYTES[precision], micro_batch * spec.cells, spec.vocab_size * spec.dim
    chunk = max(1, min(rows, CHUNK_NUMBERS["cuda" if gpu else "cpu"] // spec.vocab_size)) * spec.vocab_size
    d_rows = rows * spec.dim * e
    if precision == "fp32":
        return HeadActivations(working=chunk * 4 + d_rows + weight * 4, kept=weight * 4)
    # The float32 copy of the logits, the errors in bfloat16, a product that is added to the gradient in float32.
    return HeadActivations(working=chunk * (2 + 4 + 2) + d_rows + weight * (4 + 2), kept=weight * 2)


def padding(spec: ModelSpec, micro_batch: int, precision: Precision, checkpointing: Checkpointing) -> int:
    """Bytes that a GPU keeps in addition where heads are no multiple of :data:`GPU_HEAD`: padded queries, keys, values and outputs."""
    wider = -(-spec.head_dim // GPU_HEAD) * GPU_HEAD
    if wider == spec.head_dim or checkpointing == "full":
        return 0
    heads = spec.heads + 2 * (spec.kv_heads or spec.heads)
    numbers = heads * (wider - spec.head_dim) + spec.heads * wider
    return spec.layers * micro_batch * spec.rows * numbers * BYTES[precision]


def decoding(spec: ModelSpec, images: int, precision: Precision, *, gpu: bool) -> tuple[int, int]:
    """Bytes of the KV cache, and of a pass over the candidates of all cells, when orders are extracted or images are drawn.

    Args:
        images: sequences that go through the model at once; guidance doubles them.
    """
    e, device = BYTES[precision], "cuda" if gpu else "cpu"
    kv = (spec.kv_heads or spec.heads) * spec.head_dim
    capacity = spec.rows + 1 - (spec.cells if spec.grouped else 0)  # rows of the sequence with its last code, and no questions
    if gpu:
        capacity += -(-spec.cells // 8)  # static buffers have room for candidates that fill up (model/cache.py)
    cache = spec.cached_pairs * 2 * images * capacity * kv * e
    rows = min(images, max(1, ROWS_AT_ONCE[device] // spec.cells)) * spec.cells
    # In a feed-forward: the inputs and outputs of attention, seven rows of D before and after it, three (GELU: two) rows of its own width.
    # Questions of a decoupled model have no keys and values, and nothing enters with them.
    width = spec.heads * spec.head_dim + 6 * spec.dim + (0 if spec.decoupled else 2 * kv + spec.dim)
    width += (3 if spec.block == "llama" else 2) * spec.ffn_hidden
    outputs = images * spec.cells * spec.dim * e
    tables = TABLES[spec.layout](spec.grid) * (spec.dim * e + spec.head_dim * 4)
    block_rows, block_codes = SCORE_BLOCK[device]
    logits = min(block_rows, images * spec.cells) * min(block_codes, spec.vocab_size) * (e + 4)
    return cache, outputs + tables + max(rows * width * e, logits)


class _Block(NamedTuple):
    """Bytes of one block beside its input."""

    kept: int
    again: int
    """Computed again in its backward pass."""


def _kept_and_computed_again(block: _BlockActivations, checkpointing: Checkpointing, attending: int, leaving: int) -> _Block:
    everything, outputs = block.kept(attending, leaving), block.outputs(attending, leaving)
    match checkpointing:
        case "full":
            return _Block(0, everything)
        case "selective":
            # What is computed again lies beside the outputs in the backward pass, with a row more.
            return _Block(outputs, everything - outputs + leaving * block.row)
    return _Block(everything, 0)


class _BlockActivations:
    """Bytes of one block for a micro-batch, by the table of the module's docstring.

    ``attending`` rows take part in attention, ``leaving`` rows go through the feed-forward: fewer in the last block.
    """

    def __init__(self, spec: ModelSpec, micro_batch: int, e: int) -> None:
        self.e, self.masks = e, 2 * spec.dim if spec.dropout else 0
        self.rows, self.cells = micro_batch * spec.rows, micro_batch * spec.cells
        self.row = spec.dim * e
        self.kv = 2 * (spec.kv_heads or spec.heads) * spec.head_dim * e
        self.qkv = spec.dim * e + self.kv
        self.out = spec.dim * e + 4 * spec.heads
        self.scale = 4 if spec.block == "llama" else 8
        self.hidden = spec.ffn_hidden * e
        self.gated, self.again = (2 * self.hidden, 3 * self.hidden) if spec.block == "llama" else (self.hidden, self.hidden)
        self.copied = self.row  # the rows that leave are gathered out of attention's output
        self.input = self.rows * self.row

    def kept(self, attending: int, leaving: int) -> int:
        """Everything but the input."""
        taken = leaving * self.copied if leaving < attending else 0
        before = attending * (self.row + self.scale + self.qkv + self.out)
        return before + taken + leaving * (2 * self.row + self.scale + self.gated + self.masks)

    def outputs(self, attending: int, leaving: int) -> int:
        """Outputs of matrix products and of attention."""
        return attending * (self.qkv + self.out) + leaving * (2 * self.row + self.gated)

    def working(self, leaving: int) -> int:
        """Temporary memory of the feed-forward's backward pass."""
        return leaving * (self.again + self.row)


class _QuestionActivations(_BlockActivations):
    """Of the second half of a decoupled model: N rows, whose queries and attention are filled up to the number of keys."""

    def __init__(self, spec: ModelSpec, micro_batch: int, e: int) -> None:
        super().__init__(spec, micro_batch, e)
        self.input = self.cells * self.row

    def kept(self, attending: int, leaving: int) -> int:
        """Everything but the input, and the keys and values that all blocks share."""
        taken = leaving * self.copied if leaving < attending else 0
        return attending * (self.row + self.out) + taken + leaving * (3 * self.row + 8 + self.gated + self.masks)

    def outputs(self, attending: int, leaving: int) -> int:
        """Outputs of matrix products and of attention."""
        return attending * self.out + leaving * (3 * self.row + self.gated)


def _surroundings(spec: ModelSpec, micro_batch: int, e: int) -> int:
    """Condition, embeddings, indices and positions."""
    questions = spec.cells if spec.decoupled else 0
    indices = micro_batch * 8 * (spec.rows + 4 * spec.cells + questions)
    embedded = micro_batch * spec.cells * spec.dim * (1 if spec.dropout else 0)
    if spec.grouped:  # a mask, and the rows before the norm that all of them pass
        positions = spec.rows * spec.rows * e + micro_batch * spec.rows * (spec.dim * e + 8)
    else:
        positions = micro_batch * (spec.rows + questions) * spec.head_dim * 4
    return positions + indices + embedded + _condition(spec, micro_batch, e)


def _condition(spec: ModelSpec, micro_batch: int, e: int) -> int:
    """Rows of the condition, and the blocks of a text encoder that is trained along."""
    rows = micro_batch * spec.condition.rows
    match spec.condition:
        case TextSpec() as kind:
            block = _BlockActivations(spec, micro_batch, e)
            return rows * 3 * spec.dim * e + kind.encoder_layers * (rows * spec.dim * e + block.kept(rows, rows))
        case FeatureSpec() as kind:
            return rows * (kind.width * (4 + e) + 3 * spec.dim * e)
    return rows * spec.dim * e
