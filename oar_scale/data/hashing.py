"""Randomness that belongs to a sample, not to a process.

Every random choice about a sample (its order, its view, whether its caption is dropped) is a hash of (seed, epoch, sample
uid, purpose): any rank, worker or restart computes the same value, and there is no generator state to save. The hash is
SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), applied once per input word.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # `oar plan` computes the samples of a step without torch
    from torch import Tensor

UInt64Array = NDArray[np.uint64]
_CPU_CHUNK = 2**14
"""Numbers that are hashed at once on a CPU: all that is made on the way stays in a core's cache."""


def splitmix64(x: UInt64Array) -> UInt64Array:
    """One SplitMix64 output for each state, modulo 2**64."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_keys(purpose: str, *keys: int | NDArray[np.generic]) -> UInt64Array:
    """Hash of a purpose and any number of integers or integer arrays (broadcast against each other)."""
    state = splitmix64(np.asarray(zlib.crc32(purpose.encode()), dtype=np.uint64))
    for key in keys:
        state = splitmix64(state ^ np.asarray(key).astype(np.uint64))
    return state


def uniform(purpose: str, *keys: int | NDArray[np.generic]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits, one for each combination of the keys."""
    return (hash_keys(purpose, *keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(purpose: str, bound: int, *keys: int | NDArray[np.generic]) -> NDArray[np.int64]:
    """Integers in [0, bound)."""
    return np.minimum((uniform(purpose, *keys) * bound).astype(np.int64), bound - 1)


def permutations(purpose: str, cells: int, *keys: int | NDArray[np.generic]) -> NDArray[np.int64]:
    """A random permutation of ``range(cells)`` for each combination of the keys: shape [..., cells]."""
    columns = [np.asarray(key)[..., None] for key in keys]
    return np.argsort(hash_keys(purpose, *columns, np.arange(cells)), axis=-1, kind="stable")


def device_permutations(purpose: str, cells: int, *keys: int | Tensor) -> Tensor:
    """:func:`permutations` made on the keys' device in one call: the same numbers, int64 [..., cells].

    Args:
        keys: integers and int64 tensors [...] (broadcast against each other), at least one of them a tensor.
    """
    import torch

    columns = [key[..., None] if isinstance(key, torch.Tensor) else key for key in keys]
    device = next(key.device for key in keys if isinstance(key, torch.Tensor))
    state = device_hash(purpose, *columns, torch.arange(cells, device=device))
    return (state ^ _signed(1 << 63)).argsort(dim=-1, stable=True)  # signed numbers in the order of the unsigned ones


def device_uniform(purpose: str, *keys: int | Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64, made on the keys' device; neither 0 nor 1. The keys as in :func:`device_permutations`."""
    bits = device_hash(purpose, *keys) >> 11 & (1 << 53) - 1
    return ((bits.double() + 0.5) * 2.0**-53).clamp_max(1 - 2.0**-53)  # half of the sums round to even: the last one to 1


def device_gumbel(state: Tensor, *keys: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 and finite, for what :func:`device_hash` gave and keys that follow its own; the last one is [V]."""
    from torch import float32

    *leading, last_V = keys
    for key in leading:
        state = _splitmix64(state ^ key)
    if state.device.type != "cpu":
        return _gumbel(_splitmix64(state ^ last_V))
    # Row by row the many steps of it stay in the cache of a core.
    rows = max(1, _CPU_CHUNK // len(last_V))
    noise = state.new_empty((*state.shape[:-1], len(last_V)), dtype=float32)
    for piece_R1, noise_RV in zip(state.reshape(-1, 1).split(rows), noise.flatten(0, -2).split(rows), strict=True):
        noise_RV.copy_(_gumbel(_splitmix64(piece_R1 ^ last_V)))
    return noise


def _gumbel(hashed: Tensor) -> Tensor:
    """Standard Gumbel noise of hashes, which it overwrites."""
    bits = hashed.bitwise_right_shift_(12).bitwise_and_((1 << 52) - 1)
    # The inner logarithm in float64: float32 has no numbers near enough to 1 for the largest values.
    return bits.double().add_(0.5).mul_(2.0**-52).log_().neg_().float().log_().neg_()


def derived_seed(purpose: str, *keys: int) -> int:
    """A seed below 2**63 of a purpose's own: whatever it seeds has nothing in common with what another purpose does with the same keys."""
    return int(hash_keys(purpose, *keys)) >> 1


def device_hash(purpose: str, *keys: int | Tensor) -> Tensor:
    """:func:`hash_keys`, as the int64 with the same bits. Integers before the first tensor are hashed on the host."""
    leading, state = list[int](), None
    for key in keys:
        if state is not None:
            state = _splitmix64(state ^ (signed_bits(key) if isinstance(key, int) else key))
        elif isinstance(key, int):
            leading.append(_bits(key))
        else:
            state = _splitmix64(_signed(int(hash_keys(purpose, *leading))) ^ key)
    assert state is not None, "one of the keys is a tensor"
    return state


def _splitmix64(x: Tensor) -> Tensor:
    """:func:`splitmix64` on int64, whose sums and products keep the same 64 bits; only the shifts must not copy the sign."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x.bitwise_xor_((x >> 30).bitwise_and_((1 << 34) - 1)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_((x >> 27).bitwise_and_((1 << 37) - 1)).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def signed_bits(key: int) -> int:
    """An integer as the int64 with its lowest 64 bits, which the hash counts: of a key in a tensor."""
    return _signed(_bits(key))


def _bits(key: int) -> int:
    return key & (1 << 64) - 1


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >= 1 << 63 else bits


def name_bytes(name: str) -> bytes:
    """The bytes of a name or key as it stands in a tar or on a disk; those that are not UTF-8 are lone surrogates in Python."""
    return name.encode("utf-8", "surrogateescape")


def image_numbers(keys: Sequence[str]) -> NDArray[np.int64]:
    """The number [S] of each sample that random numbers of its own order come from (``orders.selection.Images``): a checksum of its key."""
    return np.array([zlib.crc32(name_bytes(key)) for key in keys], dtype=np.int64)


def name_hash(name: str, purpose: str) -> float:
    """Uniform number in [0, 1) of a name: always the same, independent of any seed."""
    return float(name_hashes([name], purpose)[0])


def name_hashes(names: Sequence[str], purpose: str) -> NDArray[np.float64]:
    """:func:`name_hash` of many names at once."""
    return uniform(purpose, *name_keys(names))


def name_keys(names: Sequence[str]) -> tuple[UInt64Array, UInt64Array]:
    """Two numbers [S] of each name, to be hashed with others: its checksums from either end."""
    encoded = [name_bytes(name) for name in names]
    low_S, high_S = (np.array([zlib.crc32(data[::step]) for data in encoded], dtype=np.uint64) for step in (1, -1))
    return low_S, high_S
