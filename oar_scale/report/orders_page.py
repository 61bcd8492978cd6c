"""The page of an :class:`~oar_scale.orders.analysis.analysis_values.OrderAnalysis`: one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import math

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from oar_scale.orders.analysis.analysis_values import OrderAnalysis
from oar_scale.orders.analysis.statistics import placing_times
from oar_scale.orders.policies import grid_policies
from oar_scale.report import page_environment
from oar_scale.report.figures import DIFFERENCE_MAP, Line, colour_ramp, line_chart
from oar_scale.report.summary import number

STATISTICS = (
    ("distance between two images", "share of pairs of cells that their orders place the other way round", "pair_distance", 3),
    ("steps to a neighbouring cell", "share of the steps that go up, down, left or right", "neighbour_share", 3),
    ("cells at the frontier", "share that touch a cell that is there already, corners included", "frontier_share", 3),
    ("length of a step", "mean distance from a cell to the next one, in cells", "step_length", 2),
    ("entropy of the first cell", "nats; 0 where every image starts in the same cell", "first_cell_entropy", 2),
)


def render_orders(orders: OrderAnalysis) -> str:
    """The page as HTML text."""
    environment = page_environment()
    low, high = float(orders.time_map.min()), float(orders.time_map.max())
    groups = (*orders.frequent, *orders.deviating)
    every = [orders.time_map, *(each.time_map for each in groups)]
    environment.globals.update(
        orders=orders,
        low=low,
        high=high,
        group_low=float(min(each.min() for each in every)),
        group_high=float(max(each.max() for each in every)),
        reach=max([float(abs(each.time_map - orders.time_map).max()) for each in groups], default=1.0),
        difference_map=DIFFERENCE_MAP,
        difference_ramp=Markup(colour_ramp(DIFFERENCE_MAP)),
    )
    return environment.get_template("orders.html.j2").render(
        animation="data:image/webp;base64," + base64.b64encode(orders.animation).decode(),
        sentences=_summary(orders),
        statistics=STATISTICS,
        charts=_charts(orders),
        uniform_entropy=math.log(orders.cells),
        known=_known(orders),
    )


def _summary(orders: OrderAnalysis) -> list[str]:
    statistics, tau = orders.statistics, {name: 1 - 2 * distance for name, distance in orders.distances.items()}
    nearest = max((name for name in tau if name != "mean"), key=lambda name: abs(tau[name]))
    lines = [
        f"The orders of two images place {number(100 * statistics.pair_distance, 0)} % of the pairs of cells the other way round "
        f"(50 % where they have nothing in common).",
        f"{number(100 * statistics.neighbour_share, 0)} % of the steps go to a neighbouring cell "
        f"({number(100 * orders.random.neighbour_share, 0)} % in random orders).",
        f"The mean order has tau {number(tau['mean'], 2)} with them; of the orders that know no image, {nearest} "
        f"has most to do with them (tau {number(tau[nearest], 2)}).",
    ]
    if orders.deviating:
        lines.append(f"“{orders.deviating[0].name}” is placed most differently from the mean.")
    return lines


def _charts(orders: OrderAnalysis) -> list[tuple[str, Markup]]:
    steps = list(range(1, orders.cells + 1))
    entropy = [
        Line("random orders", steps, orders.random_choice_entropy.tolist()),
        Line("these orders", steps, orders.choice_entropy.tolist()),
    ]
    score = [Line(orders.score, steps, orders.step_score.tolist())]
    return [
        ("Which cell comes at this step?", Markup(line_chart("entropy", "step", "entropy, nats", entropy))),
        ("How sure is the model of it?", Markup(line_chart("score", "step", f"mean {orders.score}", score))),
    ]


def _known(orders: OrderAnalysis) -> list[tuple[str, NDArray[np.int64], float]]:
    """Name, map and distance of each order that is the same for every image, the nearest first."""
    paths = {name: policy.path(orders.grid) for name, policy in grid_policies().items()}
    maps = {name: placing_times(path).reshape(orders.grid, orders.grid) for name, path in paths.items()}
    maps["mean"] = placing_times(orders.time_map.ravel().argsort(kind="stable")).reshape(orders.grid, orders.grid)
    return sorted(((name, maps[name], distance) for name, distance in orders.distances.items()), key=lambda row: row[2])
