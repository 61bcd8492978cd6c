"""How far a run is, in one line: ``python -m oar_scale.launch.progress_fingerprint RECIPE``.

The same line twice: nothing was done in between.

What counts is what a later attempt finds in the run's storage: committed checkpoints, ledger entries of shards, finished stages.
"""

from __future__ import annotations

import hashlib
import sys

from oar_scale.config.loading import load_recipe
from oar_scale.run.context import Run
from oar_scale.storage import open_storage

KEPT = ("checkpoints", "tokens", "orders", "stages")
"""Where a run's storage grows while stages work that can be asked to stop."""


def reached(run: Run) -> str:
    """The number of things done, and a digest of their names.

    Raises:
        Unreachable: the storage does not answer.
    """
    storage = open_storage(run.at())
    done = sorted(uri for part in KEPT for uri in storage.list(run.at(part)) if _is_done(uri))
    return f"{len(done)} {hashlib.sha256(chr(10).join(done).encode()).hexdigest()[:16]}"


def _is_done(uri: str) -> bool:
    *_, folder, name = uri.split("/")
    return name == "COMMITTED" or folder in ("ledger", "stages")


if __name__ == "__main__":
    print(reached(Run(load_recipe(sys.argv[1]))))
