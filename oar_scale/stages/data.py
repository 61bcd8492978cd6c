"""Stage ``data``: captioned images into image shards."""

from __future__ import annotations

from contextlib import ExitStack

from oar_scale.config.schema import LabelsConfig
from oar_scale.data.notes import Notes
from oar_scale.data.prepare import prepare_images, splits_of
from oar_scale.json_object import JsonObject
from oar_scale.observe.console import Tally
from oar_scale.run.context import Run


def run_data(run: Run) -> JsonObject:
    """Write ``images/train``, ``images/heldout`` and, where there is one, ``images/test``; returns the counts."""
    notes = Notes()
    with ExitStack() as stack:
        tally: Tally | None = None

        def progress(done: int, total: int) -> None:
            nonlocal tally
            tally = tally or stack.enter_context(run.console.progress(total, "images"))
            tally.update(done)

        text = run.recipe.tokenizer.text
        classes = text.classes if isinstance(text, LabelsConfig) else None
        manifests = prepare_images(run.recipe.data, run.at("images"), progress, notes, classes)
    if notes.line():
        run.console.say(f"  {notes.line()}")
    return {
        **{split: manifests[split].samples for split in splits_of(run.recipe.data)},
        "heldout_with_variant_in_train": manifests["heldout"].with_variant_in_train,
        "shards": sum(len(m.shards) for m in manifests.values()),
        "skipped": manifests["train"].skipped,
        "notes": notes.record(),
        "attribution": manifests["train"].attribution,
    }
