"""Models on the Hugging Face hub: ``hf://owner/name[@revision][/folder]``.

    HubFolder.open("hf://me/emoji").fetch(patterns)             files of one commit, in the cache of huggingface_hub
    publish("hf://me/emoji", fill, private=True)                what ``fill`` writes into a folder, as one commit

Anybody can write a repository. Of one, only files are fetched that were asked for by name; their bytes are compared with the hash that the
hub gives for them. Where the hub is, who is logged in and where the cache lies is up to huggingface_hub (``HF_ENDPOINT``, ``hf auth login``
or ``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_OFFLINE``).
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Self

from httpx2 import HTTPError
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    parse_hf_uri,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HfUriError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from oar_scale import __version__
from oar_scale.errors import UserError, first_line
from oar_scale.generation.folder_files import CONFIG, is_folder_file
from oar_scale.json_object import parse_object
from oar_scale.names import relative_path
from oar_scale.storage import join

_COMMIT = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_OWNERS_OWN = re.compile(r"\.gitattributes|\.gitignore|README\.md|LICEN[CS]E.*", re.IGNORECASE)
"""What a repository may hold that is not a model yet."""


@dataclass(frozen=True)
class HubPath:
    """A folder of a repository, at a revision."""

    repo: str
    revision: str | None
    folder: str
    """"" for the repository itself."""

    def __str__(self) -> str:
        revision = "" if self.revision is None else "@" + self.revision.replace("/", "%2F")
        return join(f"{constants.HF_PROTOCOL}{self.repo}{revision}", self.folder)

    @classmethod
    def parse(cls, uri: str) -> Self:
        """``hf://owner/name[@revision][/folder]``. Raises UserError for anything else."""
        form = "A model on the hub is hf://owner/name, hf://owner/name@revision or hf://owner/name@revision/folder."
        try:
            parsed = parse_hf_uri(uri.rstrip("/"))
            folder = relative_path(parsed.path_in_repo) if parsed.path_in_repo else ""
        except (HfUriError, ValueError) as error:
            reason = error.msg if isinstance(error, HfUriError) else str(error)
            raise UserError(f"{uri}: {first_line(reason)} {form}") from error
        if parsed.type != "model":
            raise UserError(f"{uri}: this is a {parsed.type} of the hub, not a model. {form}")
        return cls(parsed.id, parsed.revision, folder)


@dataclass(frozen=True)
class HubFolder:
    """A folder of a repository, at one commit."""

    path: HubPath
    """Its revision is the commit."""

    @classmethod
    def open(cls, uri: str) -> Self:
        """Find out which commit is meant. Without a network: the one that was fetched last.

        Raises:
            UserError: no such repository or revision, no access to it, or no network and nothing in the cache.
        """
        path = HubPath.parse(uri)
        with _explained(uri):
            commit = _api().resolve_revision(path.repo, revision=path.revision).resolved
        if not _COMMIT.fullmatch(commit):
            raise UserError(f"{uri}: the hub names no commit: {commit[:100]!r}")
        return cls(HubPath(path.repo, commit, path.folder))

    def fetch_file(self, name: str) -> str:
        """The local path of a file. Raises UserError as :meth:`open`, and where there is no such file, or it is damaged."""
        with _explained(str(self.path)):
            path = hf_hub_download(
                self.path.repo,
                join(self.path.folder, name),
                revision=self.path.revision,
                library_name="oar_scale",
                library_version=__version__,
            )
        self._verify(path)
        return path

    def fetch(self, patterns: Sequence[str]) -> str:
        """The local folder with those files of it whose names are given, or match a pattern (``*``). Raises UserError as above."""
        folder = self.path.folder
        wanted = [join(glob.escape(folder), pattern) for pattern in patterns]
        with _explained(str(self.path)):
            snapshot = snapshot_download(
                self.path.repo,
                revision=self.path.revision,
                allow_patterns=wanted,
                library_name="oar_scale",
                library_version=__version__,
            )
        local = os.path.join(snapshot, folder) if folder else snapshot
        for pattern in patterns:
            for path in glob.glob(pattern, root_dir=local):
                self._verify(os.path.join(local, path))
        return local

    def _verify(self, path: str) -> None:
        """In the cache a file is a link to one that has its hash for a name: SHA-256 of large files, git's own of small ones."""
        expected = os.path.basename(os.readlink(path)) if os.path.islink(path) else ""
        if not (_SHA256.fullmatch(expected) or _COMMIT.fullmatch(expected)):
            return  # a cache without links
        with open(path, "rb") as file:
            if _SHA256.fullmatch(expected):
                found = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                found = hashlib.sha1(b"blob %d\0" % os.path.getsize(path) + file.read(), usedforsecurity=False).hexdigest()
        if found != expected:
            blob = os.path.join(os.path.dirname(path), os.readlink(path))
            for damaged in (os.path.realpath(path), blob, path):  # a blob may be a link itself, into a store that repositories share
                with suppress(FileNotFoundError):
                    os.remove(damaged)
            raise UserError(
                f"{self.path}: {os.path.basename(path)} is damaged: its hash is {found[:16]}..., and should be {expected[:16]}... "
                "It has been removed from the cache: try again. If this happens again, the repository itself is damaged."
            )


