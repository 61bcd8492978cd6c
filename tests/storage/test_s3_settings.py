"""Settings of S3 that fail before a request is sent: one error that names the variable or the file, without a key in it.

No server is needed: nothing listens at the address, and most cases never get so far.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oar_scale.cli import main
from oar_scale.errors import UserError
from oar_scale.storage import open_storage
from oar_scale.storage.s3_client import TRIES, client, explained

KEY, SECRET, SESSION = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "FwoGZXIvYXdzEJr"
ABSENT = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
NOBODY = "http://127.0.0.1:1"
FILES = {
    "broken": "[default\nx=1\n",
    "binary": "\xff\xfe\x00\x01",
    "sso": "[profile p]\nsso_start_url=https://x.invalid/start\nsso_region=eu-west-1\nsso_account_id=1\nsso_role_name=r\nregion=eu-west-1\n",
    "sso-session": "[profile p]\nsso_session=s\nsso_account_id=1\nsso_role_name=r\n[sso-session s]\nsso_start_url=https://x.invalid\n"
    "sso_region=eu-west-1\n",
    "fails": "[profile p]\ncredential_process=/bin/false\n",
    "prints": f"[profile p]\ncredential_process=/bin/echo no json {SECRET}\n",
    "partly": '[profile p]\ncredential_process=/bin/echo {"Version":1}\n',
    "absent": "[profile p]\ncredential_process=/no/such/program\n",
    "role": "[profile p]\nrole_arn=arn:aws:iam::1:role/x\nsource_profile=nowhere\n",
    "loop": "[profile p]\nrole_arn=x\nsource_profile=q\n[profile q]\nrole_arn=y\nsource_profile=p\n",
    "endpoint": "[default]\nendpoint_url = localhost:9\n",
    "address": "[default]\ns3 =\n  addressing_style = sideways\n",
}
PROFILE = {**ABSENT, "AWS_PROFILE": "p"}
CASES: dict[str, tuple[dict[str, str], str]] = {
    "endpoint without a scheme": ({"AWS_ENDPOINT_URL": "127.0.0.1:1"}, "AWS_ENDPOINT_URL"),
    "endpoint without a host": ({"AWS_ENDPOINT_URL": "http://"}, "AWS_ENDPOINT_URL"),
    "endpoint with another port": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:99999"}, "AWS_ENDPOINT_URL"),
    "endpoint with a blank": ({"AWS_ENDPOINT_URL": "http://a b:1"}, "AWS_ENDPOINT_URL"),
    "endpoint with a bracket": ({"AWS_ENDPOINT_URL": "http://[::1"}, "AWS_ENDPOINT_URL"),
    "endpoint of S3 alone": ({"AWS_ENDPOINT_URL_S3": "localhost"}, "AWS_ENDPOINT_URL_S3"),
    "tries in words": ({"AWS_MAX_ATTEMPTS": "many"}, "AWS_MAX_ATTEMPTS"),
    "tries without end": ({"AWS_MAX_ATTEMPTS": "9" * 5000}, "is not a number of tries"),
    "endpoint with a name that is none": ({"AWS_ENDPOINT_URL": "http://my_host:9"}, "Invalid endpoint: http://my_host:9"),
    "endpoint in the file": ({"AWS_ENDPOINT_URL": "", "AWS_CONFIG_FILE": "{endpoint}"}, "Invalid endpoint: localhost:9"),
    "no tries": ({"AWS_MAX_ATTEMPTS": "0"}, "AWS_MAX_ATTEMPTS"),
    "negative tries": ({"AWS_MAX_ATTEMPTS": "-1"}, "AWS_MAX_ATTEMPTS"),
    "line end in the secret": ({"AWS_SECRET_ACCESS_KEY": f"{SECRET}\n"}, "AWS_SECRET_ACCESS_KEY"),
    "line end in the id": ({"AWS_ACCESS_KEY_ID": f"{KEY}\r"}, "AWS_ACCESS_KEY_ID"),
    "line end in the token": ({"AWS_SESSION_TOKEN": f"{SESSION}\n"}, "AWS_SESSION_TOKEN"),
    "line end in the region": ({"AWS_DEFAULT_REGION": "eu-west-1\n"}, "AWS_DEFAULT_REGION"),
    "umlaut in the id": ({"AWS_ACCESS_KEY_ID": f"{KEY}\u00fc"}, "AWS_ACCESS_KEY_ID"),
    "region": ({"AWS_DEFAULT_REGION": "no where!"}, "AWS_DEFAULT_REGION"),
    "authorities": ({"AWS_CA_BUNDLE": "/no/such/file"}, "AWS_CA_BUNDLE"),
    "broken configuration": ({"AWS_CONFIG_FILE": "{broken}"}, "{broken}"),
    "binary configuration": ({"AWS_CONFIG_FILE": "{binary}"}, "{binary}"),
    "broken credentials": ({**ABSENT, "AWS_SHARED_CREDENTIALS_FILE": "{broken}"}, "{broken}"),
    "unknown profile": ({**ABSENT, "AWS_PROFILE": "nobody"}, "AWS_PROFILE"),
    "no SSO token": ({**PROFILE, "AWS_CONFIG_FILE": "{sso}"}, "aws sso login"),
    "no SSO session": ({**PROFILE, "AWS_CONFIG_FILE": "{sso-session}"}, "aws sso login"),
    "program fails": ({**PROFILE, "AWS_CONFIG_FILE": "{fails}"}, "credential_process"),
    "program prints no JSON": ({**PROFILE, "AWS_CONFIG_FILE": "{prints}"}, "AWS_CONFIG_FILE"),
    "program prints part": ({**PROFILE, "AWS_CONFIG_FILE": "{partly}"}, "credential_process"),
    "no program": ({**PROFILE, "AWS_CONFIG_FILE": "{absent}"}, "/no/such/program"),
    "role of nobody": ({**PROFILE, "AWS_CONFIG_FILE": "{role}"}, "AWS_PROFILE"),
    "roles in a circle": ({**PROFILE, "AWS_CONFIG_FILE": "{loop}"}, "AWS_"),
    "no web identity": (
        {**ABSENT, "AWS_WEB_IDENTITY_TOKEN_FILE": "/no/such", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x"},
        "AWS_WEB_IDENTITY_TOKEN_FILE",
    ),
    "service elsewhere": ({**ABSENT, "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://x.invalid/y"}, "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
    "service away": ({**ABSENT, "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{NOBODY}/x"}, "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
    "half of a key": ({"AWS_SECRET_ACCESS_KEY": ""}, "AWS_SECRET_ACCESS_KEY"),
    "no key": (ABSENT, "AWS_ACCESS_KEY_ID"),
    "checksums": ({"AWS_REQUEST_CHECKSUM_CALCULATION": "maybe"}, "AWS_REQUEST_CHECKSUM_CALCULATION"),
    "addressing": ({"AWS_CONFIG_FILE": "{address}"}, "AWS_CONFIG_FILE"),
    "defaults": ({"AWS_DEFAULTS_MODE": "quick"}, "AWS_DEFAULTS_MODE"),
    "proxy": ({"HTTP_PROXY": "::::"}, "HTTP_PROXY"),
    "credentials in the address": ({"AWS_ENDPOINT_URL": f"http://me:{SECRET.replace('/', '')}@127.0.0.1:1"}, "AWS_ENDPOINT_URL"),
}
"""What is set, and what the error names."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in [name for name in os.environ if name.startswith("AWS_") or name.upper().endswith("_PROXY")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    return {name: str(tmp_path / name) for name in FILES}


