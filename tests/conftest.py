"""What all tests share: a quiet, loopback-only environment, one real S3 server a session, and markers (markers.py)."""

from __future__ import annotations

import fcntl
import gc
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for cluster/dev, which is not part of the installed package

os.environ |= {
    "OMP_NUM_THREADS": "1",
    # Stages set the threads of the whole process. Beside other processes, threads that spin while they wait took five times the CPU time.
    # (A limit of threads below what is set is no way out: oneDNN leaves parts of a bfloat16 product out then, where CPUs have AMX.)
    "OMP_WAIT_POLICY": "passive",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",  # the tests are the same where there is a GPU
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # Ray gives its workers 15: beside busy processes they would hardly ever run
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

from markers import (  # noqa: E402, F401 (hooks)
    pytest_collection_modifyitems,
    pytest_runtest_protocol,
    pytest_xdist_make_scheduler,
    wrap_starters,
)

from cluster.dev import s3  # noqa: E402
from oar_scale.errors import UserError  # noqa: E402
from oar_scale.runtime import ray_session  # noqa: E402

wrap_starters()

# How long an example takes, or making one, says what else the machine does.
settings.register_profile("oar", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("oar")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """What importing the tests and all that they need leaves in memory stays: nobody need look through it for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    """Stages that a test runs set the number of threads of the whole process, by which torch divides sums."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_wandb_of_this_process() -> Iterator[None]:
    """What asks W&B in the tests' own process starts a service there, which other tests would take for that of a process of theirs."""
    yield
    if os.environ.pop("WANDB_SERVICE", None):
        import wandb

        wandb.teardown()


S3_FOLDER = "s3-of-the-session"
"""Of all worker processes of a session: one server is enough for them."""


@pytest.fixture(scope="session")
def s3_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``s3://bucket/prefix`` on a real server of this session; the AWS variables point at it."""
    folder = _session_folder(tmp_path_factory) / S3_FOLDER
    folder.mkdir(exist_ok=True)
    with open(folder / "starting", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the workers starts it, the others find it running
        running = s3.running(str(folder))
        server = s3.up(str(folder), running.port if running else s3.free_port(), "oar-tests")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield f"s3://oar-tests/{uuid.uuid4().hex[:8]}"


_shared_ray = ExitStack()


@pytest.fixture(scope="module")
def shared_ray(s3_root: str) -> None:
    """A private Ray of two CPUs that modules share; it ends before the first test that does not ask for it.

    Its processes know the S3 server from their environment, so that one runs first.
    """
    import ray

    tries = 0
    while not ray.is_initialized():
        tries += 1
        try:
            _shared_ray.enter_context(ray_session.ray_session(cpus=2))
        except UserError:  # Ray waits 30 s for its own processes, which a busy machine may not start in time
            if tries == 3:
                raise


@pytest.fixture
def pool_here() -> Iterator[None]:
    """Pools of this test start no process: their actors are objects of this one (actors_here.py)."""
    from actors_here import pools_here

    with pools_here():
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "shared_ray" not in getattr(item, "fixturenames", ()):
        _shared_ray.close()


_failed: list[str] = []
_not_collected: list[str] = []


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _not_collected.append(report.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.extend([report.nodeid] if report.nodeid not in _failed else [])


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """End what tests share: the Ray of this process and, once all workers have ended, the S3 server.

    Then write the tests that failed into the file that OAR_FAILED_TESTS names. It stays as it is where pytest was interrupted, or where a
    module could not be imported: then not all tests have run. (Processes of xdist run the rest, and say that tests failed.)
    """
    _shared_ray.close()
    gc.unfreeze()  # or Triton complains, as the process ends, of all that still is in memory
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    folders = getattr(session.config, "_tmp_path_factory", None)
    if folders is not None and folders._basetemp is not None:
        s3.down(str(folders._basetemp / S3_FOLDER))
    if exitstatus == pytest.ExitCode.TESTS_FAILED and not _not_collected and "OAR_FAILED_TESTS" in os.environ:
        Path(os.environ["OAR_FAILED_TESTS"]).write_text("".join(f"{name}\n" for name in _failed))


def _session_folder(folders: pytest.TempPathFactory) -> Path:
    base = folders.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
