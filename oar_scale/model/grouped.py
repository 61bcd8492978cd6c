"""Layout ``grouped``: content and questions in the same blocks; the cells of a step are asked for together (LPD, arXiv 2507.01957).

    content      [c_1 .. c_T,  x_1, x_2, ..., x_m]        a row of each code but those of the last group
    questions    [q_1, q_2, ..., q_N]                     one learned vector, and where its cell lies

    sees                   condition    content of groups before    content of its own group    questions of its own group
    code of group j            x                    x                          x
    question of group j        x                    x                                                       x

Positions are a learned table [N + 1, D] that is added to the rows, row 0 to those of the condition, before one norm that all rows pass:
nothing rotates in the blocks, which are of the family ``vit``. Of T condition rows each sees those before it.

With groups of one, a question sees what was placed before and itself: orders are extracted so, and this is what training does. A question
that wins leaves nothing in the cache; its code is a row of content that enters with the next questions. The codes of a group of several
cells enter so, too, and see one another all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from oar_scale.model.blocks import LayerNorm
from oar_scale.model.conditioning import Embedding
from oar_scale.model.row_layout import Placed, RowLayout, Rows, Tables, joined
from oar_scale.model.spec import ModelSpec


class GroupedRows(RowLayout):
    """Rows of content, and questions behind them."""

    keeps_questions = False

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.positions = Embedding(spec.cells + 1, spec.dim)
        self.question = Embedding(1, spec.dim)
        self.rows_norm = LayerNorm(spec.dim, spec.norm_eps)

    # -- rows -----------------------------------------------------------------------------------------------------------

    def head(self, condition_BTD: Tensor) -> Rows:
        """The condition rows, at position 0."""
        return self._at(self.no_cell(len(condition_BTD), condition_BTD.shape[1], condition_BTD.device), condition_BTD)

    def tables(self, device: torch.device) -> Tables:
        """The question about each cell [N, D]."""
        cells_N = torch.arange(self.spec.cells, device=device)
        return (self._at(cells_N, self._question(cells_N)).x_BLD,)

    def entering(self, last: Placed) -> int:
        """Each code placed last has a row of its own."""
        return last.cells_BK.shape[1]

    def forward(self, last: Placed, cells_BK: Tensor, codes_BKD: Tensor, tables: Tables | None = None) -> Rows:
        """The row of each code but the last, behind those of the codes placed before."""
        x_BLD, cells_BL = self.one_behind(last, cells_BK, codes_BKD)
        return self._at(cells_BL, x_BLD)

    def candidates(self, last: Placed, cells_BR: Tensor, tables: Tables) -> tuple[Rows | None, Rows]:
        """The rows of the codes placed last, and a question for each cell."""
        (questions_ND,) = tables
        entering = self._at(*last) if self.entering(last) else None
        return entering, Rows(questions_ND[cells_BR], cells_BR)

    def parallel(self, last: Placed, cells_BM: Tensor, tables: Tables) -> Rows:
        """The rows of the codes placed last, and the questions of M cells."""
        content, questions = self.candidates(last, cells_BM, tables)
        return questions if content is None else joined([content, questions], dim=1)

    def _at(self, cells_BL: Tensor, x_BLD: Tensor) -> Rows:
        """Rows at cells; the index of no cell, N, is that of position 0."""
        positions_BLD = self.positions((cells_BL + 1) % (self.spec.cells + 1)).to(x_BLD.dtype)
        return Rows(self.rows_norm(x_BLD + positions_BLD), cells_BL)

    def _question(self, cells: Tensor) -> Tensor:
        """The question [..., D] for each cell, before it lies anywhere."""
        return self.question(cells.new_zeros(1)).expand(*cells.shape, -1)

    # -- passes through the blocks ----------------------------------------------------------------------------------------

    def whole(
        self,
        layers: Iterable[nn.Module],
        condition_BTD: Tensor,
        order_BN: Tensor,
        codes_BND: Tensor,
        groups: Sequence[int] | None = None,
    ) -> Tensor:
        """The questions [B, N, D] in the order of generation, as they leave the blocks; they alone leave the last one."""
        count = order_BN.shape[1]
        group_N = self._group_of_each(groups, count, order_BN.device)
        known = count - (1 if groups is None else groups[-1])  # codes that somebody asks anything after
        no_cell_BT = self.no_cell(len(condition_BTD), condition_BTD.shape[1], condition_BTD.device)
        cells_BL = torch.cat([no_cell_BT, order_BN[:, :known], order_BN], dim=1)
        asking_BND = self._question(order_BN).to(condition_BTD.dtype)
        x_BLD, _ = self._at(cells_BL, torch.cat([condition_BTD, codes_BND[:, :known], asking_BND], dim=1))
        mask_LL = _mask(no_cell_BT.shape[1], known, group_N, x_BLD.dtype)
        *before, last = layers
        for layer in before:
            x_BLD = layer(x_BLD, None, causal=False, mask=mask_LL)
        leaving_BND: Tensor = last(x_BLD, None, causal=False, mask=mask_LL, leaving=slice(len(mask_LL) - count, None))
        return leaving_BND

    def rotated(self, cells_BL: Tensor) -> None:
        """Nothing rotates: rows carry their positions."""
        return None

    def _group_of_each(self, groups: Sequence[int] | None, count: int, device: torch.device) -> Tensor:
        """The group [N] of each cell in the order of generation."""
        if groups is None:
            return torch.arange(count, device=device)
        if min(groups, default=0) < 1 or sum(groups) != count:
            raise ValueError(f"groups {list(groups)} must be whole numbers from 1 on that sum to {count}, the cells of the order")
        # A GPU is not waited for.
        return torch.tensor([number for number, size in enumerate(groups) for _ in range(size)]).to(device, non_blocking=True)


def _mask(condition: int, known: int, group_N: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of rows [L, L]: 0 where a row (down) sees another (across), else minus infinity."""
    # Each condition row is a group of its own, before those of cells.
    content_C = torch.cat([torch.arange(-condition, 0, device=group_N.device), group_N[:known]])
    seen_CC, seen_NC, seen_NN = (
        content_C <= content_C[:, None],
        content_C < group_N[:, None],
        group_N == group_N[:, None],
    )
    seen_LL = torch.cat([torch.cat([seen_CC, seen_CC.new_zeros(len(content_C), len(group_N))], 1), torch.cat([seen_NC, seen_NN], 1)])
    return torch.zeros(seen_LL.shape, dtype=dtype, device=seen_LL.device).masked_fill_(~seen_LL, -torch.inf)
