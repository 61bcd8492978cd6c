"""Several cells of a known order in one pass, each image of a batch at a place of its own.

Of each image t codes are settled, and n codes behind them are drafts. One pass asks

    about cells t .. t + n             in turn, each knowing the drafts before it: exact, as far as these drafts are right
    about the W cells after them       as candidates, each knowing all drafts and no other candidate

    rows of an instructed model   x_t-1, p_t, x_t, ..., p_t+n | p_t+n+1, p_t+n+2, ...       one block of the cache, new in each pass
    of a decoupled, grouped one   x_t-1, x_t, ..., x_t+n-1    | p_t, p_t+1, ..., p_t+n+1, p_t+n+2, ...

There a question is no row that others see: questions in turn and candidates are of one kind, and each sees the codes up to
its own place or up to the last draft.

A row's place in the cache is a function of its cell's place in the order, so what a wrong draft leaves behind is overwritten, and
nothing is moved. Where rows end is a tensor, not a number of the program: images of different lengths need no padding, and every pass
has one shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oar_scale.model.cache import Ahead
from oar_scale.model.decoding import Decoder, image_chunks
from oar_scale.model.row_layout import Placed, Rows
from oar_scale.model.transformer import AnyOrderModel


def check_drafts(model: AnyOrderModel) -> None:
    """Raises ValueError for a layout that cannot ask for cells ahead."""
    if model.spec.layout == "raster":
        raise ValueError("layout raster cannot draft cells: it asks for no cell but the next one")


class WindowDecoder:
    """The cache of B images along their orders, and questions about the cells ahead."""

    def __init__(self, model: AnyOrderModel, condition_BTD: Tensor, sequence_BN: Tensor, width: int) -> None:
        """
        Args:
            sequence_BN: the order of each image.
            width: W, the most drafts that can be checked in a pass.

        Raises:
            ValueError: a layout that cannot ask for cells ahead.
        """
        check_drafts(model)
        layout = model.layout
        self.model, self.sequence_BN, self.width = model, sequence_BN, width
        self.decoder = Decoder(model)
        self.length = layout.stride * (width + 1) + (width if layout.keeps_questions else 2 * width + 1)
        self.prefix = self.decoder.begin(condition_BTD, spare=self.length)
        self.prefix.cache[:, :, :, :, self.prefix.rows :] = 0  # rows that are not seen count with weight 0, which NaN would survive
        assert isinstance(self.prefix.rows, int)
        # What lies before the first code: the layout's own substitute for it, or the last condition row, which is then computed again.
        start = self.prefix.last.codes_BKD
        self.begin = self.prefix.rows - 1 + start.shape[1]
        self.first_B1D = start if start.shape[1] else condition_BTD[:, -1:]

    def prefill(self, codes_BK: Tensor) -> None:
        """Fill the cache for the codes of the first K places. Those of an image that has fewer may be anything."""
        self.decoder.prefill(self.prefix, self.sequence_BN[:, : codes_BK.shape[1]], codes_BK)

    def ask(self, codes_BN: Tensor, settled_B: Tensor, drafted_B: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """The trunk's normalised rows about cells ahead.

        Args:
            codes_BN: in the order of the sequence: settled ones, then drafts; the rest may be anything.
            settled_B, drafted_B: t and n of each image.
            end: at least the largest t.

        Returns:
            Rows [B, 2 W + 1, D], and the place of the cell that each is about: t .. t + W, of which those above t + n mean nothing, then
            t + n + 1 .. t + n + W. Rows for places beyond the last cell mean nothing, either.
        """
        layout, stride, asked = self.model.layout, self.model.layout.stride, self.width + 1
        ahead_A = torch.arange(asked, device=codes_BN.device)
        turn_BA = settled_B[:, None] + ahead_A
        after_BR = (settled_B + drafted_B)[:, None] + ahead_A[1:]
        place_BM = torch.cat([turn_BA, after_BR], dim=1)
        in_turn = layout(self._placed(codes_BN, settled_B - 1), *self._rows(codes_BN, turn_BA), self.prefix.tables)
        newest = self._placed(codes_BN, settled_B + drafted_B - 1)
        behind = asked if layout.keeps_questions else 0  # questions about cells in turn are among the rows in turn, or behind them
        _, questions = layout.candidates(newest, self._cells(place_BM[:, behind:]), self.prefix.tables)
        # A row in turn sees what lies before it; a question the codes before its cell, but of those none behind the drafts.
        at_BL = (self.begin + stride * settled_B)[:, None] + torch.arange(self.length, device=codes_BN.device)
        known_BM = place_BM.minimum((settled_B + drafted_B)[:, None])[:, behind:]
        upto_BQ = self.begin + stride * (known_BM + 1) - (1 if layout.keeps_questions else 0)
        upto_BL = torch.cat([at_BL[:, : stride * asked], upto_BQ], dim=1)
        x_BLD = self._run(in_turn, questions, at_BL, upto_BL, self.begin + stride * end + self.length)
        asking_BMD = torch.cat([x_BLD[:, stride - 1 : stride * behind : stride], x_BLD[:, stride * asked :]], dim=1)
        return self.model.norm(asking_BMD), place_BM

    def _run(self, in_turn: Rows, questions: Rows, at_BL: Tensor, upto_BL: Tensor, columns: int) -> Tensor:
        """The rows as they leave the trunk, [B, L, D]; the cache is looked at up to so many columns."""
        leaving_BLD = in_turn.x_BLD.new_empty(*at_BL.shape, self.model.spec.dim)
        for images in image_chunks(len(at_BL), self.length, at_BL.device):
            cache = Ahead(self.prefix.cache[:, :, images, :, :columns], at_BL[images], upto_BL[images])
            parts = (Rows(rows.x_BLD[images], rows.cells_BL[images]) for rows in (in_turn, questions))
            leaving_BLD[images] = self.model.layout.ahead(self.model.layers, cache, *parts)
        return leaving_BLD

    def _cells(self, place_BK: Tensor) -> Tensor:
        """The cells at some places of the order; that of the last place beyond it."""
        return self.sequence_BN.gather(1, place_BK.clamp(0, self.model.spec.cells - 1))

    def _rows(self, codes_BN: Tensor, place_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Cells [B, K] and rows of codes [B, K, D] at some places of the order."""
        codes_BK = codes_BN.gather(1, place_BK.clamp(0, self.model.spec.cells - 1))
        return self._cells(place_BK), self.model.code_rows(codes_BK).to(self.prefix.cache.dtype)

    def _placed(self, codes_BN: Tensor, place_B: Tensor) -> Placed:
        """The code at a place of the order, or what lies before the first one."""
        cells_B1, rows_B1D = self._rows(codes_BN, place_B[:, None])
        before_B1 = (place_B < 0)[:, None]
        return Placed(cells_B1.masked_fill(before_B1, self.model.spec.cells), torch.where(before_B1[:, :, None], self.first_B1D, rows_B1D))
