"""How codes and their cells become rows: the layouts of the trunk.

    raster       [c_1 .. c_T,  x_1, x_2, ..., x_{N-1}]            next token; row x_i predicts the code of cell i + 1    (LlamaGen)
    instructed   [c_1 .. c_T,  p_1, x_1,  p_2, x_2,  ...,  p_N]   p_i asks for the cell placed i-th and predicts its code   (RandAR)
    dual         [c_1 .. c_T,  z>1, x_1>2, x_2>3, ...]            x_i>j lies at cell i and asks for j; z is a zero token    (OAR v1)
    decoupled    [c_1 .. c_T,  x_1, x_2, ..., x_{N-1}]            content, which questions q_1 .. q_N look at from a half of  (ARPG)
                                                                  the blocks of their own (``decoupled.py``)
    grouped      [c_1 .. c_T,  x_1, ..., x_m,  q_1, ..., q_N]     content, and questions that see it and those of their step   (LPD)
                                                                  (``grouped.py``)

Attention is plainly causal in the first three, which are here. A layout makes three kinds of rows, each with the cell that rotates it:

    forward      rows that ask for K cells, one after the other, knowing the code of each before the next: training, prefill
    candidates   rows that each ask for a cell from the same point: extraction, generation by confidence
    parallel     rows that ask for M cells with no codes between: RandAR's parallel decoding, and LPD's

What was placed last may still have to enter the cache (``Placed``): the code row of an instructed, decoupled or grouped model, or the row
of the last code of the others, which cannot be written before the next cell is known. What a layout has learned about cells is a few
tables (``tables``), made once for an image that is placed cell by cell. What else a layout is, and how one plugs in: ``row_layout.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oar_scale.config.schema import Layout
from oar_scale.model.decoupled import DecoupledRows
from oar_scale.model.grouped import GroupedRows
from oar_scale.model.rope import offset_index, offset_rotations, rotate_vector
from oar_scale.model.row_layout import Placed, RowLayout, Rows, Tables
from oar_scale.model.spec import HELD, STRIDE, ModelSpec

RASTER_ONLY = "a raster model places cells in raster order only; the other layouts take any order"
"""Said of any other order."""


class RasterRows(RowLayout):
    """Row by row, left to right; the last condition row predicts the first code."""

    held = HELD["raster"]

    def start(self, condition_BTD: Tensor) -> Placed:
        """The last condition row, which predicts the first code."""
        return Placed(self.no_cell(len(condition_BTD), 1, condition_BTD.device), condition_BTD[:, -1:])

    def forward(self, last: Placed, cells_BK: Tensor, codes_BKD: Tensor, tables: Tables | None = None) -> Rows:
        """The row of each code but the last, behind that of the code placed before: row i predicts code i."""
        self._require_raster(last, cells_BK)
        return self.one_behind(last, cells_BK, codes_BKD)

    def candidates(self, last: Placed, cells_BR: Tensor, tables: Tables) -> tuple[Rows | None, Rows]:
        """The row of the last code: the next cell in raster order is the only candidate."""
        self._require_raster(last, cells_BR[:, :1])
        if cells_BR.shape[1] != 1:
            raise ValueError(f"a raster model's only candidate is the next cell; it has no choice of {cells_BR.shape[1]}")
        return None, Rows(last.codes_BKD, last.cells_BK)

    def _require_raster(self, last: Placed, cells_BK: Tensor) -> None:
        """Check that the cells follow the last one in raster order; "no cell" comes before cell 0.

        A GPU is not waited for: there a wrong order fails as an index out of range does, by an assertion of the device. Compiled code does
        not look.

        Raises:
            ValueError: on a CPU, other cells.
        """
        if torch.compiler.is_compiling():
            return
        first_B1 = torch.where(last.cells_BK == self.spec.cells, 0, last.cells_BK + 1)
        follows = (cells_BK == first_B1 + torch.arange(cells_BK.shape[1], device=cells_BK.device)).all()
        if follows.device.type != "cpu":
            torch._assert_async(follows, RASTER_ONLY)
        elif not follows:
            raise ValueError(RASTER_ONLY)


class InstructedRows(RowLayout):
    """A position instruction token before each code: one learned vector, rotated by the cell it asks for."""

    stride = STRIDE["instructed"]

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.pos_instruct_embeddings = nn.Parameter(torch.empty(1, spec.dim))
        self.reset_parameters()

    def tables(self, device: torch.device) -> Tables:
        """Position instruction rows [N, D]."""
        return (rotate_vector(self.pos_instruct_embeddings, self.rotations(device)[:-1], self.spec.heads),)

    def entering(self, last: Placed) -> int:
        """2 K - 1 rows for K placed codes: all but the first bring their instruction row along."""
        return max(0, 2 * last.cells_BK.shape[1] - 1)

    def forward(self, last: Placed, cells_BK: Tensor, codes_BKD: Tensor, tables: Tables | None = None) -> Rows:
        """Instruction and code rows, alternating, ending with the instruction of the last cell."""
        (asks_ND,) = tables or self.tables(cells_BK.device)
        # The rows are p_1 x_1 p_2 x_2 ... p_K: the last code is left out, as no row asks for anything after it yet.
        pairs = torch.stack([asks_ND[cells_BK], codes_BKD], dim=2).flatten(1, 2)[:, :-1]
        return self._after(last, pairs, cells_BK.repeat_interleave(2, dim=1)[:, :-1], asks_ND)

    def candidates(self, last: Placed, cells_BR: Tensor, tables: Tables) -> tuple[Rows | None, Rows]:
        """The rows of the codes placed last, and one instruction row for each candidate cell."""
        (asks_ND,) = tables
        entering = self._after(last, last.codes_BKD[:, :0], cells_BR[:, :0], asks_ND) if self.entering(last) else None
        return entering, Rows(asks_ND[cells_BR], cells_BR)

    def parallel(self, last: Placed, cells_BM: Tensor, tables: Tables) -> Rows:
        """The rows of the codes placed last, and the instruction rows of M cells."""
        (asks_ND,) = tables
        return self._after(last, asks_ND[cells_BM], cells_BM, asks_ND)

    def _after(self, last: Placed, x_BLD: Tensor, cells_BL: Tensor, asks_ND: Tensor) -> Rows:
        """New rows behind ``x_1, p_2, x_2, ..., p_K, x_K`` of the codes placed last: the question of the first is in the cache."""
        if last.cells_BK.shape[1] == 0:
            return Rows(x_BLD, cells_BL)
        asks_BKD = asks_ND[last.cells_BK[:, 1:]].to(last.codes_BKD.dtype)
        pairs = torch.cat([last.codes_BKD[:, :1], torch.stack([asks_BKD, last.codes_BKD[:, 1:]], dim=2).flatten(1, 2)], dim=1)
        cells = last.cells_BK.repeat_interleave(2, dim=1)[:, 1:]
        return Rows(torch.cat([pairs, x_BLD], dim=1), torch.cat([cells, cells_BL], dim=1))


class DualRows(RowLayout):
    """Each code's row encodes its own position (absolute) and that of the next code (relative to it).

    Two learned vectors, rotated by the cell and by the offset to the next cell, are added to the code's embedding. The zero token
    before the first code lies nowhere; its offset is taken from cell 0.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.pos_here_embeddings = nn.Parameter(torch.empty(1, spec.dim))
        self.pos_next_embeddings = nn.Parameter(torch.empty(1, spec.dim))
        self._offsets: dict[torch.device, Tensor] = {}
        self.reset_parameters()

    def start(self, condition_BTD: Tensor) -> Placed:
        """The zero token, which has no position."""
        return Placed(self.no_cell(len(condition_BTD), 1, condition_BTD.device), torch.zeros_like(condition_BTD[:, :1]))

    def tables(self, device: torch.device) -> Tables:
        """Embeddings of a code's position [N + 1, D], and the offsets to the next one [(2G - 1)^2, D]."""
        spec = self.spec
        if device not in self._offsets:
            with torch.inference_mode(False):  # as the rotations: a table made in inference mode must also serve training
                self._offsets[device] = offset_rotations(spec.grid, spec.head_dim, spec.rope_base, device)
        cells_ND = rotate_vector(self.pos_here_embeddings, self.rotations(device)[:-1], spec.heads)
        here_RD = torch.cat([cells_ND, torch.zeros_like(cells_ND[:1])])  # the zero token lies nowhere
        return here_RD, rotate_vector(self.pos_next_embeddings, self._offsets[device], spec.heads)

    def forward(self, last: Placed, cells_BK: Tensor, codes_BKD: Tensor, tables: Tables | None = None) -> Rows:
        """The row of each code but the last, with the offset to the next cell: row i predicts the code at cell i."""
        codes_BKD, here_BK = self.one_behind(last, cells_BK, codes_BKD)
        return Rows(self._rows(here_BK, codes_BKD, cells_BK, tables or self.tables(cells_BK.device)), here_BK)

    def candidates(self, last: Placed, cells_BR: Tensor, tables: Tables) -> tuple[Rows | None, Rows]:
        """Variants of the last code's row, one for each offset to a candidate cell."""
        return None, Rows(self._rows(last.cells_BK, last.codes_BKD, cells_BR, tables), last.cells_BK.expand_as(cells_BR))

    def _rows(self, here_BK: Tensor, codes_BKD: Tensor, next_BR: Tensor, tables: Tables) -> Tensor:
        """Rows [B, R, D] of codes at cells ``here`` that ask for the next ones; K is R, or 1 for all of them."""
        here_RD, offset_OD = tables
        # The rotation table has no offset from "nowhere": the zero token's is that from cell 0.
        offset_BR = offset_index(self.spec.grid, torch.where(here_BK == self.spec.cells, 0, here_BK), next_BR)
        return codes_BKD + here_RD[here_BK] + offset_OD[offset_BR]


LAYOUTS: dict[Layout, type[RowLayout]] = {
    "raster": RasterRows,
    "instructed": InstructedRows,
    "dual": DualRows,
    "decoupled": DecoupledRows,
    "grouped": GroupedRows,
}
