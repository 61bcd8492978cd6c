"""The any-order transformer, layout ``instructed`` (RandAR, arXiv 2412.01827, sec. 3).

    rows      [c_1 .. c_T,  p_1, x_1,  p_2, x_2,  ...,  p_N]        plain causal attention
    p_i       asks for the cell placed i-th: one learned vector, turned by that cell's rotation
    x_i       the code that was placed there
    logits    read off the p rows only

Any permutation of the cells is a valid sequence, so one set of weights gives p(code | text, placed codes, cell) for every
cell at every stage of an image. Shapes: B images, N cells, V codes, T condition rows, D channels, L rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oar_scale.model.blocks import Block, RMSNorm
from oar_scale.model.conditioning import TextCondition
from oar_scale.model.decoding import Candidates, Decoding, Prefix
from oar_scale.model.rope import Rotation, cell_rotations, rotate
from oar_scale.model.spec import ModelSpec


class AnyOrderModel(nn.Module):
    """``forward``/``nll`` score whole images in a given order; ``begin`` ... ``commit`` place cells one at a time."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.text = TextCondition(spec)
        self.tok_embeddings = nn.Embedding(spec.vocab_size, spec.dim)
        self.pos_instruct_embeddings = nn.Parameter(torch.empty(1, spec.dim))
        self.layers = nn.ModuleList(Block(spec.dim, spec.heads, spec.ffn_hidden, spec.norm_eps, spec.dropout) for _ in range(spec.layers))
        self.norm = RMSNorm(spec.dim, spec.norm_eps)
        self.output = nn.Linear(spec.dim, spec.vocab_size, bias=False)
        self._rotations: dict[torch.device, Rotation] = {}
        self._turns: dict[torch.device, Tensor] = {}
        self.decoding = Decoding(self)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal(0, 0.02); the output head starts at zero, so that the first loss is log V."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)
        self.output.weight.zero_()

    # -- whole images -------------------------------------------------------------------------------------------------

    def condition(self, text_BT: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """Condition rows [B, T, D] of text ids; captions marked in ``drop_B`` (bool) become the null condition."""
        return self.text(text_BT, drop_B)  # type: ignore[no-any-return]

    def null_condition(self, batch: int) -> Tensor:
        """Condition rows [B, T, D] of no caption."""
        return self.text.null.expand(batch, -1, -1)

    def forward(self, codes_BN: Tensor, order_BN: Tensor, condition_BTD: Tensor) -> Tensor:
        """Logits [B, N, V] in generation order: row i is about cell ``order[i]``, given the i - 1 cells before it.

        Args:
            codes_BN: codes in raster order.
            order_BN: a permutation of the cells for each image, first placed first.
            condition_BTD: what :meth:`condition` returned.
        """
        asks_BND = self.ask_rows(order_BN)
        codes_BND = self.code_rows(codes_BN.gather(1, order_BN))
        pairs = torch.stack([asks_BND, codes_BND], dim=2).flatten(1, 2)[:, :-1]
        x_BLD = torch.cat([condition_BTD, pairs], dim=1)
        cells_BL = torch.cat([self.no_cell(condition_BTD), order_BN.repeat_interleave(2, dim=1)[:, :-1]], dim=1)
        rotation = self.rotations(x_BLD.device).at(cells_BL)
        for layer in self.layers:
            x_BLD = layer(x_BLD, rotation, causal=True)
        return self.head(x_BLD[:, condition_BTD.shape[1] :: 2])

    def nll(self, codes_BN: Tensor, order_BN: Tensor, condition_BTD: Tensor) -> Tensor:
        """Negative log-likelihood of each code in nats, float32 [B, N], in generation order."""
        logits_BNV = self.forward(codes_BN, order_BN, condition_BTD)
        targets_BN = codes_BN.gather(1, order_BN)
        return F.cross_entropy(logits_BNV.flatten(0, 1).float(), targets_BN.flatten(), reduction="none").view_as(targets_BN)

    # -- one cell at a time (see decoding.py) -----------------------------------------------------------------------------

    def begin(self, condition_BTD: Tensor) -> Prefix:
        """An empty image: the prefix holds the condition only."""
        return self.decoding.begin(condition_BTD)

    def candidate_rows(self, prefix: Prefix, cells_BR: Tensor) -> Candidates:
        """Ask about R cells at once; each row sees the prefix and itself, never another candidate."""
        return self.decoding.candidate_rows(prefix, cells_BR)

    def commit(self, prefix: Prefix, candidates: Candidates, winner_B: Tensor, codes_B: Tensor) -> Prefix:
        """Place ``codes_B`` at the cell of candidate ``winner_B`` (an index into the R candidates)."""
        return self.decoding.commit(prefix, candidates, winner_B, codes_B)

    def prefill(self, prefix: Prefix, cells_BK: Tensor, codes_BK: Tensor) -> Prefix:
        """Place K known cells in the given order, in one pass."""
        return self.decoding.prefill(prefix, cells_BK, codes_BK)

    # -- rows -----------------------------------------------------------------------------------------------------------

    def ask_rows(self, cells: Tensor) -> Tensor:
        """Position instruction rows [..., D] for cells [...]."""
        spec = self.spec
        asked_HE = self.pos_instruct_embeddings.view(spec.heads, spec.head_dim)
        table = self.rotations(cells.device)
        rotation_N1E = Rotation(table.cos[:-1, None], table.sin[:-1, None])
        every_ND = rotate(asked_HE.expand(spec.cells, -1, -1), rotation_N1E).flatten(1)
        return every_ND[cells]

    def code_rows(self, codes: Tensor) -> Tensor:
        """Rows [..., D] of placed codes [...]."""
        return F.dropout(self.tok_embeddings(codes), self.spec.dropout, self.training)

    def no_cell(self, rows_BLD: Tensor) -> Tensor:
        """The index of the identity rotation for each of the rows, [B, L]."""
        return torch.full(rows_BLD.shape[:2], self.spec.cells, dtype=torch.long, device=rows_BLD.device)

    def head(self, rows: Tensor) -> Tensor:
        """Logits [..., V] of rows [..., D]."""
        return self.output(self.norm(rows))  # type: ignore[no-any-return]

    def rotations(self, device: torch.device) -> Rotation:
        """The table of cell rotations: float32 and outside the state dict, whatever the weights' dtype."""
        if device not in self._rotations:
            self._rotations[device] = cell_rotations(self.spec.grid, self.spec.head_dim, self.spec.rope_base, device)
        return self._rotations[device]

    def turns(self, device: torch.device) -> Tensor:
        """The same table as complex numbers [N + 1, head_dim / 2], for decoding."""
        if device not in self._turns:
            self._turns[device] = self.rotations(device).turn()
        return self._turns[device]
