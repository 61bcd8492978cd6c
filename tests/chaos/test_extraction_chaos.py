"""A few of the trials of ``extraction_chaos.py``, always the same ones; and the whole of ``emoji_chaos.py``, which is slow."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import emoji_chaos
import extraction_chaos
import pool_chaos
import pytest
from pool_worker import TableWriter

from oar_scale.orders.order_table import table_name
from oar_scale.shard_pool import ArrayTask, Ledger, Timing, run_pool
from oar_scale.storage import join, open_storage

SEED = 5
ARRAY_SEED = 93
"""One of those whose first four trials have all that is asserted: a broken sample, a folder and S3, a kill inside a table."""


def test_disturbed_job_arrays_leave_what_a_calm_one_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")  # an outage need not be long to be longer than these
    happened = extraction_chaos.run_trials(range(4), ARRAY_SEED, str(tmp_path), extraction_chaos.QUICK, failing=0)
    assert happened["on S3"] and happened["on a folder"] and happened["broken sample"]
    assert happened["array tasks killed"] and happened["array tasks killed with their node"] and happened["killed inside the table"]
    assert happened["event taken_over"] and happened["event retry"] and happened["outages"] > 1


def test_disturbed_ray_pools_leave_what_a_calm_one_leaves(tmp_path: Path) -> None:
    scenarios = ("driver", "node", "two pools", "actor", "terminate", "sick node")
    happened = extraction_chaos.run_trials(range(6), SEED, str(tmp_path), scenarios, failing=0, disturbances=1)
    assert happened["drivers killed"] and happened["nodes killed"] and happened["trial: two pools"]
    assert happened["actors killed"] and happened["drivers asked to stop"] and happened["event retry"] and happened["trial: sick node"]


def test_a_storage_that_fails_every_fifth_call_changes_nothing(tmp_path: Path) -> None:
    shards = extraction_chaos.SHARDS[:2]
    with pool_chaos.s3_with_faults(str(tmp_path)) as (root, proxy):
        proxy.reset(seed=SEED)
        pool_chaos.fail_a_fifth(proxy)
        make = partial(TableWriter, root, str(tmp_path / "log"))
        report = run_pool(make, shards, join(root, "ledger"), actors=1, array=ArrayTask(0, 1), timing=Timing(patience_s=60))
        failed = proxy.injected.total()
        proxy.reset()
        assert failed >= 3 and list(report.done) == shards and not report.poison
        assert Ledger(join(root, "ledger")).done() == set(shards)
        for shard in shards:
            assert open_storage(root).read(join(root, table_name(shard))) == extraction_chaos.calm(shard)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_drawings_have_the_same_orders_when_killed_ten_times(tmp_path: Path) -> None:
    happened = emoji_chaos.run(str(tmp_path), str(tmp_path / "killed"), images=160, kills=10, seed=0)
    assert sum(count for kind, count in happened.items() if kind.endswith("killed")) == 10
