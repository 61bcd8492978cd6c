"""The model decides while it draws: at each step the cell it is most sure of (``generation/sampling.py``)."""

from __future__ import annotations

from oar_scale.orders.policies import OrderRequest, Policy


class ConfidencePolicy(Policy):
    """The model decides; it has no orders to train on."""

    def sampling(self, request: OrderRequest) -> None:
        """None: :func:`oar_scale.generation.sampling.generate` chooses cell by cell."""
        return None


POLICY = ConfidencePolicy(__name__)
