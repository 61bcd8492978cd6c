"""A storage that does not answer for a while, where what is read decides whether a run can start."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from small_run import small_recipe

from oar_scale import pipeline
from oar_scale.config.schema import DataConfig, WebDatasetSource
from oar_scale.data import prepare
from oar_scale.data.manifest import read_manifest
from oar_scale.data.notes import Notes
from oar_scale.data.sources import SourceImage
from oar_scale.data.sources.webdataset import WebDatasetImages
from oar_scale.distributed.checkpoints.layout import committed_steps
from oar_scale.errors import Unreachable, UserError
from oar_scale.run.context import Run
from oar_scale.runtime import retry
from oar_scale.stages import train as train_stage
from oar_scale.storage import Missing, open_storage
from oar_scale.storage.background import in_order
from oar_scale.storage.patience import patience_s, patient
from oar_scale.storage.s3 import S3Storage


class Outage:
    """The next ``requests`` of any kind to S3 find it out of reach; after them it answers, and has no objects."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests = 0
        monkeypatch.setattr(retry, "FIRST_S", 0.001)
        for name in ("read", "list", "write", "exists", "version"):
            monkeypatch.setattr(S3Storage, name, self._answering({"list": [], "write": True, "exists": False}.get(name)))

    def _answering(self, answer: Any) -> Any:
        def request(storage: S3Storage, uri: str, *rest: object, **options: object) -> Any:
            if self.requests:
                self.requests -= 1
                raise Unreachable(f"{uri}: no connection to the S3 server")
            if answer is None:
                raise Missing(uri)
            return answer

        return request


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    return Outage(monkeypatch)


def test_what_is_read_at_a_start_waits_for_the_storage(outage: Outage) -> None:
    outage.requests = 3
    with patient(600), pytest.raises(UserError, match=r"no manifest\.json"):
        read_manifest("s3://bucket/run/tokens/train")
    outage.requests = 3
    with patient(600):
        assert committed_steps("s3://bucket/run/checkpoints/pretrain") == []
    assert outage.requests == 0


def test_without_patience_an_outage_is_an_error_at_once(outage: Outage) -> None:
    outage.requests = 1
    with pytest.raises(Unreachable):
        read_manifest("s3://bucket/run/tokens/train")
    with patient(0.0):
        outage.requests = 1
        with pytest.raises(Unreachable):
            read_manifest("s3://bucket/run/tokens/train")


def test_patience_is_that_of_one_thread(outage: Outage) -> None:
    """What threads do beside it has rules of its own: an upload must not wait twenty minutes for each request."""
    outage.requests = 1
    with patient(600), ThreadPoolExecutor(1) as pool, pytest.raises(Unreachable):
        pool.submit(committed_steps, "s3://bucket/run/checkpoints/pretrain").result()


def test_what_a_stage_reads_in_threads_waits_for_it(outage: Outage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage data begins anew where it fails: hours of work."""

    class Pictures:
        notes = Notes()

        def images(self) -> Iterator[SourceImage]:
            yield SourceImage("k", "k", lambda size: open_storage("s3://bucket/k.png").read("s3://bucket/k.png"))  # type: ignore[arg-type, return-value]

    shard = WebDatasetSource(type="webdataset", url="s3://bucket/00000.tar")
    with monkeypatch.context() as there:
        there.setattr(S3Storage, "exists", lambda *_: True)
        pictures = WebDatasetImages(shard)
    outage.requests = 3
    with patient(600), pytest.raises(Missing):
        list(pictures.images())
    assert outage.requests == 0
    monkeypatch.setattr(prepare, "open_source", lambda source: Pictures())
    outage.requests = 3
    with patient(600), pytest.raises(Missing):
        prepare.prepare_images(DataConfig(source=shard), str(tmp_path))
    assert outage.requests == 0


def test_creating_an_object_is_not_repeated(outage: Outage) -> None:
    """Where an answer is lost, a second try would take the object that it has made for another's."""
    uri = "s3://bucket/lease"
    with patient(600):
        outage.requests = 1
        assert open_storage(uri).write(uri, b"x")
        outage.requests = 1
        with pytest.raises(Unreachable):
            open_storage(uri).write(uri, b"x", if_absent=True)


def test_a_training_stage_starts_when_the_storage_is_back(outage: Outage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails by what it then finds in the storage, which is nothing, and not by the outage."""
    run = Run(small_recipe(str(tmp_path), storage={"root": "s3://bucket/run"}))
    outage.requests = 5
    with pytest.raises(UserError, match=r"no manifest\.json"):
        train_stage.run_train(run, "pretrain")
    assert outage.requests == 0


def test_a_run_starts_when_the_storage_is_back(outage: Outage, tmp_path: Path) -> None:
    """It finds an empty storage there, and says what it needs."""
    run = Run(small_recipe(str(tmp_path), storage={"root": "s3://bucket/run"}))
    outage.requests = 3
    with pytest.raises(UserError, match="pretrain needs stage data, which is not finished"):
        pipeline.run_stage(run, "pretrain")
    assert outage.requests == 0


def test_threads_of_in_order_are_as_patient_as_their_caller() -> None:
    with patient(600):
        assert list(in_order(lambda _: patience_s(), [1, 2, 3], 3)) == [600] * 3
