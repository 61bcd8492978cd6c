"""What all tests share: a quiet, loopback-only environment and one real S3 server a session."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for cluster/dev, which is not part of the installed package

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",  # the tests are the same where there is a GPU
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DEDUP_LOGS": "0",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    # The developer's own AWS account stays out of it, and nobody asks the metadata service of a cloud.
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
    os.environ.pop(name, None)

# How long an example takes, or making one, says what else the machine does.
settings.register_profile("oar", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("oar")


@pytest.fixture(autouse=True)
def _no_wandb_of_this_process() -> Iterator[None]:
    """What asks W&B in the tests' own process starts a service there, which other tests would take for that of a process of theirs."""
    yield
    if os.environ.pop("WANDB_SERVICE", None):
        import wandb

        wandb.teardown()


@pytest.fixture(scope="session")
def s3_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``s3://bucket/prefix`` on a real server of this session; the AWS variables point at it."""
    from cluster.dev import s3

    folder = str(tmp_path_factory.mktemp("s3"))
    try:
        server = s3.up(folder, s3.free_port(), "oar-tests")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.env.items():
                patch.setenv(name, value)
            yield f"s3://oar-tests/{uuid.uuid4().hex[:8]}"
    finally:
        s3.down(folder)
