"""One small model and one server for most tests of a module."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from served import Served, load, served

from oar_scale.generation.continuous import ContinuousBatch, Progress
from oar_scale.generation.pretrained import Pretrained


@pytest.fixture(scope="session")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return load(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def server(drawer: Pretrained) -> Iterator[Served]:
    with served(drawer) as running:
        yield running


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No pass of any batch begins until it is set."""
    opened, step = threading.Event(), ContinuousBatch.step

    def late(batch: ContinuousBatch) -> list[Progress]:
        opened.wait()
        return step(batch)

    monkeypatch.setattr(ContinuousBatch, "step", late)
    yield opened
    opened.set()
