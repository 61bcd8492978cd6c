"""Model FLOPs utilisation as training reports it. No GPU is here: its name is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import small_spec

from oar_scale.model.flops import training_flops, useful_flops
from oar_scale.runtime.gpu_peaks import peak_flops
from oar_scale.training.callbacks.speed import Speed


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA H200X", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("", None),
    ],
)
def test_a_peak_is_that_of_the_whole_name_or_none(gpu: str, peak: float | None) -> None:
    """A part of a GPU has no peak that its name gives, and a name that another one begins with is another GPU."""
    assert peak_flops(gpu, "bf16") == peak and peak_flops(gpu, "fp32") is None


@pytest.mark.parametrize(("gpu", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H100 PCIe", 756e12)])
def test_mfu_counts_useful_operations_alone(gpu: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither masked pairs of attention nor what is computed a second time: the same operations as in a plan."""
    spec, speed = small_spec(), Speed()
    recipe = SimpleNamespace(parallel=SimpleNamespace(precision="bf16"))
    process = SimpleNamespace(device=torch.device("cuda"), world=4, gather=lambda value: [value] * 4)
    loop: Any = SimpleNamespace(process=process, job=SimpleNamespace(recipe=recipe), engine=SimpleNamespace(spec=spec))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    speed.start(loop)
    assert speed._mfu_per_image == useful_flops(spec) / (peak * 4) < training_flops(spec) / (peak * 4)
