"""What a user reads when S3 refuses, and what a run survives when the network breaks: on the real server."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from oar_scale.errors import UserError
from oar_scale.storage import Missing, join, open_storage


def _all_verbs(uri: str, path: str) -> list[tuple[str, UserError]]:
    """What each verb raises."""
    storage = open_storage(uri)
    Path(path).write_bytes(b"x")
    verbs: dict[str, Callable[[], object]] = {
        "read": lambda: storage.read(uri),
        "write": lambda: storage.write(uri, b"x"),
        "claim": lambda: storage.write(uri, b"x", if_absent=True),
        "exists": lambda: storage.exists(uri),
        "list": lambda: storage.list(uri),
        "upload": lambda: storage.upload(path, uri),
        "download": lambda: storage.download(uri, path),
    }
    raised = []
    for name, verb in verbs.items():
        with pytest.raises(UserError) as caught:
            verb()
        raised.append((name, caught.value))
    return raised


@pytest.mark.parametrize(("variable", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody")])
def test_wrong_credentials_name_the_uri_and_the_variables(
    variable: str, value: str, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    uri = join(s3_root, "x")
    for verb, error in _all_verbs(uri, str(tmp_path / "x")):
        assert str(error).startswith(uri), verb
        assert variable in str(error) and os.environ["AWS_ENDPOINT_URL"] in str(error), verb
        assert not isinstance(error, Missing), verb
        assert "oar-dev-secret" not in str(error), verb


def test_no_credentials_at_all_name_the_variables(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for verb, error in _all_verbs(join(s3_root, "x"), str(tmp_path / "x")):
        assert "no S3 credentials" in str(error) and "AWS_ACCESS_KEY_ID" in str(error), verb


def test_a_missing_bucket_is_not_a_missing_object(s3_root: str, tmp_path: Path) -> None:
    for verb, error in _all_verbs("s3://no-such-bucket/x", str(tmp_path / "x")):
        assert "there is no bucket 'no-such-bucket'" in str(error) and "storage.root" in str(error), verb


def test_an_unreachable_server_is_named(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"  # bound, but nobody listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        for verb, error in _all_verbs(join(s3_root, "x"), str(tmp_path / "x")):
            assert f"no connection to the S3 server at {endpoint}" in str(error) and "AWS_ENDPOINT_URL" in str(error), verb


class FlakyProxy:
    """A TCP proxy to the S3 server; once ``arm``-ed, it cuts that many answers, each after ``allow`` bytes."""

    def __init__(self, target_port: int) -> None:
        self.cuts, self.allow, self.target_port = 0, 0, target_port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, cuts: int, allow: int) -> None:
        self.cuts, self.allow = cuts, allow

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return  # closed at the end of the test
            server = socket.create_connection(("127.0.0.1", self.target_port))
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        passed = 0
        try:
            while data := source.recv(65536):
                if answers and self.cuts:
                    if passed + len(data) > self.allow:
                        self.cuts -= 1
                        target.sendall(data[: self.allow - passed])
                        break
                    passed += len(data)
                target.sendall(data)
        except OSError:
            pass  # the other direction has ended: so does this one
        hang_up(source)
        hang_up(target)


def hang_up(end: socket.socket) -> None:
    with suppress(OSError):  # already gone
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@pytest.fixture
def proxy(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    """A proxy that S3 clients of this test talk to."""
    proxy = FlakyProxy(int(os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    hang_up(proxy.listener)


def test_a_broken_read_is_continued(s3_root: str, proxy: FlakyProxy) -> None:
    uri, content = join(s3_root, "long"), os.urandom(12 << 20)
    open_storage(uri).write(uri, content)
    proxy.arm(cuts=2, allow=5 << 20)
    assert open_storage(uri).read(uri, 7) == content[7:]
    assert proxy.cuts == 0


def test_a_broken_download_is_continued(s3_root: str, proxy: FlakyProxy, tmp_path: Path) -> None:
    uri, content = join(s3_root, "long"), os.urandom(12 << 20)
    open_storage(uri).write(uri, content)
    proxy.arm(cuts=1, allow=5 << 20)
    open_storage(uri).download(uri, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == content
    assert proxy.cuts == 0


def test_a_claim_whose_answer_was_lost_is_still_ours(s3_root: str, proxy: FlakyProxy) -> None:
    storage, uri = open_storage(s3_root), join(s3_root, "claim-through-a-storm")
    storage.write(join(s3_root, "warm-up"), b"")
    proxy.arm(cuts=1, allow=0)
    assert storage.write(uri, b"mine", if_absent=True)
    assert proxy.cuts == 0
    assert not storage.write(uri, b"theirs", if_absent=True)
    assert storage.read(uri) == b"mine"
