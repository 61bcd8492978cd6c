"""What is taken for a secret and what is not, and where it is refused or masked."""

from __future__ import annotations

import base64
import random
import string
from pathlib import Path

import pytest

from oar_scale.cli import main
from oar_scale.config.loading import load_recipe
from oar_scale.doctor.finding import Finding
from oar_scale.errors import UserError
from oar_scale.launch.profile import load_profile
from oar_scale.observe.events import EventLog, read_events
from oar_scale.redaction import redact, secret_in, secret_in_line, secret_name, secret_value

ROOT = Path(__file__).resolve().parent.parent
SECRET_NAMES = [
    "PGPASSWORD",
    "MYTOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "HF_TOKEN",
    "GITHUB_TOKEN",
    "DB_PASS",
    "MYSQL_PWD",
    "APIKEY",
    "OPENAI_APIKEY",
    "SSH_PASSPHRASE",
    "PRIVATE_KEY",
    "SIGNING_KEY2",
    "db_password",
    "AZURE_STORAGE_CONNECTION_STRING",
    "TOKEN_FOR_ME",
    "STORAGE_ACCOUNT_KEY",
    "REGISTRY_PASSWD",
    "CLIENT_SECRET_V2",
    "DOCKER_PW",
    "OPENAI_KEY",
    "S3_KEY",
    "AZURE_STORAGE_KEY",
    "DEPLOY_KEY",
    "MISTRAL_KEY2",
    "secretKey",
    "AUTHORIZATION",
    "HTTP_AUTHORIZATION",
    "COOKIE",
    "SSHPASS",
    "MY_PASSWORDS",
    "SECRETS",
    "DB_CREDS",
    "PRIVATE_KEY_PEM",
    "CLIENT_SECRET_BASE64",
]
PLAIN_NAMES = [
    "TOKENIZERS_PARALLELISM",
    "MAX_TOKENS",
    "KEYBOARD",
    "OMP_NUM_THREADS",
    "AUTHOR",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "PGPASSFILE",
    "SSH_AUTH_SOCK",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN_PATH",
    "NCCL_IB_HCA",
    "HF_HOME",
    "PATH",
    "MONKEY",
    "DONKEY_PATH",
    "CLS_TOKEN_NUM",
    "BYPASS",
    "COMPASS",
    "TRITON_CACHE_DIR",
    "PYTORCH_CUDA_ALLOC_CONF",
    "WANDB_ENTITY",
    "PWD",
    "OLDPWD",
    "KEY",
    "SSH_KEY_PATH",
    "PRIMARY_KEY",
    "PUBLIC_KEY",
    "caption_key",
    "KMS_KEY_ID",
    "COOKIE_FILE",
    "XAUTHORITY",
    "HOTKEY",
]
PRIVATE_KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----"
SECRET_VALUES = [
    "AKIAIOSFODNN7EXAMPLE",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "https://me:hunter2@host/x",
    "s3://key:secret@bucket/prefix",
    "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=0a1b2c3d&X-Amz-Date=1",
    "https://host/x?token=abcdef",
    "https://host/x#access_token=abcdef",
    "https://account.blob.core.windows.net/x?sv=2024&sig=abc%3D",
    "ghp_" + "a1B2" * 9,
    "hf_" + "aBcDeFgH" * 5,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.c2lnbmF0dXJl",
    PRIVATE_KEY,
    "sk-a1B2c3D4e5F6g7H8i9J0k1L2",
    "sk-proj-a1B2c3D4e5F6g7H8i9J0k1L2-x_y-Z3",
    "sk-ant-api03-abcdefghijklmnopqrstuvwxyz-AA",
    "https://me:p@ss@host/x",
    "https://hooks.slack.com/services/T0AB12CD3/B0AB12CD3/abcdefghijklmnopqrstuvwx",
    "https://discordapp.com/api/webhooks/123456789012345678/abcDEF-123_abc",
    "https://api.telegram.org/bot123456789:AAHabcdefghijklmnop/sendMessage",
    "https://team.webhook.office.com/webhookb2/0f0f-0f0f@0f0f/IncomingWebhook/0f0f/0f0f",
    "q7Zp2Xv9Lk4Rt8Wm1Nc6Bd3Hf5Js",
]
NAMED = "exp42LR3e4WD01Bs2048Seed1337Warmup5kCosine"
PLAIN_VALUES = [
    "sha256:" + "a1" * 32,
    "0f" * 32,
    "3f9a2c1b",
    "550e8400-e29b-41d4-a716-446655440000",
    "GPU-1ab2c3d4-5678-90ab-cdef-1234567890ab,MIG-9ab2c3d4-5678-90ab-cdef-1234567890ab",
    "20261123T085016Z-3f9a2c1b",
    "git+https://github.com/org/repo@" + "de" * 20,
    "nvcr.io#nvidia/pytorch:24.10-py3",
    "ghcr.io/org/image:1.2@sha256:" + "0f" * 32,
    "laion2b_s32b_b82k",
    "ViT-L-14-quickgelu",
    "/home/me/.cache/hub/models--laion--CLIP-ViT-L-14-laion2B-s32B-b82K/blobs",
    "randar_0.3b_llamagen_360k_bs_1024_lr_0.0004.safetensors",
    "s3://bucket/Run-2026-11-29T04-07-11Z/tokens",
    "https://download.pytorch.org/whl/cu132",
    "ssh://git@github.com/x",
    "arn:aws:iam::123456789012:role/MyTrainingRoleForClusterUsers",
    "expandable_segments:True,garbage_collection_threshold:0.8",
    "mail me at someone@example.com",
    f"/runs/{NAMED}/vq.safetensors",
    f"s3://bucket/{NAMED}",
    f"~/{NAMED}",
    f"./{NAMED}",
    f"$SCRATCH/{NAMED}/x",
    f"/data/{NAMED}:/data/{NAMED}:ro",
    "/data/sk-learn-experiments-2026-november",
    "s3://bucket/sk-or-not-experiments-2026-november",
    "docker://ubuntu:24.04@sha256:" + "0f" * 32,
    "https://hooks.slack.com/services/$MY_HOOK",
    "a photograph of a token machine with a secret key = love",
]
SECRET_LINES = [
    "export WANDB_API_KEY=abc",
    "export A=1 PGPASSWORD=x; psql",
    "MYTOKEN='a b' python x.py",
    "wandb login 0123456789abcdef0123456789abcdef01234567",
    "huggingface-cli login --token abcdef",
    "docker login -u me --password hunter2",
    "curl -u me:hunter2 http://host",
    "curl -H 'Authorization: Bearer abcdef123456' host",
    "aws configure set aws_secret_access_key wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "pip install --extra-index-url https://me:hunter2@host/simple x",
    "docker login -u me -p hunter2",
    "podman login registry -phunter2",
    "mysql -u me -phunter2 db",
    "sshpass -p hunter2 ssh host",
    "redis-cli -h host -a hunter2",
    "setenv MYTOKEN hunter2",
    "set -gx MYTOKEN 'hunter2'",
    "export S3_KEY=hunter2",
    "export MYTOKEN+=hunter2",
    "curl -H 'X-Api-Key: hunter2' host",
    'wget --header="PRIVATE-TOKEN: hunter2" host',
    "echo machine api.wandb.ai login user password hunter2 >> ~/.netrc",
    "cd /tmp; q7Zp2Xv9Lk4Rt8Wm1Nc6Bd3Hf5Js",
]
PLAIN_LINES = [
    "module load cuda/12.8",
    "source /opt/conda/bin/activate oar",
    "export WANDB_API_KEY=$(cat ~/.wandb-key)",
    "export PGPASSWORD=$PASSWORD_OF_MINE",
    "export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=8",
    "export AWS_WEB_IDENTITY_TOKEN_FILE=/var/run/token",
    "docker login -u me --password-stdin < ~/.pw",
    "docker login -u me -p $PASSWORD_OF_MINE host",
    'docker login -u me -p "$(cat ~/.pw)"',
    "mysql -u me -p db",
    "mysql -P 3306 db",
    "sshpass -f ~/.pw ssh -p 22 host",
    "ssh login.cluster mkdir -p /x",
    "setenv MYTOKEN $OTHER",
    "setenv PATH /x:$PATH",
    "set -x; export A=1",
    "export SSH_KEY=~/.ssh/id_ed25519",
    "conda activate /opt/envs/py311_torch28_cu132_2026Nov01xyzAB",
    f"export WHERE=/opt/{NAMED} OTHER='/opt/{NAMED}'",
    'curl -H "X-Api-Key: $KEY_OF_MINE" -H "Authorization: Bearer $TOKEN_OF_MINE" -H "Content-Type: text/plain" host',
    "echo machine api.wandb.ai login user password $KEY_OF_MINE >> ~/.netrc",
    "useradd -u 1000:1000 me",
    "oar run --max-tokens 5",
]


