"""What happens at certain steps beside the training itself: a file each.

Every rank has all of them and calls them in the same order after each step, so they may be collective. What one has to remember goes
into the checkpoints through ``state``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oar_scale.training.loop import Loop


class Callback:
    """Does nothing at any time; the real ones override what they need."""

    def start(self, loop: Loop) -> None:
        """Before the first step of an attempt, after the checkpoint was loaded."""

    def after_step(self, loop: Loop) -> None:
        """After each step: ``loop.step`` steps are done, and ``loop.result`` is what the last one did."""

    def end(self, loop: Loop) -> None:
        """After the last step of a stage, or of an attempt that was asked to stop or is rolled back."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
