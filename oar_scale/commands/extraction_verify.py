"""``oar extract RECIPE --verify``: compares every order table with what was written; damaged ones are extracted again by the next run."""

from __future__ import annotations

from oar_scale.data.manifest import ShardInfo, read_manifest
from oar_scale.errors import UserError
from oar_scale.orders.order_table import Stored, parse_orders, table_name
from oar_scale.registry import stage_command
from oar_scale.run.context import Run
from oar_scale.shard_pool import Ledger, ShardResult
from oar_scale.storage import Missing, join, open_storage
from oar_scale.storage.background import in_order

READERS = 16


def verify_order_tables(run: Run, stage: str = "extract") -> int:
    """Read the table of every finished shard. Those that are lost or damaged, as their ledger entries may be, are removed from the ledger,
    and the stage counts as unfinished.

    Returns:
        1 if there are such, else 0.
    """
    orders, tokens = run.at(run.recipe.stage(stage).orders, "train"), read_manifest(run.at("tokens", "train"))
    book, shards = Ledger(join(orders, "ledger")), {shard.name: shard for shard in tokens.shards}
    entries = book.entries(shards)
    bad = book.damaged(shards, entries)
    with run.console.progress(len(entries), "tables") as tally:
        problems = in_order(lambda shard: _problem(orders, shards[shard], entries[shard].result), list(entries), READERS)
        for number, (shard, problem) in enumerate(zip(entries, problems, strict=True)):
            if problem:
                bad[shard] = problem
            tally.update(number + 1)
    found = len(entries.keys() | bad.keys())
    if found - len(bad) < len(shards):  # whatever the cause: the stage is not finished
        open_storage(run.marker(stage)).delete(run.marker(stage))
    for shard in bad:
        book.forget(shard)
    if not bad:
        print(f"{orders}: {len(entries)} tables, all of them as they were written")
        return 0
    again = " ".join(stage_command(stage, "RECIPE"))
    print(f"{orders}: {len(bad)} of {found} tables are lost or damaged; the next `oar {again}` makes them again:")
    print("\n".join(f"  {shard}: {problem}" for shard, problem in bad.items()))
    return 1


def _problem(orders: str, shard: ShardInfo, result: ShardResult) -> str:
    """The fault of a finished shard's table; empty if there is none."""
    if result["tokens_crc32c"] != shard.crc32c:
        return "made from other tokens than are there now"
    uri = join(orders, table_name(shard.name))
    try:
        data = open_storage(uri).read(uri)
    except Missing:
        return "there is no table"
    if "table_crc32c" not in result:  # an entry of an older version
        try:
            parse_orders(data, uri)
        except UserError as error:
            return str(error).splitlines()[0]
        return ""
    stored = Stored.of(data)
    if stored.size != result["table_bytes"]:
        return f"{stored.size} bytes, {result['table_bytes']} were written"
    return "" if stored.crc32c == result["table_crc32c"] else "other bytes than were written (crc32c)"
