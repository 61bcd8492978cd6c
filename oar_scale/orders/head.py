"""The order head: the whole order of an image from one question about each of its cells.

Exact extraction scores N (N + 1) / 2 candidates, for after every placed cell all others are scored again. The head scores all cells once,
and a small network predicts from the trunk's output (a row of D numbers) when each cell would be placed:

    time(cell) = MLP(row(cell | text, first codes), which cell)               order = cells by time

It is two such networks on the same frozen trunk:

    ahead       knows the text and the codes of the ``first`` cells of the checkerboard order (with first = 0 the text alone). It can
                guide an image that is being drawn.
    hindsight   also knows how likely the image's own code is at each cell: for images that are there already.

The rows of a frozen model belong to that model alone, and the times are those of the orders it learned from: a head carries the ids of
both, and :func:`load_head` refuses others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel, Decoder
from oar_scale.model.spec import ModelSpec
from oar_scale.orders.bayer import bayer_order
from oar_scale.orders.extraction import Orders
from oar_scale.orders.order_files import OrderFiles
from oar_scale.orders.order_table import stored_settings
from oar_scale.orders.scores import score_rows
from oar_scale.storage import open_storage
from oar_scale.text import shown
from oar_scale.tokenizers.safetensors_file import load_weights, save_weights
from oar_scale.tokenizers.without_values import without_values

KIND = "order head"
_CERTAIN = 1e-8


class HeadSpec(BaseModel):
    """Sizes of a head, and the model it reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_id: str
    dim: int
    """D of the model."""
    grid: int
    width: int
    first: int
    """Cells that are placed before ``ahead`` predicts the rest."""
    settings_id: str = ""
    """Of the order tables that it learned from; empty in heads of earlier versions."""
    heldout_fraction: float = 0.0
    """Share of the training images that it was not trained on (:func:`oar_scale.studies.order_head_training.kept_out`)."""

    @classmethod
    def of(cls, model: ModelSpec, own_id: str, *, width: int, first: int, settings_id: str = "", heldout_fraction: float = 0.0) -> HeadSpec:
        """Raises UserError where there are fewer cells than the first ones."""
        if first >= model.cells:
            raise UserError(f"order_head.first {first}: the model has {model.cells} cells, and there must be some left to ask about.")
        return cls(
            model_id=own_id,
            dim=model.dim,
            grid=model.grid,
            width=width,
            first=first,
            settings_id=settings_id,
            heldout_fraction=heldout_fraction,
        )

    @property
    def cells(self) -> int:
        """N of the model."""
        return self.grid**2


class TimeNet(nn.Module):
    """Placing times of cells from the trunk's rows about them; only their order means something."""

    def __init__(self, spec: HeadSpec, *, sees_codes: bool) -> None:
        super().__init__()
        self.cell = nn.Parameter(torch.zeros(spec.cells, spec.width))
        self.rows = nn.Sequential(nn.LayerNorm(spec.dim), nn.Linear(spec.dim, spec.width))
        self.own = nn.Linear(2, spec.width) if sees_codes else None
        self.times = nn.Sequential(
            nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(spec.width), nn.Linear(spec.width, spec.width), nn.GELU(), nn.Linear(spec.width, 1)
        )

    def forward(self, rows_BRD: Tensor, cells_BR: Tensor, own_BR: Tensor | None = None) -> Tensor:
        """Times [B, R], float32.

        Args:
            rows_BRD: normalised rows of R cells, as the output head takes them.
            own_BR: log-probability of each cell's own code, in nats; for a net that sees codes.
        """
        x_BRW = self.rows(rows_BRD.float()) + self.cell[cells_BR]
        if self.own is not None:
            assert own_BR is not None
            # Cells that are all but certain (log p from -1e-2 to -1e-6) are placed first, and their order among themselves counts as much.
            x_BRW = x_BRW + self.own(torch.stack([own_BR, (-own_BR).clamp_min(_CERTAIN).log()], dim=-1))
        return self.times(x_BRW)[..., 0]  # type: ignore[no-any-return]


