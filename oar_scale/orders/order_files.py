"""Where a run, or an exported folder, keeps what order policies rest on.

a run's storage      orders/train/*.parquet  orders/mean.json  orders/distinct/K-SEED.json  orders/predicted/*.parquet
                     arm_orders/ARM/... (the same, of an arm with an extraction of its own)  models/NAME.order-head.safetensors
an exported folder   mean-order.json  model.order-head.safetensors
"""

from __future__ import annotations

from dataclasses import dataclass

from oar_scale.storage import join

_MODEL, _HEAD = ".safetensors", ".order-head.safetensors"


@dataclass(frozen=True)
class OrderFiles:
    """Names; nothing need be there."""

    where: str
    """The run or folder, for errors."""
    mean: str
    """The mean order of the data set."""
    tokens: str | None = None
    """Training images as codes."""
    tables: str | None = None
    """The orders that were extracted for them."""
    predicted: str | None = None
    """The orders that an order head predicted for them."""
    distinct: str | None = None
    """A folder for the few orders that are taken for all of them (:mod:`oar_scale.orders.distinct`)."""
    read_only: bool = False
    """Nothing is written: what is computed from the tables stays in this process."""


def run_files(root: str, folder: str = "orders") -> OrderFiles:
    """The order files of the run whose storage is ``root``; ``folder`` is another one where an arm has an extraction of its own."""
    return OrderFiles(
        where=root,
        mean=join(root, folder, "mean.json"),
        tokens=join(root, "tokens", "train"),
        tables=join(root, folder, "train"),
        predicted=join(root, folder, "predicted"),
        distinct=join(root, folder, "distinct"),
    )


def folder_files(folder: str) -> OrderFiles:
    """The order files of an exported folder."""
    return OrderFiles(where=folder, mean=join(folder, "mean-order.json"))


def head_file(model_file: str) -> str:
    """The order head of a model lies beside it."""
    return model_file.removesuffix(_MODEL) + _HEAD


def head_report_file(model_file: str) -> str:
    """The file with the quality of a model's order head."""
    return head_file(model_file).removesuffix(_MODEL) + ".json"


def is_order(found: object, grid: int) -> bool:
    """Whether this, read from JSON, is an order of the cells: a list of their numbers, each once."""
    return isinstance(found, list) and set(map(type, found)) == {int} and sorted(found) == list(range(grid * grid))
