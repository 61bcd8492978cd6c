"""Who may ask ``oar serve``, and what its answers let a browser do."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from served import Served, served
from starlette.datastructures import Headers

from oar_scale.generation.pretrained import Pretrained
from oar_scale.serve.api_errors import ApiError
from oar_scale.serve.guard import Access
from oar_scale.serve.listening import access_to

TOKEN = "a token of the tests"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def closed(drawer: Pretrained) -> Iterator[Served]:
    with served(drawer, token=TOKEN) as running:
        yield running


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST"])
def test_names_of_loopback_are_answered(server: Served, host: str) -> None:
    with server.http() as client:
        assert client.get("/api/model", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "[::1", "", "127.0.0.2"])
def test_other_names_are_refused(server: Served, host: str) -> None:
    """A page whose name was made to lead to us (DNS rebinding) reads nothing."""
    with server.http() as client:
        for path in ("/", "/api/model", "/metrics"):
            answer = client.get(path, headers={"Host": host})
            assert answer.status_code == 400 and (answer.json()["error"]["code"] == "wrong_host")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost", "http://["])
def test_pages_of_other_sites_start_nothing(server: Served, origin: str) -> None:
    with server.http() as client:
        answer = client.post("/v1/images/edits", data={"prompt": "x"}, files={"image": b"x"}, headers={"Origin": origin})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "wrong_origin"
        own = client.post("/api/jobs", json={"prompt": "a red apple"}, headers={"Origin": server.url})
        assert own.status_code == 202


def test_json_is_taken_as_json_alone(server: Served) -> None:
    """A form of another site can send text, but not under this type without asking first."""
    with server.http() as client:
        answer = client.post("/api/jobs", content=b'{"prompt": "a red apple"}', headers={"Content-Type": "text/plain"})
        assert answer.status_code == 400


def test_no_other_site_may_read_answers(server: Served) -> None:
    with server.http() as client:
        asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        for answer in (client.get("/api/model", headers=asked), client.options("/api/jobs", headers=asked)):
            assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/api/model", "/healthz", "/nowhere", "/metrics", "/openapi.json"])
def test_every_answer_keeps_the_browser_to_our_files(server: Served, path: str) -> None:
    with server.http() as client:
        headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data: blob:"
    assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "\xe9"}],
    ids=["none", "empty", "wrong", "basic", "latin"],
)
def test_without_the_token_there_is_nothing(closed: Served, headers: dict[str, str]) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    for method, path in (
        ("GET", "/api/model"),
        ("POST", "/api/jobs"),
        ("GET", "/metrics"),
        ("GET", "/api/images/x.png"),
        ("GET", "/v1/models"),
    ):
        answer = httpx.request(method, f"{closed.url}{path}", headers=encoded, trust_env=False)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(("host", "status"), [("127.0.0.2:80", 200), ("localhost", 200), ("127.0.0.3", 400)])
def test_a_server_answers_to_the_address_it_listens_on(host: str, status: int) -> None:
    access = Access("127.0.0.2", None)
    if status == 200:
        access.check("GET", "/", Headers({"host": host}))
    else:
        with pytest.raises(ApiError, match="answers to localhost"):
            access.check("GET", "/", Headers({"host": host}))


def test_a_token_in_an_address_is_not_looked_at(closed: Served) -> None:
    for name in ("token", "access_token", "api_key"):
        assert httpx.get(f"{closed.url}/api/model", params={name: TOKEN}, trust_env=False).status_code == 401


def test_the_token_opens_and_health_needs_none(closed: Served) -> None:
    with closed.http() as client:
        assert client.get("/api/model").status_code == 200
        elsewhere = client.post(
            "/api/jobs", json={"prompt": "a red apple"}, headers={"Origin": "https://proxy.example", "Host": "proxy.example"}
        )
        assert elsewhere.status_code == 202
    assert httpx.get(f"{closed.url}/healthz", trust_env=False).json()["ready"]
    assert httpx.head(f"{closed.url}/healthz", trust_env=False).status_code == 200


def test_a_line_break_behind_the_token_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a file or a Kubernetes Secret: no header can end in one."""
    monkeypatch.setenv("OAR_SERVE_TOKEN", f"{TOKEN}\n")
    access_to("0.0.0.0", None).check("GET", "/api/model", Headers({"authorization": f"Bearer {TOKEN}", "host": "h"}))
