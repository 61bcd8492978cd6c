"""A pool of actors that does one task per shard and loses nothing, whoever dies at what moment.

    worker.run(shard)          writes its own output, atomically, and returns a few facts about it
    LEDGER/SHARD.json          written after the output, and only if it is not there yet: the shard is done

A shard counts once it is in the ledger: an output without an entry is written again, and a worker that is a function of its
shard writes the same bytes. A pool that starts on a ledger does what is missing in it, wherever the one before was stopped.

    the actor dies, or its worker fails          another actor tries the shard, ``max_retries`` times; then it is poison
    the worker raises UserError                  the data is at fault: poison at once
    a worker cannot be made                      while others work, no more are hired for a while; where nobody is left, the pool
                                                 stops: after a UserError at once, after anything else when ``max_retries`` more failed
    a finished shard's output is gone            its entry is removed, and it is done again
    a shard takes far longer than the others     an idle actor does it as well; the first to finish counts
    SIGTERM, SIGUSR1                             running shards have ``grace_s`` to end, the others are handed back: Requeue
    another pool on the same ledger              each does what the other has not claimed; a claim ends with its holder

Poison shards are named in the report with their error, and the others go on. Actors are Ray's or, in a job array, child
processes; through Ray go shard names and facts, no data.
"""

from oar_scale.shard_pool.actor import Worker
from oar_scale.shard_pool.ledger import Facts, Ledger
from oar_scale.shard_pool.pool_types import ArrayTask, Bounds, PoolReport, Timing
from oar_scale.shard_pool.run_pool import run_pool

__all__ = ["ArrayTask", "Bounds", "Facts", "Ledger", "PoolReport", "Timing", "Worker", "run_pool"]