class OrderHead(nn.Module):
    """Both networks, and which cells come first."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.ahead = TimeNet(spec, sees_codes=False)
        self.hindsight = TimeNet(spec, sees_codes=True)

    @property
    def first_N(self) -> Tensor:
        """The cells that are placed before the head predicts the rest [first]: those of a coarse lattice."""
        return torch.from_numpy(bayer_order(self.spec.grid)[: self.spec.first]).to(self.ahead.cell.device)

    def order_ahead(self, rows_BRD: Tensor, cells_BR: Tensor) -> Tensor:
        """R cells of each image in their order, from the rows that scored them."""
        return cells_BR.gather(1, self.ahead(rows_BRD, cells_BR).argsort(1))


@torch.no_grad()
def predict_orders(model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, head: OrderHead) -> Orders:
    """The orders of images that are there, in one pass: ``hindsight`` on rows that see nothing but the text."""
    rows_BND, own_BN = ask_all(model, codes_BN, condition_BTD)
    return _placed(head.hindsight(rows_BND, all_cells(codes_BN), own_BN).argsort(1))


@torch.no_grad()
def predict_ahead(model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, head: OrderHead) -> Orders:
    """The orders that ``ahead`` would have drawn these images in: its first cells, then the others as it predicts once those have codes."""
    rows_BRD, rest_BR = ask_rest(model, codes_BN, condition_BTD, head)
    return _placed(torch.cat([head.first_N.expand(len(codes_BN), -1), head.order_ahead(rows_BRD, rest_BR)], dim=1))


def _placed(order_BN: Tensor) -> Orders:
    """A row for each cell, scored or placed; no cell has a score."""
    return Orders(order_BN, torch.zeros(order_BN.shape, device=order_BN.device), order_BN.shape[1])


@torch.no_grad()
def ask_all(model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of all cells of empty images [B, N, D], and the log-probability of each cell's own code [B, N]."""
    decoder = Decoder(model)
    rows_BND = decoder.candidate_rows(decoder.begin(condition_BTD), all_cells(codes_BN)).rows_BRD
    own_R = score_rows(model.output.weight, rows_BND.flatten(0, 1), "gt_logprob", codes_BN.flatten())
    return rows_BND, own_R.view_as(codes_BN)


@torch.no_grad()
def ask_rest(model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, head: OrderHead) -> tuple[Tensor, Tensor]:
    """Rows of all cells but the head's first ones [B, R, D], once those are placed, and these cells [B, R], in raster order."""
    first_BK = head.first_N.expand(len(codes_BN), -1)
    rest_BR = all_cells(codes_BN)[:, ~torch.isin(torch.arange(codes_BN.shape[1], device=codes_BN.device), head.first_N)]
    decoder = Decoder(model)
    prefix = decoder.prefill(decoder.begin(condition_BTD), first_BK, codes_BN.gather(1, first_BK))
    return decoder.candidate_rows(prefix, rest_BR).rows_BRD, rest_BR


def all_cells(codes_BN: Tensor) -> Tensor:
    """0 .. N - 1 for each image, int64 [B, N]."""
    return torch.arange(codes_BN.shape[1], device=codes_BN.device).expand_as(codes_BN)


def ranking_loss(time_BR: Tensor, exact_BR: Tensor) -> Tensor:
    """Mean over all pairs of cells of log(1 + exp(time of the earlier one - time of the later one)).

    Kendall tau counts the pairs in the wrong order; this is its usual smooth upper bound (RankNet, Burges et al. 2005).

    Args:
        exact_BR: the steps at which the cells are placed; no two of an image are the same.
    """
    difference_BRR = time_BR[:, :, None] - time_BR[:, None, :]
    earlier_BRR = exact_BR[:, :, None] < exact_BR[:, None, :]
    return F.softplus(difference_BRR[earlier_BRR]).mean()


def tables_id(files: OrderFiles) -> str | None:
    """The settings that the stored orders were extracted with, as one table has it; None where there are no orders."""
    if files.tables is None:
        return None
    tables = ((uri, size) for uri, size in open_storage(files.tables).sizes(files.tables).items() if uri.endswith(".parquet"))
    return stored_settings(*first) if (first := next(tables, None)) else None


def save_head(uri: str, head: OrderHead) -> None:
    """Write a head as safetensors, its :class:`HeadSpec` in the metadata."""
    save_weights(uri, head.state_dict(), {"kind": KIND, "spec": head.spec.model_dump_json()})


def load_head(uri: str, model: AnyOrderModel, own_id: str, settings_id: str | None = None) -> OrderHead:
    """:func:`read_head`, on the device of the model."""
    return read_head(uri, own_id, settings_id).to(next(model.parameters()).device)


def read_head(uri: str, own_id: str, settings_id: str | None = None) -> OrderHead:
    """Read what :func:`save_head` wrote: eval mode, float32, on the CPU.

    Args:
        own_id: the model's id (``model.model_id`` of its file).
        settings_id: of the orders that are there now (:func:`tables_id`); None takes any.

    Raises:
        UserError: no such file, a damaged one, a head of another model, or one that learned from other orders.
    """
    tensors, text = load_weights(uri, KIND)
    try:
        spec = HeadSpec.model_validate_json(text)
        with without_values():
            head = OrderHead(spec)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # of pydantic, or of modules that cannot have these sizes
        raise UserError(f"{uri}: the sizes of this order head are not understood ({shown(text)}). Train the head again.") from error
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: tensor.shape for name, tensor in head.state_dict().items()}:
        raise UserError(f"{uri}: its tensors are not those of an order head of its sizes. Train the head again.")
    if spec.model_id != own_id:
        raise UserError(
            f"{uri}: this order head was trained on the rows of model {spec.model_id}, the model here is {own_id}. "
            "Train one for this model (oar orders RECIPE --train-head)."
        )
    if settings_id is not None and spec.settings_id != settings_id:
        raise UserError(
            f"{uri}: this order head learned from orders of the settings {spec.settings_id or '(unknown)'}, the orders here were "
            f"extracted with {settings_id}. Train the head again (oar orders RECIPE --train-head)."
        )
    head.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}, assign=True)
    return head.eval()
