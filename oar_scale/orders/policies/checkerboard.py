"""Coarse to fine: 4**k cells are a regular lattice of 2**k x 2**k, twice as many a checkerboard of it, then comes the next finer one."""

from __future__ import annotations

from oar_scale.orders.bayer import bayer_order
from oar_scale.orders.policies import GridPolicy

POLICY = GridPolicy(__name__, bayer_order)
