"""``oar extract RECIPE --status``: reads the storage only, so it works from any machine, and starts at once since it needs no torch."""

from __future__ import annotations

from oar_scale.data.manifest import read_manifest
from oar_scale.run.context import Run
from oar_scale.shard_pool.pool_status import read_status, status_lines
from oar_scale.storage import join


def show_extraction_status(run: Run, stage: str = "extract") -> None:
    """Print how far the extraction is, its rate, what it has cost, and what is wrong."""
    orders = run.at(run.recipe.stage(stage).orders, "train")
    sizes = {shard.name: shard.samples for shard in read_manifest(run.at("tokens", "train")).shards}
    status = read_status(join(orders, "ledger"), sizes)
    print("\n".join(status_lines(status, orders)))
