"""``oar plan --simulate ranks=1024``: the data stream and the extraction of a run, simulated."""

from __future__ import annotations

from dataclasses import dataclass

from oar_scale.errors import UserError
from oar_scale.planning.case import Case
from oar_scale.planning.extraction_plan import ActorPlan, ExtractionPlan, Makespan, makespan
from oar_scale.planning.stream_load import StreamLoad, stream_load
from oar_scale.planning.training_stage import TrainingStagePlan


@dataclass(frozen=True)
class SimulationRequest:
    """The size to simulate, as ``--simulate`` gives it."""

    ranks: int
    failures: float | None = None
    """Per GPU and year."""


@dataclass(frozen=True)
class Simulation:
    """Results of a simulation of data loading and of the extraction pool."""

    stream: StreamLoad
    extraction: Makespan | None
    """None for a raster model."""


def parse_simulation(text: str) -> SimulationRequest:
    """``ranks=1024[,failures=0.19]``.

    Raises:
        UserError: anything else.
    """
    given: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        try:
            given[key.strip()] = float(value)
        except ValueError:
            given[key.strip()] = -1.0
    ranks, failures = given.pop("ranks", 0.0), given.pop("failures", None)
    if given or ranks < 1 or ranks != int(ranks) or (failures is not None and failures < 0):
        raise UserError(
            f"--simulate {text}: ranks=N is needed, and failures=RATE (for each GPU in a year) may follow, e.g. ranks=1024,failures=0.5"
        )
    return SimulationRequest(int(ranks), failures)


def simulate(
    case: Case, wanted: SimulationRequest, stages: list[TrainingStagePlan], actors: ActorPlan | None, orders: ExtractionPlan | None
) -> Simulation:
    """Simulate the data stream of the first stage, and the extraction.

    Raises:
        UserError: the number of images is unknown, or ranks that cannot share the streams.
    """
    stream = stream_load(case, wanted.ranks, stages[0].step.seconds, stages[0].global_batch)
    if actors is None or orders is None:
        return Simulation(stream, None)
    pool = makespan(orders.shards, orders.shard_s, actors.count, actors.lost_per_year, orders.start_s, case.assumed, seed=case.seed)
    return Simulation(stream, pool)
