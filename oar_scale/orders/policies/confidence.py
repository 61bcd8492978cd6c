"""The model decides while it draws: at each step the cell it is most sure of (``generation/sampling.py``)."""

from __future__ import annotations

from oar_scale.orders.policies import Drawing, Policy


class ConfidencePolicy(Policy):
    def drawing(self, drawing: Drawing) -> None:
        return None


POLICY = ConfidencePolicy(__name__)
