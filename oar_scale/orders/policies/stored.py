"""The order that was extracted for each training image."""

from __future__ import annotations

from oar_scale.orders.order_files import OrderFiles
from oar_scale.orders.policies import Policy, TrainingOrders


class StoredPolicy(Policy):
    def training(self, files: OrderFiles, grid: int) -> TrainingOrders:
        return TrainingOrders(tables=files.tables)


POLICY = StoredPolicy(__name__)
