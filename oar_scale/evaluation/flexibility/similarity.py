"""Structural similarity of two pictures (SSIM; Wang, Bovik, Sheikh & Simoncelli 2004), pixel by pixel.

    SSIM = (2 m_x m_y + c1) (2 s_xy + c2) / ((m_x^2 + m_y^2 + c1) (s_x^2 + s_y^2 + c2))       c1 = 0.01^2, c2 = 0.03^2 of values in [0, 1]

Means m, variances s^2 and covariance s_xy are over a Gaussian window of 11 x 11 pixels, standard deviation 1.5, of each colour by itself.
A window ends where the region ends: what lies beyond a redrawn region is equal by construction, and would lift its similarity.
1: equal; 0: nothing in common. For an edit it is an upper bound, no goal: a good completion may be another one than the original.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oar_scale.errors import UserError

DEVIATION, REACH = 1.5, 5
_C1, _C2 = 0.01**2, 0.03**2


def ssim(first_HW3: NDArray[np.uint8], second_HW3: NDArray[np.uint8], region_HW: NDArray[np.bool_]) -> NDArray[np.float64]:
    """SSIM around each pixel of a region [P], the mean of the three colours, of windows cut at the region's border.

    Raises:
        ValueError: pictures, or a region, of different shapes.
    """
    if first_HW3.shape != second_HW3.shape or first_HW3.shape[:2] != region_HW.shape:
        raise ValueError(f"pictures of shapes {first_HW3.shape} and {second_HW3.shape} cannot be compared in a region {region_HW.shape}")
    inside_HW1 = region_HW[:, :, None].astype(np.float64)
    weight_P1 = _blurred(inside_HW1)[region_HW]

    def mean(values_HW3: NDArray[np.float64]) -> NDArray[np.float64]:
        return _blurred(values_HW3 * inside_HW1)[region_HW] / weight_P1

    x, y = first_HW3 / 255.0, second_HW3 / 255.0
    mean_x, mean_y = mean(x), mean(y)
    spread_x, spread_y, shared = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + _C1) * (2 * shared + _C2)
    similarity_P: NDArray[np.float64] = (top / ((mean_x**2 + mean_y**2 + _C1) * (spread_x + spread_y + _C2))).mean(-1)
    return similarity_P


def _blurred(values_HWC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums under the window, which is 0 beyond the picture."""
    try:
        from scipy.ndimage import gaussian_filter
    except ImportError as error:
        raise UserError("similarity of edits needs the package scipy: pip install 'oar_scale[eval]'") from error
    blurred: NDArray[np.float64] = gaussian_filter(values_HWC, DEVIATION, radius=REACH, axes=(0, 1), mode="constant")
    return blurred
