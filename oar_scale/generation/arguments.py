"""What callers in Python hand over to a loaded model: its types, and checks with one clear error each, before anything is drawn."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from oar_scale.config.schema import GuidanceSchedule, Score
from oar_scale.errors import UserError
from oar_scale.generation.seen_codes import Fill
from oar_scale.orders.selection import Images
from oar_scale.text import shown

Order = str | Sequence[int] | Tensor
"""The way through the cells: the name of a policy (docs/order-policies.md), or a permutation [N] for all images or [B, N] for each."""


class Choices(TypedDict, total=False):
    """Settings that override those of the model's own recipe; see :class:`oar_scale.generation.settings.SampleSettings`."""

    guidance: float
    guidance_schedule: GuidanceSchedule
    guidance_start: float | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    score: Score
    order_temperature: float
    steps: int | None
    draft: int


class EditChoices(Choices, total=False):
    """Arguments of :meth:`oar_scale.generation.pretrained.Pretrained.edit` that other methods pass on."""

    fills: Sequence[Fill]
    ring: int
    feather: float | None
    seed: int
    numbers: Sequence[int] | None
    order: Order | None


MAX_NUMBER, MAX_EDITED = (1 << 63) - 1, (1 << 48) - 1
"""Of a picture, and of one that is edited: what is above tells its steps apart."""


def whole_number(value: object, name: str) -> int:
    """A number of something. Raises UserError for fractions, texts and None."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise UserError(f"{name} {shown(value)} must be a whole number") from error


def given_seed(value: object) -> int:
    """A seed of 64 bits, with or without a sign; of a larger number noise would count these alone. Raises UserError for anything else."""
    seed = whole_number(value, "seed")
    if not -(1 << 63) <= seed < 1 << 64:
        raise UserError(f"seed {shown(seed)} must lie between -2^63 and 2^64 - 1")
    return seed


def image_numbers(given: Sequence[int] | None, count: int, name: str, most: int = MAX_NUMBER) -> Images:
    """A number for each picture, 0, 1, 2 ... where none are given. Raises UserError for another count, or what is no number."""
    if given is None:
        return np.arange(count)
    if not hasattr(given, "__iter__"):
        raise UserError(f"{name} {shown(given)}: a list with a whole number for each picture is wanted")
    numbers = [whole_number(each, f"{name}: the number") for each in given]
    if len(numbers) != count:
        raise UserError(f"{name} has {len(numbers)} of them for {count} pictures")
    wrong = next((number for number in numbers if not 0 <= number <= most), None)
    if wrong is not None:
        raise UserError(f"{name}: {wrong} must lie between 0 and {most}")
    return np.array(numbers, dtype=np.int64)


def check_list(given: object, name: str) -> None:
    """Raise UserError for a single picture or prompt, or none, where a list of them is wanted."""
    if isinstance(given, str | bytes) or not hasattr(given, "__getitem__") or not hasattr(given, "__len__") or not len(given):
        raise UserError(f"{name} are a list with one entry for each picture, at least one: got {shown(given)}")


def given_order(order: Sequence[int] | Tensor, cells: int, count: int) -> Tensor:
    """Permutations of the cells, int64 [count, N] on the CPU, from one for all or one for each. Raises UserError for what is none."""
    try:
        order_BN = torch.as_tensor(order, device="cpu").expand(count, -1)  # also one that a model on a GPU drew along
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"order {shown(order)} is neither the name of a policy nor a permutation of the cells, or {count} of them"
        ) from error
    if order_BN.is_floating_point() or not torch.equal(order_BN.long().sort(1).values, torch.arange(cells).expand(count, -1)):
        raise UserError(f"order {shown(order)} must hold each of the cells 0 to {cells - 1} once")
    return order_BN.long()
