"""The order head as a policy (:mod:`oar_scale.orders.head`): in training the orders it predicted for the images, in drawing the one it
predicts from the text and the first cells."""

from __future__ import annotations

from oar_scale.data.manifest import read_manifest
from oar_scale.errors import UserError
from oar_scale.model import model_id
from oar_scale.orders.head import load_head, tables_id
from oar_scale.orders.order_files import OrderFiles, head_file
from oar_scale.orders.order_table import table_name
from oar_scale.orders.policies import LateOrder, OrderRequest, Policy, TrainingOrders
from oar_scale.storage import Missing, join, open_storage


class OrderHeadPolicy(Policy):
    """The orders of an order head."""

    def training(self, files: OrderFiles, grid: int) -> TrainingOrders:
        """The tables that the head's predictions were written to. Raises UserError where one is missing."""
        assert files.predicted is not None and files.tokens is not None
        for shard in read_manifest(files.tokens).shards:
            uri = join(files.predicted, table_name(shard.name))
            if not open_storage(uri).exists(uri):
                raise UserError(f"{uri}: missing. The order head's orders are written by: oar orders RECIPE --train-head --predict")
        return TrainingOrders(tables=files.predicted)

    def sampling(self, request: OrderRequest) -> LateOrder:
        """The head's first cells, and its order of the others once these have codes. Raises UserError where there is no head."""
        uri = head_file(request.model_file)
        try:
            own_id = request.model_id() if request.model_id else model_id(request.model_file)
            head = load_head(uri, request.model, own_id, tables_id(request.files))
        except Missing as error:
            raise UserError(f"{uri}: this model has no order head. {_remedy(request.model_file)}") from error
        return LateOrder(head.first_N.expand(request.images, -1), head.order_ahead)


def _remedy(model_file: str) -> str:
    """How a model gets a head. Its own name is part of the command: without one the any-order model would get it."""
    name = model_file.rpartition("/")[2].removesuffix(".safetensors")
    if name == "model":
        return "Train one for the run's model (oar orders RECIPE --train-head --model NAME), and export that again."
    return f"Train one: oar orders RECIPE --train-head --model {name}"


POLICY = OrderHeadPolicy(__name__)
