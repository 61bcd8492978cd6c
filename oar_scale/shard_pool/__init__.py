"""A pool of actors that does one task per shard and loses nothing when processes die at any moment.

    worker.run(shard)          writes its own output, atomically, and returns a small result about it
    LEDGER/SHARD.json          written after the output, and only if it is not there yet: the shard is done

A shard counts once it is in the ledger: an output without an entry is written again, and a worker that is a function of its
shard writes the same bytes. A pool that starts on a ledger does what is missing in it, wherever the one before was stopped.

    the actor dies, or its worker fails          another actor tries the shard, ``max_retries`` times; then it is poison
    the worker raises UserError                  the data is at fault: poison at once
    a worker cannot be made                      while other actors are busy, no more are started for a while; where none is left, the
                                                 pool stops: after a UserError at once, after anything else when ``max_retries`` more failed
    a finished shard's output is gone            its entry is removed, and it is done again
    a shard is a straggler (takes far longer)    an idle actor does it as well; the first to finish counts
    SIGTERM, SIGUSR1                             running shards have ``grace_s`` to end, the others are handed back: Requeue
    another pool on the same ledger              each does what the other has not claimed; a claim ends with its pool's lease

Poison shards are named in the report with their error, and the others go on. Actors are Ray's or, in a job array, child
processes; shard names and results go through Ray, no data.
"""

from oar_scale.shard_pool.actor import Worker
from oar_scale.shard_pool.ledger import Ledger, ShardResult
from oar_scale.shard_pool.pool_run import run_pool
from oar_scale.shard_pool.pool_types import ArrayTask, Bounds, PoolReport, Timing

__all__ = ["ArrayTask", "Bounds", "Ledger", "PoolReport", "ShardResult", "Timing", "Worker", "run_pool"]
