"""What a GPU can do at most, by its name: the denominator of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re

PEAKS = {
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}
"""Dense bfloat16 operations a second by the makers' data sheets, by words of the GPU's name; the first that fits counts."""


def peak_flops(device: str, precision: str) -> float | None:
    """Peak operations a second of a GPU of this name (``torch.cuda.get_device_name``).

    None where it is not known: for other GPUs, for a MIG slice, which has the name of the whole and a part of its peak, and for float32,
    whose products may or may not be TF32's.
    """
    if precision != "bf16" or re.search(r"\bMIG\b", device):
        return None
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device)), None)
