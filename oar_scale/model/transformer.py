"""The any-order transformer: one trunk, several layouts of its rows (``layouts.py``), three kinds of condition (``conditioning.py``).

Any permutation of the cells is a valid sequence (of a raster model: one permutation), so one set of weights gives
p(code | condition, placed codes, cell) for every cell at every stage of an image.
Shapes: B images, N cells, V codes, T condition rows, D channels, L rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oar_scale.model.blocks import FAMILIES, Linear
from oar_scale.model.conditioning import Embedding, conditioner
from oar_scale.model.layouts import LAYOUTS
from oar_scale.model.loss import mean_nll
from oar_scale.model.spec import ModelSpec


class CodeHead(Linear):
    """Rows to logits. It starts at zero, so that the first loss is log V."""

    def reset_parameters(self) -> None:
        """Set the weight to zero."""
        nn.init.zeros_(self.weight)

    def forward(self, rows: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """Logits of rows [..., D]; with targets [R] for rows [R, D] their mean loss and the loss of each (``loss.mean_nll``)."""
        return F.linear(rows, self.weight) if targets is None else mean_nll(rows, self.weight, targets)


class AnyOrderModel(nn.Module):
    """Scores whole images in a given order: logits, loss, likelihoods. ``decoding.Decoder`` places cells one at a time with it."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.conditioner = conditioner(spec)
        self.layout = LAYOUTS[spec.layout](spec)
        self.tok_embeddings = Embedding(spec.vocab_size, spec.dim)
        self.layers = nn.ModuleList(self.layout.blocks())
        self.norm = FAMILIES[spec.block].norm(spec.dim, spec.norm_eps)
        self.output = CodeHead(spec.dim, spec.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return self.tok_embeddings.weight.dtype

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, as the constructors do: for a model built on the meta device and then materialised."""
        for _, module in modules_as_made(self):
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]

    # -- whole images -------------------------------------------------------------------------------------------------

    def condition(self, cond_inputs: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """Condition rows [B, T, D].

        Args:
            cond_inputs: class labels [B], text ids [B, T], or features [B, T, F], as the spec says.
            drop_B: bool; these samples become the null condition.
        """
        return self.conditioner(cond_inputs, drop_B)

    def null_condition(self, batch: int) -> Tensor:
        """Condition rows [B, T, D] of no caption."""
        return self.conditioner.null().expand(batch, -1, -1)

    def forward(self, codes_BN: Tensor, order_BN: Tensor, condition_BTD: Tensor, groups: Sequence[int] | None = None) -> Tensor:
        """Logits [B, N, V] in generation order: row i is about cell ``order[i]``, given the i - 1 cells before it.

        Args:
            codes_BN: codes in raster order.
            order_BN: a permutation of the cells for each image, first placed first.
            condition_BTD: what :meth:`condition` returned.
            groups: of a grouped model, how many cells each step asks for together, N in all: a row is then given the cells of the steps
                before its own. None: one cell a step.

        Raises:
            ValueError: groups of another number of cells, or of a model of another layout.
        """
        logits: Tensor = self.output(self.rows(codes_BN, order_BN, condition_BTD, groups))
        return logits

    def loss(self, codes_BN: Tensor, order_BN: Tensor, condition_BTD: Tensor, groups: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood [] in nats per code, for one backward pass, and of each code [B, N] without gradient.

        The logits of all rows never exist together (``loss.py``). Both float32; the second is in generation order. Arguments as
        :meth:`forward`.
        """
        rows_RD = self.rows(codes_BN, order_BN, condition_BTD, groups).flatten(0, 1)
        mean, nll_R = self.output(rows_RD, codes_BN.gather(1, order_BN).flatten())
        return mean, nll_R.view_as(order_BN)

    @torch.no_grad()
    def nll(self, codes_BN: Tensor, order_BN: Tensor, condition_BTD: Tensor, groups: Sequence[int] | None = None) -> Tensor:
        """Negative log-likelihood of each code in nats, float32 [B, N], in generation order; to train, take :meth:`loss`."""
        return self.loss(codes_BN, order_BN, condition_BTD, groups)[1]

    def rows(self, codes_BN: Tensor, order_BN: Tensor, condition_BTD: Tensor, groups: Sequence[int] | None = None) -> Tensor:
        """The trunk's normalised rows [B, N, D] that predict the codes, in generation order; arguments as :meth:`forward`."""
        placed_BND = self.code_rows(codes_BN.gather(1, order_BN))
        rows_BND: Tensor = self.norm(self.layout.whole(self.layers, condition_BTD, order_BN, placed_BND, groups))
        return rows_BND

    # -- rows -----------------------------------------------------------------------------------------------------------

    def code_rows(self, codes: Tensor) -> Tensor:
        """Rows [..., D] of placed codes [...]."""
        return F.dropout(self.tok_embeddings(codes), self.spec.dropout, self.training)

    def rotations(self, device: torch.device) -> Tensor:
        """The table of cell rotations [N + 1, head_dim / 2, 2], float32."""
        return self.layout.rotations(device)


def modules_as_made(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts of a module, then itself, with their names: in the order in which constructors draw their weights."""
    for name, child in module.named_children():
        yield from modules_as_made(child, f"{path}.{name}" if path else name)
    yield path, module
