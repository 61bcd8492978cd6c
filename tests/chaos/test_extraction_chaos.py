"""A few of the trials of ``extraction_chaos.py``, always the same ones; and the whole of ``emoji_chaos.py``, which is slow."""

from __future__ import annotations

from pathlib import Path

import emoji_chaos
import extraction_chaos
import pytest

SEED = 5


def test_disturbed_job_arrays_leave_what_an_undisturbed_one_leaves(tmp_path: Path) -> None:
    happened = extraction_chaos.run_trials(range(6), SEED, str(tmp_path), extraction_chaos.QUICK, failing=0)
    assert happened["on S3"] and happened["on a folder"] and happened["broken sample"]
    assert happened["array tasks killed"] and happened["array tasks killed with their node"] and happened["killed inside the table"]
    assert happened["event taken_over"] and happened["event retry"]


def test_disturbed_ray_pools_leave_what_an_undisturbed_one_leaves(tmp_path: Path) -> None:
    happened = extraction_chaos.run_trials(range(3), SEED, str(tmp_path), ("driver", "node", "two pools"), failing=0)
    assert happened["drivers killed"] and happened["nodes killed"] and happened["trial: two pools"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_drawings_have_the_same_orders_when_the_pool_is_killed_ten_times(tmp_path: Path) -> None:
    happened = emoji_chaos.run(str(tmp_path), str(tmp_path / "killed"), images=160, kills=10, seed=0)
    assert sum(count for kind, count in happened.items() if kind.endswith("killed")) == 10
