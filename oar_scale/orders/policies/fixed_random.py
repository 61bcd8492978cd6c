"""One random order for each training image, the same in every epoch and in all of its views."""

from __future__ import annotations

from oar_scale.orders.order_files import OrderFiles
from oar_scale.orders.policies import Policy, TrainingOrders


class FixedRandomPolicy(Policy):
    """Random orders that are repeated: what extracted orders would be worth if any order did. There are none for images yet to be drawn."""

    def training(self, files: OrderFiles, grid: int) -> TrainingOrders:
        """By the sample's key."""
        return TrainingOrders(by_key=True)


POLICY = FixedRandomPolicy(__name__)
