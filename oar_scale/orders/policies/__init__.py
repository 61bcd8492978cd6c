"""Order policies: by which rule the cells of an image are placed, in training and in sampling.

A policy is one module of this package, found by its name (``centre_out.py`` is ``centre-out``); its ``POLICY`` states where it works:

    training   random orders, one order for all samples, or a table with an order for each
    sampling   an order for each image, an order that is known once the first cells have codes, or: the model decides

Orders are permutations of the cells of a grid of any size, first placed first, cells counted in raster order.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from oar_scale.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from oar_scale.model import AnyOrderModel
    from oar_scale.orders.order_files import OrderFiles

    Path = NDArray[np.int64]


@dataclass(frozen=True)
class TrainingOrders:
    """The orders of the samples outside the random share; with no field a random order, too."""

    order: tuple[int, ...] | None = None
    """One order for all."""
    tables: str | None = None
    """A folder of order tables: an order for each."""
    by_key: bool = False
    """A random order for each, the same in every epoch: a hash of its key."""


@dataclass(frozen=True)
class OrderRequest:
    """Images that need an order to be sampled in, and what a policy may use to find it."""

    model: AnyOrderModel
    images_B: Tensor
    """int64: a number for each image."""
    seed: int
    """Of the images: a policy that needs random numbers hashes it with the image's number."""
    files: OrderFiles
    model_file: str
    """Where the model was loaded from."""
    steps: int | None = None
    """Passes in which the images are drawn, several cells in each; None: one by one."""
    model_id: Callable[[], str] | None = None
    """Gives the id of the weights that were loaded, which somebody keeps; None: all of the file is read for it."""
    known_BN: Tensor | None = None
    """bool: the cells of each image that are placed before the first pass; None: none. A policy may leave it out of account, as known
    cells are passed over in any order."""

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.images_B)

    @property
    def device(self) -> torch.device:
        """The device of the model, on which orders are expected."""
        return next(self.model.parameters()).device


class LateOrder(NamedTuple):
    """An order whose first cells are given, and the others only when those have codes."""

    first_BK: Tensor
    rest: Callable[[Tensor, Tensor], Tensor]
    """From the trunk's rows [B, R, D] about the cells [B, R] that are still empty to the order of these, [B, R]."""

    def part(self, images: slice | Tensor) -> LateOrder:
        """That of some of the images."""
        return self._replace(first_BK=self.first_BK[images])


class Policy:
    """Base of all policies. A policy does not work where it leaves out the method."""

    def __init__(self, module: str) -> None:
        self.name = module.rpartition(".")[2].replace("_", "-")

    def training(self, files: OrderFiles, grid: int) -> TrainingOrders:
        """The orders of training samples. Raises UserError where there are none, or what they rest on is missing."""
        able = [name for name in known() if type(policy(name)).training is not Policy.training]
        self._refuse("has no orders to train on", "Extract orders and train on the stored ones, or name a policy that has", able)

    def sampling(self, request: OrderRequest) -> Tensor | LateOrder | None:
        """Orders int64 [B, N] of images to be drawn; None: the model decides. Raises UserError as :meth:`training`."""
        able = [name for name in known() if type(policy(name)).sampling is not Policy.sampling]
        self._refuse("belongs to images that are there already, not to one that is to be drawn", "Name another policy", able)

    def check_sampling(self, request: OrderRequest) -> None:
        """Raise UserError where :meth:`sampling` would; what takes long to compute is not computed."""
        self.sampling(request)

    def _refuse(self, why: str, remedy: str, able: list[str]) -> NoReturn:
        raise UserError(f"order {self.name!r} {why}. {remedy}: {', '.join(able)}.")


class GridPolicy(Policy):
    """The same path through the grid for every image."""

    def __init__(self, module: str, path: Callable[[int], Path]) -> None:
        super().__init__(module)
        self.path = path
        """From cells a side to the order [N]."""

    def training(self, files: OrderFiles, grid: int) -> TrainingOrders:
        """The path of this grid, for all samples."""
        return TrainingOrders(order=tuple(self.path(grid).tolist()))

    def sampling(self, request: OrderRequest) -> Tensor:
        """The path of the model's grid, for each image, [B, N]."""
        import torch

        order_N = torch.from_numpy(self.path(request.model.spec.grid))
        return order_N.expand(request.images, -1).to(request.device)


def known() -> list[str]:
    """The names of all policies."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def check_policies(names: Mapping[str, str | None]) -> None:
    """Check the policies that a recipe names, by the fields that name them. Raises UserError as :func:`policy`."""
    for where, name in names.items():
        if name is not None and name not in known():
            raise _unknown(name, where)


def _unknown(name: str, where: str) -> UserError:
    return UserError(f"{where} {name!r}: no such policy. There are: {', '.join(known())}.")


def policy(name: str, where: str = "order") -> Policy:
    """The policy of this name.

    Args:
        where: the field or argument that names it, for the error.

    Raises:
        UserError: there is none.
    """
    if name not in known():
        raise _unknown(name, where)
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    chosen: Policy = module.POLICY
    return chosen


def sampling_order(name: str | None, request: OrderRequest, where: str = "sample.order") -> Tensor | LateOrder | None:
    """The order that images are drawn in: a policy's, or the model's own choice (a raster model's raster) where none is named.

    Raises:
        UserError: no such policy, or one that cannot say in which order these images are drawn.
    """
    return policy(name or own_policy(request.model), where).sampling(request)


def own_policy(model: AnyOrderModel) -> str:
    """The policy of a model for which nobody names one."""
    return "raster" if model.spec.layout == "raster" else "confidence"


def grid_policies() -> dict[str, GridPolicy]:
    """All policies with the same path for every image, by name."""
    return {name: each for name in known() if isinstance(each := policy(name), GridPolicy)}