def test_secrets_are_told_by_name_pattern_and_entropy() -> None:
    assert [name for name in SECRET_NAMES if not secret_name(name)] == []
    assert [value for value in SECRET_VALUES if secret_value(value) is None] == []
    assert [line for line in SECRET_LINES if secret_in_line(line) is None] == []
    numbers, letters = random.Random(7), string.ascii_letters + string.digits
    made = ["".join(numbers.choices(letters, k=32)) for _ in range(500)] + [
        base64.b64encode(numbers.randbytes(30)).decode() for _ in range(500)
    ]
    assert sum(secret_value(value) is not None for value in made) > 930


def test_checksums_ids_and_paths_are_no_secrets() -> None:
    assert [name for name in PLAIN_NAMES if secret_name(name)] == []
    assert [value for value in PLAIN_VALUES if secret_value(value) or secret_in("image", value)] == []
    assert [line for line in PLAIN_LINES if secret_in_line(line)] == []
    assert [text for text in PLAIN_VALUES if redact(text) != text] == []
    files = [path for folder in ("recipes", "cluster") for path in (ROOT / folder).rglob("*.yaml")]
    lines = [line for path in files for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert [line for line in lines if secret_in_line(line)] == []


def test_an_error_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of others may hold anything, and an error shows what it holds."""

    def fail(*_: object) -> None:
        raise UserError("row 1: \x1b]0;mine\x07\x1b[2J\x9b1m\r over\n\tits caption é")

    monkeypatch.setattr("oar_scale.config.loading.load_recipe", fail)
    assert main(["recipe", "x.yaml"]) == 2
    assert capsys.readouterr().err == "error: row 1: \\x1b]0;mine\\x07\\x1b[2J\\x9b1m\\x0d over\n\tits caption é\n"


def test_texts_are_shown_without_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the screen, by the doctor and in the events; what is around them stays."""
    monkeypatch.setenv("MYTOKEN", "correct-horse")
    text = "http://me:hunter2@host:8333/x?X-Amz-Signature=0a1b&y=2 Credential=AKIAIOSFODNN7EXAMPLE/2026, Bearer abcdefghij, correct-horse"
    shown = redact(f"{text} {PRIVATE_KEY}")
    assert shown == "http://***@host:8333/x?X-Amz-Signature=***&y=2 Credential=***, Bearer ***, *** ***"
    assert Finding("warn", "S3", text).text == redact(text)
    with EventLog(str(tmp_path), "data") as log:
        log.emit("end", why=text, nested=[{"url": text}], checksum="0f" * 32)
    (event,) = read_events(str(tmp_path), "data")
    assert event["why"] == event["nested"][0]["url"] == redact(text) and event["checksum"] == "0f" * 32


PROFILE = "type: slurm\ncpus_per_node: 1\ntime: '00:10:00'\n"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("env: {PGPASSWORD: hunter2}", "env.PGPASSWORD"),
        ("env: {MINE: 'http://me:hunter2@host'}", "env.MINE"),
        ("env: {MINE: AKIAIOSFODNN7EXAMPLE}", "env.MINE"),
        ("setup: ['export WANDB_API_KEY=hunter2']", "setup"),
        ("sbatch: ['--export=ALL,MYTOKEN=hunter2']", "sbatch"),
        ("node_check: 'curl -u me:hunter2 host'", "node_check"),
        ("stages: {extract: {node_check: 'MYTOKEN=hunter2 check'}}", "stages.extract.node_check"),
    ],
)
def test_no_profile_with_a_secret_is_used(line: str, key: str, tmp_path: Path) -> None:
    """It would be written into job files and the record of the submission. The error does not show it."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"{PROFILE}{line}\n")
    with pytest.raises(UserError) as caught:
        load_profile(str(path))
    assert str(caught.value).startswith(f"{path}:4  {key}\n") and "hunter2" not in str(caught.value)


def test_no_recipe_with_a_secret_is_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be written into the run's folder, its events and W&B."""
    recipe = str(ROOT / "recipes" / "smoke.yaml")
    for setting in ("storage.root=s3://key:hunter2@bucket/x", "data.source.path=https://host/x?token=hunter2", "name=ghp_" + "a1B2" * 9):
        assert main(["recipe", recipe, "-o", setting]) == 2
        error = capsys.readouterr().err
        assert "keys and passwords do not belong in a recipe" in error and setting.partition("=")[2] not in error
    for words in (
        "curl, -u, me:hunter2, host",
        "env, MYTOKEN=hunter2, tell",
        "tell, --token, hunter2",
        "sh, -c, export MYTOKEN=hunter2; tell",
    ):
        assert main(["recipe", recipe, "-o", f"observe.notify.command=[{words}]"]) == 2
        error = capsys.readouterr().err
        assert "observe.notify.command" in error and "do not belong in a recipe" in error and "hunter2" not in error
    assert load_recipe(recipe, ["observe.notify.command=[curl, -d, '@-', $MY_HOOK, --token, $MYTOKEN]"]).observe.notify.command
    monkeypatch.setenv("MYTOKEN", "hunter2")
    assert main(["recipe", recipe, "-o", "run_dir=$MYTOKEN/x"]) == 2
    error = capsys.readouterr().err
    assert "MYTOKEN is the name of a secret" in error and "hunter2" not in error
    assert load_recipe(recipe).name == "smoke"


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "", "a\nb"])
def test_a_name_of_dots_is_no_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's folder would be another one: ``runs/..``."""
    assert main(["recipe", str(ROOT / "recipes" / "smoke.yaml"), "-o", f"name={name!r}"]) == 2
    assert "name = " in capsys.readouterr().err
