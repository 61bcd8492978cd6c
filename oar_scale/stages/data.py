"""Stage ``data``: captioned images into image shards."""

from __future__ import annotations

from contextlib import ExitStack

from oar_scale.data.prepare import prepare_images
from oar_scale.json_object import JsonObject
from oar_scale.observe.console import Tally
from oar_scale.run.context import Run


def run_data(run: Run) -> JsonObject:
    """Write ``images/train`` and ``images/heldout``; returns the counts."""
    with ExitStack() as stack:
        tally: Tally | None = None

        def progress(done: int, total: int) -> None:
            nonlocal tally
            tally = tally or stack.enter_context(run.console.progress(total, "images"))
            tally.update(done)

        manifests = prepare_images(run.recipe.data, run.at("images"), progress)
    skipped = manifests["train"].skipped
    if skipped:
        named = ", ".join(f"{key} ({fault})" for key, fault in list(skipped.items())[:5])
        run.console.say(f"  skipped {len(skipped)} bad samples: {named}{' ...' if len(skipped) > 5 else ''}")
    return {
        "train": manifests["train"].samples,
        "heldout": manifests["heldout"].samples,
        "heldout_with_variant_in_train": manifests["heldout"].with_variant_in_train,
        "shards": sum(len(m.shards) for m in manifests.values()),
        "skipped": skipped,
        "attribution": manifests["train"].attribution,
    }
