"""Every figure a plan takes for granted has a source and a date, and can be replaced."""

from __future__ import annotations

import re

import pytest

from oar_scale.errors import UserError
from oar_scale.planning.assumptions import GIVEN, read_assumptions
from oar_scale.planning.cluster import CPU
from oar_scale.planning.plan_report import as_text
from oar_scale.runtime.gpu_peaks import peak_flops
from tests.planning.test_oar_plan import plan

FIGURES = read_assumptions()._figures


@pytest.mark.parametrize("key", FIGURES)
def test_every_figure_has_a_source_and_the_month_it_was_read_in(key: str) -> None:
    one = FIGURES[key]
    assert one.value >= 0 and len(one.source) > 10 and re.fullmatch(r"20\d\d-\d\d", one.date)


@pytest.mark.parametrize("gpu", [gpu for gpu in read_assumptions()._labels if gpu != CPU])
def test_a_gpus_peak_is_the_one_of_trainings_mfu(gpu: str) -> None:
    """A gpus peak is the one that training reports its mfu against."""
    assumed = read_assumptions()
    assert assumed(f"gpus.{gpu}.bf16_tflops") * 1e12 == peak_flops(assumed.gpu_label(gpu), "bf16")


def test_any_figure_can_be_replaced_and_then_says_so() -> None:
    assumed = read_assumptions(["storage.s3_read_gb_s=5", "gpus.h200.price_per_hour=2.5"])
    assert assumed("storage.s3_read_gb_s") == 5 and assumed("gpus.h200.price_per_hour") == 2.5
    assert {one.source for one in assumed.used()} == {GIVEN}


def test_only_the_figures_that_were_asked_for_count_as_used() -> None:
    assumed = read_assumptions()
    assumed("time.pcie_gb_s")
    assert [one.key for one in assumed.used()] == ["time.pcie_gb_s"]


@pytest.mark.parametrize("wrong", ["storage.s3_read=5", "time.pcie_gb_s", "time.pcie_gb_s=fast", "time.pcie_gb_s=-1", "time.pcie_gb_s=nan"])
def test_what_cannot_be_assumed_is_one_clear_error(wrong: str) -> None:
    with pytest.raises(UserError, match="--assume") as raised:
        read_assumptions([wrong])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["mfu.up_to_1b.value", "time.extraction_mfu", "time.hidden_share", "time.network_efficiency"])
def test_a_share_of_more_than_all_cannot_be_assumed(key: str) -> None:
    with pytest.raises(UserError, match=rf"--assume {key}=3: a share of the whole is at most 1"):
        read_assumptions([f"{key}=3"])
    assert read_assumptions([f"{key}=1"])(key) == 1


@pytest.mark.parametrize("count", ["0", "0.5", "10.5"])
def test_a_data_set_has_a_whole_number_of_images(count: str) -> None:
    with pytest.raises(UserError, match=r"data_sets\.imagenet=.*a whole number from 1"):
        read_assumptions([f"data_sets.imagenet={count}"])


def test_a_near_miss_is_answered_with_the_key_that_was_meant() -> None:
    with pytest.raises(UserError, match=r"Did you mean .*storage\.s3_read_gb_s"):
        read_assumptions(["storage.s3_read_gbs=5"])


def test_larger_models_take_the_mfu_of_their_size() -> None:
    assumed = read_assumptions()
    assert [assumed.mfu(count) for count in (10**8, 7 * 10**8, 3 * 10**9, 7 * 10**9, 13 * 10**9)] == [0.27, 0.35, 0.41, 0.46, 0.40]


def test_the_longest_name_of_a_data_set_counts() -> None:
    assumed = read_assumptions()
    assert assumed.data_set(["imagenet-xl"]) == 1_281_167 and assumed.data_set(["emoji"]) == 10_856
    assert assumed.data_set(["mine"]) is None


def test_an_assumption_of_zero_is_one_line_or_a_plan() -> None:
    for key in [each.key for each in plan("imagenet").assumptions]:
        try:
            as_text(plan("imagenet", assume=[f"{key}=0"]))
        except UserError as error:
            assert "--assume" in str(error) or "does not fit" in str(error)
