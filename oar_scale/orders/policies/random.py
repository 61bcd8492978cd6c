"""A fresh random order for each image; in training another one in every epoch (:mod:`oar_scale.data.hashing`)."""

from __future__ import annotations

import torch
from torch import Tensor

from oar_scale.orders.order_files import OrderFiles
from oar_scale.orders.policies import OrderRequest, Policy, TrainingOrders


class RandomPolicy(Policy):
    def training(self, files: OrderFiles, grid: int) -> TrainingOrders:
        return TrainingOrders()

    def sampling(self, request: OrderRequest) -> Tensor:
        uniform_BN = torch.rand(request.images, request.model.spec.cells, generator=request.noise)
        return uniform_BN.argsort(1).to(request.device)


POLICY = RandomPolicy(__name__)
