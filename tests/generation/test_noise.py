"""The noise of sampling: a hash that no test of randomness tells from independent uniform numbers, the same wherever it is made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from chi_square import deviation
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from oar_scale.data.hashing import device_hash, device_uniform, hash_keys
from oar_scale.generation.drawing import draw_codes
from oar_scale.generation.settings import SampleSettings
from oar_scale.orders.selection import CounterRNG

RARE = 4.0
"""Standard deviations; true noise is farther off with one seed in 30,000, and the seeds are fixed."""
PLAIN = SampleSettings(guidance=1.0, temperature=1.0, top_k=0, order_temperature=0.0)


def rng(seed: int, images: int = 64, first: int = 0) -> CounterRNG:
    return CounterRNG.of(seed, np.arange(first, first + images), 0, 16, torch.device("cpu"))


def noise(seed: int, first: int = 0, cell: int = 0) -> Tensor:
    """Numbers that should be uniform, [images, cells, codes], from Gumbel noise."""
    cells = torch.arange(cell, cell + 8).expand(64, -1)
    return (-(-rng(seed, first=first).code_gumbel(cells, 256).double()).exp()).exp()


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_noise_is_uniform(seed: int) -> None:
    counts = torch.histc(noise(seed).float(), bins=1024, min=0.0, max=1.0)
    assert deviation(counts, noise(seed).numel() / 1024) < RARE


@pytest.mark.parametrize(
    ("what", "shift"),
    [
        ("the next image", lambda: (noise(5), noise(5, first=1))),
        ("the next cell", lambda: (noise(5), noise(5, cell=1))),
        ("the next code", lambda: (noise(5)[..., :-1], noise(5)[..., 1:])),
        ("the next seed", lambda: (noise(5), noise(6))),
        ("image and cell exchanged", lambda: (noise(5)[:8], noise(5)[:8].transpose(0, 1))),
    ],
)
def test_noise_is_independent_of(what: str, shift: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Pairs of numbers fill the unit square evenly."""
    one, other = (pair.flatten() for pair in shift())
    if what == "image and cell exchanged":
        one, other = (each[one != other] for each in (one, other))  # the diagonal is the same number
    bins = (one * 16).long() * 16 + (other * 16).long()
    assert deviation(torch.bincount(bins, minlength=256), len(bins) / 256) < RARE, what


def test_every_code_and_pair_of_codes_wins_as_often() -> None:
    winner = rng(3, images=4096).code_gumbel(torch.arange(4).expand(4096, -1), 8).argmax(-1)
    for cells in range(4):
        assert deviation(torch.bincount(winner[:, cells], minlength=8), 512) < RARE
    pairs = winner[:, 0] * 8 + winner[:, 1]
    assert deviation(torch.bincount(pairs, minlength=64), 64) < RARE


def test_codes_follow_their_probabilities() -> None:
    logits = torch.linspace(-4, 2, 16)
    drawn = draw_codes(logits.expand(20_000, 1, -1), torch.zeros(20_000, 1, dtype=torch.long), PLAIN, rng(9, images=20_000))
    assert deviation(torch.bincount(drawn.flatten(), minlength=16), logits.softmax(0) * 20_000) < RARE


def test_noise_of_an_image_is_the_same_in_any_batch() -> None:
    cells, mixed = torch.tensor([[3, 5]]), CounterRNG.of(7, np.array([4, 0, 9]), 0, 16, torch.device("cpu"))
    for place, image in enumerate((4, 0, 9)):
        alone = rng(7, images=1, first=image).code_gumbel(cells, 50)[0]
        assert torch.equal(mixed.code_gumbel(cells.expand(3, -1), 50)[place], alone)
        assert torch.equal(rng(7, images=12).code_gumbel(cells.flip(1).expand(12, -1), 50)[image].flip(0), alone)


def test_a_device_hashes_as_numpy_does() -> None:
    """The numbers of a device are those of numpy, whichever keys are whole numbers and whichever tensors."""
    image = np.array([[0], [3], [2**40]])
    code = np.arange(5)
    for seed in (0, -1, 2**63 - 1, 2**64 + 5):
        made = device_uniform("test", seed, 4, torch.from_numpy(image), -2, torch.from_numpy(code))
        expected = hash_keys("test", np.uint64(seed % 2**64), 4, image, np.int64(-2), code) >> np.uint64(11)
        assert np.array_equal(made.numpy(), (expected.astype(np.float64) + 0.5) * 2.0**-53)


def test_drawing_codes_is_one_graph() -> None:
    """Noise and choice compile into one graph, with and without the settings that sort."""
    cells, logits = torch.tensor([[2, 3]] * 4), torch.randn(4, 2, 50, generator=torch.Generator().manual_seed(0))
    for settings in (PLAIN, SampleSettings(guidance=1.0, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, order_temperature=0.0)):
        compiled = torch.compile(draw_codes, backend="eager", fullgraph=True)
        assert torch.equal(compiled(logits, cells, settings, rng(1, images=4)), draw_codes(logits, cells, settings, rng(1, images=4)))


def test_drawing_codes_waits_for_no_device_and_copies_nothing() -> None:
    """On a GPU: a fake one has no values, so that whatever asked for one, or mixed devices, would fail."""
    with FakeTensorMode():
        number = torch.arange(4, device="cuda")[:, None]
        images = CounterRNG(3, number, 0, 16, device_hash("code noise", 3, number, 0))
        logits, cells = torch.zeros(4, 2, 50, device="cuda"), torch.zeros(4, 2, dtype=torch.long, device="cuda")
        settings = SampleSettings(guidance=1.0, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, order_temperature=0.0)
        drawn = draw_codes(logits, cells, settings, images)
        assert (drawn.device.type, drawn.shape) == ("cuda", (4, 2))
