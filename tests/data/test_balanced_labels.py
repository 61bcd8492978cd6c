"""Labels for a sample that stands for a data set: each equally often, in an order that hangs on the seed alone."""

from collections import Counter

import pytest

from oar_scale.data.balanced_labels import balanced_labels
from oar_scale.errors import UserError


def test_fifty_thousand_images_are_fifty_of_each_class() -> None:
    given = balanced_labels(1000, 50_000, seed=0)
    labels = [int(str(each.prompt)) for each in given]
    assert set(Counter(labels).values()) == {50} and set(labels) == set(range(1000))
    assert [each.number for each in given] == list(range(50_000)) and {each.seed for each in given} == {0}
    assert len(set(labels[:1000])) > 600, "a part of the sample is of all classes, not of the first ones"


def test_the_order_is_that_of_the_seed() -> None:
    assert balanced_labels(7, 21, seed=-1) == balanced_labels(7, 21, seed=-1)
    assert [each.prompt for each in balanced_labels(7, 21, seed=1)] != [each.prompt for each in balanced_labels(7, 21, seed=2)]


def test_images_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(UserError, match=r"--images 1: not a multiple of the model's 10 classes. Nearest that is: 10"):
        balanced_labels(10, 1, seed=0)
