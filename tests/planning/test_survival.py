"""Failures cost what they cost: the simulation agrees with the formula, and with itself."""

from __future__ import annotations

import math

import pytest

from oar_scale.planning.failures import YEAR_S, CheckpointTiming, best_interval, between_failures, simulate_failures

DAY = 86400.0
SAVING = CheckpointTiming(interval_s=3600, stall_s=30, upload_s=60, restart_s=300, between_failures_s=2 * DAY)


def goodput(interval_s: float, work_s: float = 200 * DAY, between_s: float = 2 * DAY) -> float:
    return simulate_failures(work_s, CheckpointTiming(interval_s, 30, 60, 300, between_s), seed=1, runs=100).goodput


def test_llama_3s_rate_is_a_failure_every_three_hours() -> None:
    """Llama 3s rate is a failure in three hours on sixteen thousand gpus."""
    assert between_failures(466 / (16384 * 54 / 365.25), 16384) / 3600 == pytest.approx(54 * 24 / 466)
    assert between_failures(1.0, 1) == YEAR_S and math.isinf(between_failures(0.0, 512))


def test_without_failures_only_the_saves_cost_time() -> None:
    lived = simulate_failures(10 * 3600 + 1, CheckpointTiming(3600, 36, 60, 300, math.inf), seed=0)
    assert (lived.failures, lived.lost_hours) == (0, 0) and lived.goodput == pytest.approx(0.99, abs=0.001)


def test_the_same_seed_lives_the_same_lives() -> None:
    assert (
        simulate_failures(30 * DAY, SAVING, seed=3)
        == simulate_failures(30 * DAY, SAVING, seed=3)
        != simulate_failures(30 * DAY, SAVING, seed=4)
    )


def test_failures_come_as_often_as_they_should() -> None:
    lived = simulate_failures(100 * DAY, SAVING, seed=0)
    assert lived.failures == pytest.approx(lived.hours / 48, rel=0.05)


def test_a_failure_costs_half_an_interval_and_a_restart() -> None:
    """The expected loss is half an interval an upload and a restart."""
    lived = simulate_failures(200 * DAY, SAVING, seed=0)
    assert lived.lost_hours * 3600 / lived.failures == pytest.approx(3600 / 2 + 60 + 300, rel=0.06)


def test_dalys_interval_beats_shorter_and_longer_ones() -> None:
    best = best_interval(30, 2 * DAY)
    assert best == pytest.approx(math.sqrt(2 * 30 * 2 * DAY), rel=0.02)
    assert goodput(best) > max(goodput(best / 5), goodput(best * 5))
    assert goodput(best) > 0.99 * max(goodput(best / 1.5), goodput(best * 1.5))


def test_where_saves_are_slow_daly_saves_once_a_life() -> None:
    """Where a save takes as long as a life daly saves once a life."""
    assert best_interval(100, 40) == 40 and math.isinf(best_interval(30, math.inf))


def test_a_run_that_dies_before_its_first_save_never_ends() -> None:
    """A run that dies before its first save gets nowhere and the simulation ends."""
    lived = simulate_failures(10 * DAY, CheckpointTiming(DAY, 30, 60, 300, 3600), seed=0, runs=10)
    assert math.isinf(lived.hours) and lived.goodput == 0
