"""Layout ``decoupled``: placed codes pass the first half of the blocks, questions the second (ARPG, arXiv 2503.10568).

    content      [c_1 .. c_T,  x_1, x_2, ..., x_{N-1}]     self-attention, causal: n / 2 blocks
                      |            one norm, one projection to keys and values
    questions    [q, q, ..., q]                            cross-attention to them: n / 2 blocks without keys and values

A question is one learned vector; its queries are rotated by the cell it asks for, in each block of the second half. The i-th question
(i from 0) sees the T + i rows of what was placed before, and nobody sees a question. So a code's row and a question cost half of
the blocks each, any number of cells may be asked for behind one prefix without a mask, and a question that wins leaves nothing: its code is
the next row of content. The cache holds n / 2 + 1 pairs of keys and values, the last of which is what questions see.

Keys of condition rows are not rotated, which makes absolute positions known. Where there is one condition row, or where keys of the
condition are zero (``condition_rotation: zero``, as in ARPG's code), nothing about the first code can depend on the cell that is asked
for: all cells of an empty image get the same row, to the last bit, and whoever chooses among them breaks a tie (``orders.selection``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from oar_scale.model.blocks import Block, CrossBlock, KVSlice, SharedKV, TrunkBlock
from oar_scale.model.cache import Ahead, attention_with_mask
from oar_scale.model.conditioning import Embedding
from oar_scale.model.packed import Cache
from oar_scale.model.row_layout import Placed, RowLayout, Rows, Tables
from oar_scale.model.spec import ModelSpec


class DecoupledRows(RowLayout):
    """Rows of content, and questions that all begin alike."""

    keeps_questions = False
    asks_jointly = False
    joint = False

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        # The second row is the drop token of ARPG's table, which nothing uses: with it models have the published sizes, and their files
        # come back bit for bit.
        self.question = Embedding(2, spec.dim)
        self.shared = SharedKV(spec)
        self.depth = spec.layers // 2  # of each half

    # -- rows -----------------------------------------------------------------------------------------------------------

    def entering(self, last: Placed) -> int:
        """Each code placed last has a row of its own."""
        return last.cells_BK.shape[1]

    def forward(self, last: Placed, cells_BK: Tensor, codes_BKD: Tensor, tables: Tables | None = None) -> Rows:
        """The row of each code but the last, behind those of the codes placed before."""
        return self.one_behind(last, cells_BK, codes_BKD)

    def candidates(self, last: Placed, cells_BR: Tensor, tables: Tables) -> tuple[Rows | None, Rows]:
        """The rows of the codes placed last, and a question for each cell."""
        entering = Rows(last.codes_BKD, last.cells_BK) if self.entering(last) else None
        return entering, Rows(self._questions(cells_BR, last.codes_BKD.dtype), cells_BR)

    def _questions(self, cells_BR: Tensor, dtype: torch.dtype) -> Tensor:
        """A row [B, R, D] for each cell."""
        questions_BRD: Tensor = self.question(torch.zeros_like(cells_BR))
        return questions_BRD.to(dtype)

    def rotated(self, cells_BL: Tensor) -> Tensor:
        """The rotations [B, L, P, 2] of rows."""
        return self.rotations(cells_BL.device)[cells_BL]

    # -- passes through the blocks ----------------------------------------------------------------------------------------

    def blocks(self) -> Iterable[TrunkBlock]:
        """Self-attention in the first half, cross-attention in the second."""
        yield from (Block(self.spec) for _ in range(self.depth))
        yield from (CrossBlock(self.spec) for _ in range(self.depth))

    def whole(
        self,
        layers: Iterable[nn.Module],
        condition_BTD: Tensor,
        order_BN: Tensor,
        codes_BND: Tensor,
        groups: Sequence[int] | None = None,
    ) -> Tensor:
        """The questions [B, N, D] in the order of generation, as they leave the blocks."""
        self.one_by_one(groups)
        head, content = self.head(condition_BTD), self(self.start(condition_BTD), order_BN, codes_BND)
        x_BLD = torch.cat([head.x_BLD, content.x_BLD], dim=1)
        rotation_BLP2 = self.rotated(torch.cat([head.cells_BL, content.cells_BL], dim=1))
        first, second = self._halves(layers)
        for layer in first:
            x_BLD = layer(x_BLD, rotation_BLP2, causal=True)
        keys, values = self.shared(x_BLD, rotation_BLP2)
        questions_BND, asked_BNP2 = self._questions(order_BN, x_BLD.dtype), self.rotated(order_BN)
        for layer in second:
            questions_BND = layer(questions_BND, asked_BNP2, keys, values)
        return questions_BND

    def enter(self, layers: Iterable[nn.Module], cache: Cache, rows: Rows, groups: Sequence[int] | None = None) -> Tensor:
        """As :meth:`RowLayout.enter`, through the first half; the last pair of the cache is what questions see."""
        x_BLD = super().enter(self._halves(layers)[0], cache, rows, groups)
        cache.behind(self.depth, x_BLD.shape[1]).write(*self.shared(x_BLD, self.rotated(rows.cells_BL)))
        return x_BLD

    def ask(self, layers: Iterable[nn.Module], cache: Cache, entering: Rows | None, candidates: Rows) -> Tensor:
        """Candidate rows [B, R, D] after the second half. Nothing enters with them: ``joint`` is False."""
        x_BRD, rotation_BRP2 = candidates.x_BLD, self.rotated(candidates.cells_BL)
        seen = cache.looking()
        for layer in cast("list[CrossBlock]", self._halves(layers)[1]):
            q_BHRd = layer.project(x_BRD, rotation_BRP2)
            x_BRD = layer.finish(x_BRD, seen.attend(self.depth, q_BHRd))
        if self.spec.blind_start:
            # Equal but for rounding, which depends on the place in the batch: the first cell's row is made that of all of them.
            x_BRD = cache.alike_if(self.spec.condition.rows, x_BRD)
        return x_BRD

    def ahead(self, layers: Iterable[nn.Module], cache: Ahead, rows: Rows, questions: Rows) -> Tensor:
        """As :meth:`RowLayout.ahead`, but questions write nothing, and see only rows."""
        first, second = self._halves(layers)
        count = rows.x_BLD.shape[1]
        content, asking = cache.rows(slice(count)), cache.rows(slice(count, None))
        x_BLD = self._ahead(first, content, rows)
        content.write(self.depth, KVSlice(*self.shared(x_BLD, self.rotated(rows.cells_BL))))
        shared, seen_B1QC = KVSlice(*cache.pairs[self.depth]), asking.seen(itself=False)
        x_BQD, rotation_BQP2 = questions.x_BLD, self.rotated(questions.cells_BL)
        for layer in cast("list[CrossBlock]", second):
            q_BHQd = layer.project(x_BQD, rotation_BQP2)
            x_BQD = layer.finish(x_BQD, attention_with_mask(q_BHQd, shared, seen_B1QC))
        return torch.cat([x_BLD, x_BQD], dim=1)

    def _halves(self, layers: Iterable[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
        """The blocks of content, and those of questions."""
        every = list(layers)
        return every[: self.depth], every[self.depth :]
