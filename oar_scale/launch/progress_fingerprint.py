"""A line that changes when a run makes progress: ``python -m oar_scale.launch.progress_fingerprint RECIPE``.

Job files compare the line of two attempts: if it is the same, the attempt in between has done nothing. It counts what a later attempt
finds in the run's storage: committed checkpoints, ledger entries of shards, finished stages, the training of the image tokenizer.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import suppress

from oar_scale.config.loading import load_recipe
from oar_scale.registry import ARM_ORDERS
from oar_scale.run.context import Run
from oar_scale.storage import Missing, open_storage

PARTS = ("checkpoints", "tokens", "orders", ARM_ORDERS, "stages")
"""Folders to which stages that can be stopped and resumed add files while they run."""
BEGINNING = 1 << 20
"""Bytes of a saved training that are looked at: it is one file that is written anew, weights and all, however large."""


def progress_fingerprint(run: Run) -> str:
    """The number of results in the run's storage, and a digest of their names and of the training of the image tokenizer.

    Raises:
        Unreachable: the storage does not answer.
    """
    storage = open_storage(run.at())
    done = sorted(uri for part in PARTS for uri in storage.list(run.at(part)) if _is_result(uri))
    digest = hashlib.sha256(chr(10).join(done).encode())
    with suppress(Missing):
        digest.update(storage.read(run.vq_training_uri, 0, BEGINNING))
    return f"{len(done)} {digest.hexdigest()[:16]}"


def _is_result(uri: str) -> bool:
    *_, folder, name = uri.split("/")
    return name == "COMMITTED" or folder in ("ledger", "stages")


if __name__ == "__main__":
    print(progress_fingerprint(Run(load_recipe(sys.argv[1]))))