def publish(uri: str, fill: Callable[[str, HubPath], None], *, private: bool | None) -> str:
    """Write an exported folder into a repository, which is made where there is none: all files in one commit, or nothing.

    Args:
        uri: the revision is a branch, which is made where there is none.
        fill: writes the files into a local folder; called with that and with ``uri``.
        private: of a new repository; None: as the account says.

    Returns:
        The URI of the commit.

    Raises:
        UserError: not logged in, no right to write, something else is in the repository, or no network.
    """
    path = HubPath.parse(uri)
    if path.revision is not None and _COMMIT.fullmatch(path.revision):
        raise UserError(f"{uri}: a commit never changes. Push to a branch: {HubPath(path.repo, 'NAME', path.folder)}")
    if get_token() is None:
        raise UserError(f"{uri}: only somebody who is logged in can write to the hub: {_LOGIN}.")
    with tempfile.TemporaryDirectory(prefix="oar-push-") as folder:
        fill(folder, path)
        return _upload(folder, path, private)


def _upload(folder: str, path: HubPath, private: bool | None) -> str:
    api, uri = _api(), str(path)
    with _explained(uri):
        api.create_repo(path.repo, private=private, exist_ok=True)
        if path.revision is not None:
            api.create_branch(path.repo, branch=path.revision, exist_ok=True)
        head = api.model_info(path.repo, revision=path.revision)
        if private and not head.private:
            raise UserError(
                f"{uri}: the repository exists already, and is public. Make it private on the hub first, or choose another name."
            )
        there = _below(path.folder, [each.rfilename for each in head.siblings or ()])
        _check_target(uri, HubFolder(HubPath(path.repo, head.sha, path.folder)), there)
        names = sorted(os.listdir(folder))
        added = [CommitOperationAdd(join(path.folder, name), os.path.join(folder, name)) for name in names]
        removed = [CommitOperationDelete(join(path.folder, name)) for name in there if is_folder_file(name) and name not in names]
        commit = api.create_commit(
            path.repo,
            [*removed, *added],
            commit_message="Push a model of oar_scale",
            revision=path.revision,
            parent_commit=head.sha,  # somebody else's commit in between is an error, not half of each
        )
    return str(HubPath(path.repo, commit.oid, path.folder))


def _below(folder: str, names: Sequence[str]) -> list[str]:
    """The files that lie in a folder itself."""
    prefix = f"{folder}/" if folder else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return [name for name in inside if "/" not in name]


def _check_target(uri: str, target: HubFolder, there: Sequence[str]) -> None:
    """Raises UserError where the folder holds something else than a model of ours."""
    others = [name for name in there if not _OWNERS_OWN.fullmatch(name)]
    if CONFIG in there:
        with open(target.fetch_file(CONFIG), "rb") as file:
            try:
                written_by = str(parse_object(file.read()).get("library"))
            except ValueError:
                written_by = ""
        if written_by.startswith("oar_scale "):
            return
    if others:
        raise UserError(f"{uri}: something else is in this repository ({', '.join(others[:3])}). Choose another name, or a folder of it.")


def _api() -> HfApi:
    return HfApi(library_name="oar_scale", library_version=__version__)


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Errors of huggingface_hub as ours: what, where, and the way out."""
    try:
        yield
    except (HTTPError, EntryNotFoundError, RevisionResolutionError, OfflineModeIsEnabled, HFValidationError, OSError) as error:
        raise UserError(f"{uri}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    match error:
        case GatedRepoError():
            return f"this repository asks for agreement to its terms. Agree on its page at {constants.ENDPOINT}, then {_LOGIN}."
        case RepositoryNotFoundError():
            return f"no such repository at {constants.ENDPOINT}, or a private one. Check the name; for a private one, {_LOGIN}."
        case RevisionNotFoundError():
            return "the repository has no such revision: neither a branch, nor a tag, nor a commit."
        case RemoteEntryNotFoundError():
            return "not a model of oar_scale: there is no config.json. A run or an exported folder gets there by: oar checkpoint push"
        case HfHubHTTPError() if error.response.status_code == 401:
            return f"the hub does not know who is asking: {_LOGIN}."
        case HfHubHTTPError() if error.response.status_code == 403:
            return f"no permission. Use a token that may write to this repository: {_LOGIN}."
        case HfHubHTTPError() if error.response.status_code == 412:
            return "somebody else has changed the repository in the meantime. Look at it, and push again."
        case HfHubHTTPError():
            return f"{constants.ENDPOINT} answers: {first_line(str(error))}"
        case LocalEntryNotFoundError() | RevisionResolutionError() | OfflineModeIsEnabled() if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set, and the cache does not hold all of it. Load it once with a network."
        case LocalEntryNotFoundError() | RevisionResolutionError() | HTTPError():
            cause = error.__cause__ or error
            reason = first_line(str(cause)) or type(cause).__name__
            return f"{constants.ENDPOINT} cannot be reached ({reason}), and the cache does not hold it."
        case _:
            return first_line(str(error))
