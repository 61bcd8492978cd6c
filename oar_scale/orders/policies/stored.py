"""The order that was extracted for each training image."""

from __future__ import annotations

from oar_scale.orders.order_files import OrderFiles
from oar_scale.orders.policies import Policy, TrainingOrders


class StoredPolicy(Policy):
    """The orders in the run's order tables; there are none for images that are yet to be sampled."""

    def training(self, files: OrderFiles, grid: int) -> TrainingOrders:
        """The run's order tables."""
        return TrainingOrders(tables=files.tables)


POLICY = StoredPolicy(__name__)
