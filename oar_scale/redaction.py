"""Secrets: what is refused where it would be written down, and what is masked in texts for the screen, logs and events.

    secret_in("PGPASSWORD", "hunter2")          "PGPASSWORD is the name of a secret"
    secret_in_line("export MYTOKEN=abc")        likewise, in a line of shell; not for $MYTOKEN, which is no secret by itself
    redact("http://me:hunter2@host/?sig=ab")    "http://***@host/?sig=***"

By name, by the patterns of well-known keys and of the addresses that chats give to programs, and by entropy: a long run of letters of both
cases and digits without any structure.
Checksums, ids and other hexadecimal numbers are no secrets, nor are paths, URLs without credentials and names of models.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter

MASK = "***"

_NAME = (
    r"(?:SECRETS?|TOKEN|PASSW(?:OR)?DS?|PASSPHRASE|PASSCODE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH_?KEY|SIGNING_?KEY|ENCRYPTION_?KEY"
    r"|ACCOUNT_?KEY|LICENSE_?KEY|SECRET_?KEY|CREDENTIAL|(?:^|_)(?:AUTHORIZATION|COOKIES?)|CONNECTION_?STRING"
    r"|(?:^|_)(?:PW|PAT|JWT|SAS|PASS|CREDS)|_PWD|SSHPASS)"
)
_SECRET_NAME = re.compile(
    rf"{_NAME}(?:_?ID|_?VALUE|_PEM|_B(?:ASE)?64|_?V?\d+)?$|(?:^|_)(?:SECRET|PASSWORD|TOKEN|API_?KEY|ACCESS_KEY)_", re.IGNORECASE
)
_SOME_KEY = re.compile(r"_KEY(?:_?V?\d+)?$", re.IGNORECASE)
"""OPENAI_KEY, DEPLOY_KEY, S3_KEY: a key, or the file that holds it."""
_HARMLESS_NAME = re.compile(
    r"(?:^|_)(?:PRIMARY|FOREIGN|UNIQUE|COMPOSITE|PUBLIC|PUB|SORT|SORTING|ORDER|PARTITION|SHARD|CACHE|HASH|ROUTING|GROUP|JOIN|INDEX|LOOKUP"
    r"|DICT|MAP|JSON|YAML|ROW|COLUMN|FIELD|ID|NAME|OBJECT|META|METADATA|CAPTION|IMAGE|IMG|TEXT|LABEL|CLASS|SAMPLE|INPUT|OUTPUT|STATE"
    r"|TARGET|QUERY|HOST|HOT|ANY|ENTER)_KEY$"
    r"|(?:FILE|PATH|DIR|FOLDER|SOCK|MODE|LENGTH|LEN|COUNT|LIMIT|NUM|SIZE|TYPE|PARALLELISM|URL|TTL|EXPIRY)$",
    re.IGNORECASE,
)

_KNOWN = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        A(?:KIA|SIA)[A-Z0-9]{16}                      # AWS
      | gh[pousr]_[A-Za-z0-9]{30,} | github_pat_\w{30,} | glpat-[\w-]{18,}
      | hf_[A-Za-z0-9]{30,} | sk-(?=\w*\d)\w{20,} | xox[abprs]-[A-Za-z0-9-]{10,} | AIza[\w-]{35} | npm_[A-Za-z0-9]{36}
      | wandb_v1_\w{20,} | dckr_pat_[\w-]{20,} | ya29\.[\w-]{20,}
      | sk-(?:proj|ant|svcacct|admin|or)-(?=[\w-]{0,150}\w{20})(?=[\w-]{0,150}\d)[\w-]+
      | hooks\.slack(?:-gov)?\.com/\w+/\w+/\w+/[\w/]+ | discord(?:app)?\.com/api/(?:v\d+/)?webhooks/\d+/[\w-]+
      | api\.telegram\.org/(?:file/)?bot\d+:[\w-]+
      | (?:webhook\.office\.com|outlook\.office\.com/webhook)/\w[^\s"'<>]+
      | eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*            # a JSON web token
    )""",
    re.VERBOSE,
)
_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_USER_INFO = re.compile(r"(?<=://)[^\s/\"'<>]+@(?=[^\s/@])(?!sha\d+:)")
_PARAMETER = r"[\w-]*(?:signature|credential|security-token|token|secret|password|passwd|api[_-]?key|access[_-]?key(?:id)?|sig|jwt|pwd)"
_QUERY = re.compile(rf"([?&;#]{_PARAMETER}=)[^\s&;#\"'<>]+", re.IGNORECASE)
_HEADER = re.compile(r"\b((?:Credential|Signature|X-Amz-Security-Token)=)[^\s,&'\"]+")
_BEARER = re.compile(r"\b((?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)

_ASSIGNED = re.compile(r"(?<![\w$-])([A-Za-z_]\w*)\+?=(\"[^\"]*\"|'[^']*'|[^\s;&|)]*)")
_SET = re.compile(r"\b(?:setenv|set[ \t]+-[a-z]*x[a-z]*)[ \t]+([A-Za-z_]\w*)[ \t]+(\"[^\"]*\"|'[^']*'|[^\s;&|)]+)")
"""In csh and fish."""
_VALUE = r"(\"[^\"]*\"|'[^']*'|[^\s;&|]+)"
_FLAG = re.compile(
    rf"(?<!\S)--?(?:[\w-]*-)?(?:password|passwd|passphrase|token|secret|api-?key|secret-?key|access-?key)[= ]\s*{_VALUE}", re.IGNORECASE
)
_SENT = re.compile(r"(?<!\S)(?:-H|--header)[ \t=]*[\"']?([A-Za-z][\w-]*):[ \t]*(?:(?:Bearer|Basic|token)[ \t]+)?([^\s\"']+)", re.IGNORECASE)
"""A header of curl or wget."""
_LOGIN = re.compile(
    r"\bwandb\s+login\s+(?:--\S+\s+)*[A-Za-z0-9_]{30,}|\b(?:aws_secret_access_key|aws_session_token)\s+[^\s$]{16,}"
    r"|\bcurl\b.*\s(?:-u|--user)\s*\w+:[^\s$]+|\bmachine\s+\S+\s+login\s+\S+\s+password\s+[^\s$`<]"
    r"|(?:(?<![\w.-])(?:docker|podman|nerdctl|buildah|skopeo|helm|apptainer|singularity|oras|az|oc)\s[^;&|\n]*?\blogin\s(?:[^;&|\n]*?\s)??"
    r"|(?<![\w.-])mongo(?:sh)?\s(?:[^;&|\n]*?\s)??|\bsshpass\s+(?:-v\s+)?)-p[ \t=]*[\"']?[^\s$`<\"'=-]"
    r"|(?<![\w.-])(?:mysql(?:dump|admin|import|sh)?|mariadb(?:-dump|-admin)?)\s(?:[^;&|\n]*?\s)??-p[\"']?[^\s$`<\"']"
    r"|(?<![\w.-])redis-cli\s(?:[^;&|\n]*?\s)??-a[ \t]*[\"']?[^\s$`<\"'-]"
)
_RUN = re.compile(r"[A-Za-z0-9+_=-]{24,}|(?<![\w./:-])[A-Za-z0-9+/]{36,}={0,2}(?![\w./:-])")
_PATH = re.compile(r"(?<![^\s=:,;'\"(<>&|\[])(?:[/~.$]|[A-Za-z][A-Za-z0-9+.-]*://)[^\s'\",;&|]*")
"""A word that is a path or a URL. What people name their folders and environments looks random."""
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_HEX = re.compile(r"(?:0[xX])?[0-9a-f-]+|(?:0[xX])?[0-9A-F-]+")
_WORD = re.compile(r"[A-Z]?[a-z]{4,}|[A-Z]{4,}")
_BITS = 3.8
"""Entropy a character from which on a run counts as random; English has 3 to 4 with words in it, which :data:`_WORD` sorts out."""


def redact(text: str) -> str:
    """``text`` with all that looks like a secret masked: credentials in URLs, signatures, well-known keys, private keys, and the values of
    this process's own secret variables."""
    text = _PEM.sub(MASK, text)
    text = _USER_INFO.sub(lambda found: f"{MASK}@" if ":" in found[0] or len(found[0]) > 16 else found[0], text)
    for pattern in (_QUERY, _HEADER, _BEARER):
        text = pattern.sub(rf"\1{MASK}", text)
    text = _KNOWN.sub(MASK, text)
    for value in _own_secrets():
        text = text.replace(value, MASK)
    return text


def _own_secrets() -> list[str]:
    values = (value for name, value in os.environ.items() if len(value) >= 8 and _is_secret(name, value))
    return sorted(values, key=len, reverse=True)


def secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret: PGPASSWORD, MYTOKEN, WANDB_API_KEY; not TOKENIZERS_PARALLELISM, *_TOKEN_FILE."""
    return bool(_SECRET_NAME.search(name) or _SOME_KEY.search(name)) and not _HARMLESS_NAME.search(name)


def _is_secret(name: str, value: str) -> bool:
    """Whether a variable of this name and value holds a secret, and neither names another variable nor, for a key, its file."""
    if _SOME_KEY.search(name) and value.startswith(("/", "~", "./", "../")) and not _SECRET_NAME.search(name):
        return False
    return secret_name(name) and not _refers(value)


def secret_in(name: str, value: str) -> str | None:
    """Why a variable, or a setting, should not be written down; None where nothing speaks against it. A run's own name, and that of its
    folder, may look random."""
    if _is_secret(name, value.strip()):
        return f"{name} is the name of a secret"
    return secret_value(value, entropy=name not in ("name", "run_dir"))


def secret_value(value: str, *, entropy: bool = True) -> str | None:
    """Why a value looks like a secret, whatever its name; None where it does not."""
    if _PEM.search(value):
        return "it holds a private key"
    if (found := _USER_INFO.search(value)) and not _refers(found[0].partition(":")[2]) and ":" in found[0]:
        return "it holds a URL with a password"
    if (found := _QUERY.search(value)) and not _refers(found[0].partition("=")[2]):
        return f"it holds a URL with {found[1].strip('?&;#=')}"
    if _KNOWN.search(value):
        return "it holds a key or a token"
    if entropy and any(_is_random(run) for run in _RUN.findall(_UUID.sub(" ", _PATH.sub(" ", value)))):
        return "it holds what looks like a key: a long run of random letters and digits"
    return None


def secret_in_line(line: str) -> str | None:
    """Why a line of shell should not be written down; None where nothing speaks against it."""
    for name, value in _ASSIGNED.findall(line) + _SET.findall(line) + _SENT.findall(line):
        if _is_secret(name.replace("-", "_"), value.strip("\"'")):
            return f"{name} is the name of a secret"
    if any(not _refers(value.strip("\"'")) for value in _FLAG.findall(line)):
        return "an option of it takes a secret"
    if _LOGIN.search(line) or ((found := _BEARER.search(line)) and not _refers(found[0].split()[-1])):
        return "it holds a key or a password"
    return secret_value(line)


def _refers(value: str) -> bool:
    """Whether a value is taken from elsewhere when it is used: a variable, the output of a command."""
    return value.startswith(("$", "`", "<", "{", "...")) or value in ("", MASK)


def _is_random(run: str) -> bool:
    run = run.strip("=-_+/").replace("EXAMPLEKEY", "")  # with which AWS's own examples end
    kinds = sum(any(test(each) for each in run) for test in (str.isupper, str.islower, str.isdigit))
    if len(run) < 24 or kinds < 3 or _HEX.fullmatch(run):
        return False
    letters = sum(len(word) for word in _WORD.findall(run))
    if letters > 0.45 * len(run) or max(map(len, re.split(r"[-_+=/]", run))) < 12:
        return False
    counts = Counter(run)
    bits = -sum(count / len(run) * math.log2(count / len(run)) for count in counts.values())
    return bits >= _BITS
