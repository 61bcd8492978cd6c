"""Analysis of orders: statistics, maps, caption words, agreement, an animation, and one page with all of it (``oar orders``)."""

from oar_scale.orders.analysis.statistics import (
    OrderStatistics,
    choice_entropy,
    describe_orders,
    first_cell_entropy,
    frontier_share,
    kendall_distance,
    mean_time_map,
    neighbour_share,
    placing_times,
)

__all__ = [
    "OrderStatistics",
    "choice_entropy",
    "describe_orders",
    "first_cell_entropy",
    "frontier_share",
    "kendall_distance",
    "mean_time_map",
    "neighbour_share",
    "placing_times",
]