@pytest.mark.parametrize("case", CASES)
def test_wrong_settings_are_one_error_without_a_key(
    case: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, named = CASES[case]
    usual = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": NOBODY, "AWS_DEFAULT_REGION": "eu-west-1"}
    usual |= {"AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in {**usual, **change}.items():
        if value:
            monkeypatch.setenv(name, value.format(**files))
    for verb in (["checkpoint", "verify"], ["data", "stats"], ["status"]):
        assert main([*verb, "s3://bucket/run"]) == 2, verb
        error = capsys.readouterr().err
        assert named.format(**files) in error and "Traceback" not in error
        assert not any(word in error for word in (KEY, SECRET, SECRET.replace("/", ""), SESSION, "Signature="))


@pytest.mark.parametrize("uri", ["s3://Bad_Bucket!!/x", "s3://bucket/\ud800", "s3://bucket", "s3:///x"])
def test_a_name_that_s3_does_not_take_is_named(uri: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": NOBODY}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"not a valid S3 name|a bucket and a name are needed"):
        open_storage(uri).read(uri)


def test_a_file_that_vanishes_later_is_a_setting_too(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials are renewed in the middle of a request; a disk's own error stays what it is."""
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", files["sso"])
    with pytest.raises(UserError, match="Correct AWS_WEB_IDENTITY_TOKEN_FILE"), explained("s3://bucket/x"):
        raise FileNotFoundError(2, "No such file or directory", files["sso"])
    with pytest.raises(OSError, match="No space left"), explained("s3://bucket/x"):
        raise OSError(28, "No space left on device", "/somewhere")


def test_an_empty_number_of_tries_is_none(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "")
    assert client().meta.config.retries["total_max_attempts"] == TRIES


@pytest.mark.parametrize(
    "uri", ["s3://me:hunter2@bucket/x", "s3://hunter2@bucket/x", "s3://me:hun/ter2@bucket/x", "s3://me:hun@ter2@bucket"]
)
def test_a_key_in_the_url_of_a_bucket_is_not_shown(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["checkpoint", "verify"], ["data", "stats"], ["status"]):
        assert main([*verb, uri]) == 2
        error = capsys.readouterr().err
        assert "hun" not in error and "ter2" not in error and "Keys do not belong in a URL" in error
