"""A pool of actors that does one task per shard and loses nothing when processes die at any moment.

    worker.run(shard, on_step) makes an output and a small result about it, and says meanwhile that it goes on
    OUTPUT                     written whole, and only if it is not there yet: of two actors on a shard, the first one's bytes stay
    LEDGER/SHARD.json          written after the output, and only if it is not there yet: the shard is done

A shard counts once it is in the ledger, with the entry that belongs to the bytes that are there (``publication.py``). A pool that starts on
a ledger does what is missing in it, wherever the one before was stopped.

    the actor dies, or its worker fails          another actor tries the shard, ``max_retries`` times; then it is poison
    the worker raises UserError                  the data or the host is at fault: tried on one other host, then poison
    a worker cannot be made                      while other actors are busy, no more are started for a while; where none is left, the
                                                 pool stops: after a UserError at once, after anything else when ``max_retries`` more failed
    a finished shard's output is gone, or its    it is done again
      entry is damaged
    an actor is silent (no progress)             it is stopped, and another one does its shard; a long shard is none that hangs
    a shard is a straggler (takes far longer)    an idle actor does it as well; the first to finish counts
    SIGTERM, SIGUSR1                             running shards have ``grace_s`` to end, the others are handed back: Requeue
    another pool on the same ledger              each does what the other has not claimed; a claim ends with its pool's lease

Poison shards are named in the report with their error, and the others go on. Actors are Ray's or, in a job array, child
processes; shard names and results go through Ray, no data.
"""

from oar_scale.shard_pool.actor import OnStep, Worker
from oar_scale.shard_pool.ledger import Ledger, ShardOutput, ShardResult
from oar_scale.shard_pool.pool_run import run_pool
from oar_scale.shard_pool.pool_types import ArrayTask, Bounds, PoolReport, Timing

__all__ = ["ArrayTask", "Bounds", "Ledger", "OnStep", "PoolReport", "ShardOutput", "ShardResult", "Timing", "Worker", "run_pool"]
