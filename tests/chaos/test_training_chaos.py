"""A few of the trials of ``training_chaos.py``, always the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from training_chaos import Ground, run_trial

pytestmark = pytest.mark.slow
TRIALS = range(4)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(str(tmp_path_factory.mktemp("chaos")))


@pytest.fixture(scope="module")
def s3(s3_root: str) -> Iterator[tuple[str, FaultProxy]]:
    import os

    proxy = FaultProxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield f"{s3_root}/chaos", proxy
    proxy.close()


@pytest.mark.parametrize("number", TRIALS)
def test_a_disturbed_training_ends_as_an_undisturbed_one(ground: Ground, s3: tuple[str, FaultProxy], number: int, tmp_path: Path) -> None:
    trial = run_trial(ground, number, 0, s3)
    assert trial.attempts >= 1
