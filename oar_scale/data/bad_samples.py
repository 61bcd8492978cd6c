"""What happens to samples that cannot be used when shards are written: one policy for the stages ``data`` and ``tokens``.

    data.on_bad_sample: skip      left out, named in the manifest and in the stage's last line
    data.on_bad_sample: fail      the first one stops the stage
    data.max_bad_fraction         more of them than this share of all stop it under ``skip`` as well

The stream of a training replaces such samples instead, within the same bound (:mod:`oar_scale.data.stream`).
"""

from __future__ import annotations

from oar_scale.config.schema import DataConfig
from oar_scale.data.notes import BAD_SAMPLES, Notes, printable
from oar_scale.errors import UserError

NAMED = 5
"""Bad samples that an error names."""


class BadSamples:
    """The bad samples of a stage."""

    def __init__(self, stage: str, total: int, config: DataConfig, notes: Notes, option: str = "-o data.max_bad_fraction=...") -> None:
        """``total``: samples in all. ``option`` is what raises the limit, as the user types it."""
        self.stage, self.total, self.config, self.notes, self.option = stage, total, config, notes, option
        self.skipped: dict[str, str] = {}
        """The reason for each key."""

    def add(self, key: str, fault: str) -> None:
        """Leave a sample out. Raises UserError under ``fail``."""
        self.skipped[key] = fault
        self.notes.add(BAD_SAMPLES, f"{key}: {fault}")
        if self.config.on_bad_sample == "fail":
            raise UserError(f"{self.stage}: image {key!r}: {fault}. Fix it, or set data.on_bad_sample: skip.")

    def check(self, done: int) -> None:
        """Raise UserError once more samples are left out than ``data.max_bad_fraction`` of all; ``done`` of them have been looked at."""
        limit = self.config.max_bad_fraction
        if self.total and len(self.skipped) / self.total > limit:
            named = "; ".join(f"{printable(key)}: {fault}" for key, fault in list(self.skipped.items())[:NAMED])
            raise UserError(
                f"{self.stage}: {len(self.skipped)} of the first {done} images are bad, more than data.max_bad_fraction = {limit} of all "
                f"{self.total}.\nThe first: {named}\nFix them, or raise the limit: {self.option}"
            )
