"""Waiting for a cluster's nodes. The query is a small program here; tests of real clusters wait with the real one."""

from types import SimpleNamespace

import pytest

from oar_scale.launch import ray_ready


def test_a_slow_query_is_given_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the import of Ray takes longer than the first timeout, a later query still has the time that it needs."""
    monkeypatch.setattr(ray_ready, "QUESTION", "import time; time.sleep(2); print(2)")
    monkeypatch.setattr(ray_ready, "ANSWER_S", 0.5)
    assert ray_ready.main(2, 600) == 0


def test_too_few_nodes_are_named_when_time_is_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has the count of nodes that answered, if any did."""
    monkeypatch.setattr(ray_ready, "QUESTION", "print(1)")
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(ray_ready, "time", SimpleNamespace(monotonic=lambda: float(next(clock)), sleep=lambda _: None))
    assert ray_ready.main(2, 300) == 1
    assert "1 of 2 nodes after 300 s" in capsys.readouterr().err
