"""What a layout is: the rows of an image, the blocks they pass, and what they see of one another.

A layout owns all that differs between the layouts; the model has embeddings and output head, the ``Decoder`` the course of an image that
is placed cell by cell. A layout is asked for

    blocks      the trunk's blocks, which are kept under ``model.layers``
    whole       the rows that predict the codes of whole images                 training, likelihoods
    forward     rows that stay in the cache, of codes placed one after the other: prefill
    candidates  rows that each ask for a cell from the same point: extraction, generation by confidence
    parallel    rows that ask for M cells with no codes between (where ``asks_jointly``; see there)
    enter       a pass of rows that stay in the cache
    ask         a pass of candidates, behind rows that enter the cache with them
    ahead       a pass of rows and questions, each image's at a place of its own in the cache: drafts

:class:`RowLayout` has the passes of layouts whose rows all go through one stack of blocks, each seeing the rows before it. A new layout is
a class that makes its rows, and overrides passes where others are seen (``decoupled.py``: questions in a half of their own). One that has
other blocks overrides ``blocks``: ``project_into`` and ``finish`` are all that passes behind a cache ask of a block; blocks of another
family come with the spec (``ModelSpec.block``). Rows that lie nowhere else than their embedding says have the index of the identity
rotation. CONTRIBUTING.md lists the tables by layout that need an entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from oar_scale.model.blocks import Block, KVSlice, TrunkBlock
from oar_scale.model.cache import Ahead, attention_with_mask
from oar_scale.model.packed import Cache
from oar_scale.model.rope import cell_rotations
from oar_scale.model.spec import ModelSpec


class Rows(NamedTuple):
    """L rows of each image and the index into the table of rotations of each."""

    x_BLD: Tensor
    cells_BL: Tensor


def joined(rows: Sequence[Rows], dim: int) -> Rows:
    """Rows of the same images behind one another (dim 1), or rows of other images (dim 0)."""
    return Rows(*(torch.cat(parts, dim) for parts in zip(*rows, strict=True)))


def in_one_row(rows: Sequence[Rows]) -> Rows:
    """Rows of all images, one image after the other, as those of one image: [1, L]."""
    x_LD, cells_L = joined([Rows(x_BLD.flatten(0, 1), cells_BL.flatten()) for x_BLD, cells_BL in rows], dim=0)
    return Rows(x_LD[None], cells_L[None])


class Placed(NamedTuple):
    """K codes whose rows are not all in the cache yet: their cells, and the rows of their codes alone."""

    cells_BK: Tensor
    codes_BKD: Tensor

    def images(self, part: slice) -> Placed:
        """Some of the B images."""
        return Placed(self.cells_BK[part], self.codes_BKD[part])


Tables = tuple[Tensor, ...]
"""What a layout adds to a row for the cells it is about: one row of a table for each cell, or for each offset between two cells."""


class RowLayout(nn.Module):
    """Base of the layouts."""

    held: int = 0
    """Condition rows that wait for the first cell with the codes, instead of entering the cache first."""
    stride: int = 1
    """Every so many-th row of ``forward`` predicts a code, and so many rows of the cache are a cell's."""
    keeps_questions: bool = True
    """A candidate's row is, unchanged, the cache's next row if its cell wins. Else a question leaves nothing in the cache, and the winner's
    code enters it with the next questions."""
    asks_jointly: bool = True
    """The questions of a parallel step (``parallel``) see those before them, or one another all. Else they are candidates like others."""
    joint: bool = True
    """Rows that enter the cache pass the same blocks as candidates; one of them may do so in the pass of the candidates."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self._rotations: dict[torch.device, Tensor] = {}

    # -- rows -----------------------------------------------------------------------------------------------------------

    def start(self, condition_BTD: Tensor) -> Placed:
        """The substitute of the last placed code when there is none: a row, and the index of the rotation that changes nothing.

        Here nothing: a question may follow the condition directly.
        """
        batch, _, dim = condition_BTD.shape
        return Placed(self.no_cell(batch, 0, condition_BTD.device), condition_BTD.new_empty(batch, 0, dim))

    def tables(self, device: torch.device) -> Tables:
        """The learned tables, of the weights as they are."""
        return ()

    def entering(self, last: Placed) -> int:
        """Number of rows that must enter the cache before candidates are scored; see ``candidates``."""
        return 0

    def forward(self, last: Placed, cells_BK: Tensor, codes_BKD: Tensor, tables: Tables | None = None) -> Rows:
        """Rows that ask for K cells, one after the other.

        Every ``stride``-th one, counted from the end, predicts the code of the next cell.
        """
        raise NotImplementedError

    def candidates(self, last: Placed, cells_BR: Tensor, tables: Tables) -> tuple[Rows | None, Rows]:
        """Rows that must enter the cache first, and one row for each of R cells."""
        raise NotImplementedError

    def parallel(self, last: Placed, cells_BM: Tensor, tables: Tables) -> Rows:
        """The rows of the codes placed last, and those that ask for M cells, which are the last M."""
        raise ValueError(
            f"layout {self.spec.layout} cannot ask for several cells in one step: only instructed, decoupled and grouped models decode in "
            "parallel"
        )

    # -- passes through the blocks ----------------------------------------------------------------------------------------

    def blocks(self) -> Iterable[TrunkBlock]:
        """The trunk's blocks, drawn anew."""
        return (Block(self.spec) for _ in range(self.spec.layers))

    def whole(
        self,
        layers: Iterable[nn.Module],
        condition_BTD: Tensor,
        order_BN: Tensor,
        codes_BND: Tensor,
        groups: Sequence[int] | None = None,
    ) -> Tensor:
        """The rows [B, N, D] that predict the codes of whole images, as they leave the blocks.

        Args:
            codes_BND: the codes' rows in the order of generation.
            groups: cells of each step, where a layout asks for several together; None: one.
        """
        self.one_by_one(groups)
        # The layout makes rows of the codes; the condition rows that it does not hold back come before them.
        x_BLD, cells_BL = self(self.start(condition_BTD), order_BN, codes_BND)
        head = self.head(condition_BTD)
        x_BLD, cells_BL = torch.cat([head.x_BLD, x_BLD], dim=1), torch.cat([head.cells_BL, cells_BL], dim=1)
        rotation_BLP2 = self.rotated(cells_BL)
        # The last block finishes only the rows that predict a code: every stride-th behind the condition.
        predicting = slice(head.x_BLD.shape[1], None, self.stride)
        *before, last = layers
        for layer in before:
            x_BLD = layer(x_BLD, rotation_BLP2, causal=True)
        leaving_BND: Tensor = last(x_BLD, rotation_BLP2, causal=True, leaving=predicting)
        return leaving_BND

    def enter(self, layers: Iterable[nn.Module], cache: Cache, rows: Rows, groups: Sequence[int] | None = None) -> Tensor:
        """Run L rows that see the cache and one another, and write them behind the rows in use.

        Args:
            groups: sizes of groups of rows, L in all: a row sees its own group and those before. None: groups of one, that is causally.

        Returns:
            The rows [B, L, D] as they leave the blocks.
        """
        x, rotation_BLP2 = rows.x_BLD, self.rotated(rows.cells_BL)
        new = cache.entering(x.shape[1], groups)
        for index, layer in enumerate(cast("list[Block]", layers)):
            q, _ = layer.project_into(new.into(index), x, rotation_BLP2)
            x = layer.finish(x, new.attend(index, q))
        return x

    def ask(self, layers: Iterable[nn.Module], cache: Cache, entering: Rows | None, candidates: Rows) -> Tensor:
        """Candidate rows [B, R, D] as they leave the blocks: each sees the cache, the row that enters it (one at most) and itself.

        Their keys and values are written behind those of the cache and of the row that enters.
        """
        count = candidates.x_BLD.shape[1]
        together = candidates if entering is None else joined([entering, candidates], dim=1)
        x, rotation_BLP2 = together.x_BLD, self.rotated(together.cells_BL)
        before = x.shape[1] - count
        new = cache.asking(before, count)
        for index, layer in enumerate(cast("list[Block]", layers)):
            q, own = layer.project_into(new.into(index), x, rotation_BLP2)
            x = layer.finish(x, new.attend(index, q, own))
        return x[:, before:]

    def ahead(self, layers: Iterable[nn.Module], cache: Ahead, rows: Rows, questions: Rows) -> Tensor:
        """Rows, and behind them questions, [B, L, D] as they leave the blocks: each sees what it may of the cache, and itself."""
        return self._ahead(layers, cache, joined([rows, questions], dim=1))

    def _ahead(self, layers: Iterable[nn.Module], cache: Ahead, rows: Rows) -> Tensor:
        """Rows through blocks that write keys and values."""
        x, rotation_BLP2, seen_B1LC = rows.x_BLD, self.rotated(rows.cells_BL), cache.seen(itself=True)
        for index, layer in enumerate(cast("list[Block]", layers)):
            _, batch, heads, _, width = cache.pairs[index].shape
            new = KVSlice(*cache.pairs.new_empty(2, batch, heads, x.shape[1], width))
            q, _ = layer.project_into(new, x, rotation_BLP2)
            cache.write(index, new)
            x = layer.finish(x, attention_with_mask(q, KVSlice(*cache.pairs[index]), seen_B1LC))
        return x

    # -- what all of them have ------------------------------------------------------------------------------------------

    def one_by_one(self, groups: Sequence[int] | None) -> None:
        """Raise ValueError where a layout that asks for one cell after the other is given groups of them."""
        if groups is not None:
            raise ValueError(
                f"a model of layout {self.spec.layout} asks for one cell after the other: only grouped ones take groups of cells"
            )

    def head(self, condition_BTD: Tensor) -> Rows:
        """The condition rows that come before all others: all but those that are held back."""
        head_BTD = condition_BTD[:, : condition_BTD.shape[1] - self.held]
        return Rows(head_BTD, self.no_cell(head_BTD.shape[0], head_BTD.shape[1], head_BTD.device))

    def reset_parameters(self) -> None:
        """Draw the layout's own vectors anew."""
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, 0.0, 0.02)

    def rotations(self, device: torch.device) -> Tensor:
        """The table of cell rotations [N + 1, P, 2]: float32 and outside the state dict, whatever the weights' dtype."""
        # No buffer: ``model.to(bfloat16)`` would round the angles, and a checkpoint would store them.
        if device not in self._rotations:
            spec = self.spec
            with torch.inference_mode(False):  # a table made while a caller samples in inference mode must also serve training
                self._rotations[device] = cell_rotations(
                    spec.grid, spec.head_dim, spec.rope_base, device, zero_condition=spec.condition_rotation == "zero"
                )
        return self._rotations[device]

    @staticmethod
    def one_behind(last: Placed, cells_BK: Tensor, codes_BKD: Tensor) -> Rows:
        """The rows of the codes placed last and of K more but the last: each is there when the next code is asked for."""
        return Rows(torch.cat([last.codes_BKD, codes_BKD[:, :-1]], dim=1), torch.cat([last.cells_BK, cells_BK[:, :-1]], dim=1))

    def rotated(self, cells_BL: Tensor) -> Tensor | None:
        """The rotations [B, L, P, 2] of rows; None where nothing rotates."""
        return self.rotations(cells_BL.device)[cells_BL]

    def no_cell(self, batch: int, rows: int, device: torch.device) -> Tensor:
        """The index, for [B, L] rows, of the rotation of rows that lie nowhere."""
        return torch.full((batch, rows), self.spec.cells, dtype=torch.long, device=device)
