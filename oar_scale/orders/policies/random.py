"""A fresh random order for each image; in training another one in every epoch (:mod:`oar_scale.data.hashing`)."""

from __future__ import annotations

from torch import Tensor

from oar_scale.data.hashing import device_permutations
from oar_scale.orders.order_files import OrderFiles
from oar_scale.orders.policies import OrderRequest, Policy, TrainingOrders


class RandomPolicy(Policy):
    """A random order for each image."""

    def training(self, files: OrderFiles, grid: int) -> TrainingOrders:
        """No order and no tables: every sample takes a random order."""
        return TrainingOrders()

    def sampling(self, request: OrderRequest) -> Tensor:
        """One random permutation for each image, a function of the request's seed and the image's number."""
        return device_permutations("sampled order", request.model.spec.cells, request.seed, request.images_B.to(request.device))


POLICY = RandomPolicy(__name__)
