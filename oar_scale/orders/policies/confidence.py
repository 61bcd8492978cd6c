"""The model decides while it draws: at each step the cell it is most sure of (``generation/sampling.py``)."""

from __future__ import annotations

from oar_scale.orders.policies import OrderRequest, Policy


class ConfidencePolicy(Policy):
    def sampling(self, request: OrderRequest) -> None:
        return None


POLICY = ConfidencePolicy(__name__)
