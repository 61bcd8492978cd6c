"""Which code serves which URI scheme. It is loaded by name at first use.

The table names modules as text on purpose: code that reads and writes objects must not depend on the client library of a store
that it does not use. boto3 is slow to import, and a local run needs none of it.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from oar_scale.errors import UserError

if TYPE_CHECKING:
    from oar_scale.storage import Storage
    from oar_scale.storage.remote import RemoteObjects

LOCAL = ""
"""The scheme of a plain path."""
STORAGES = {LOCAL: "oar_scale.storage.local:LocalStorage", "s3": "oar_scale.storage.s3:S3Storage"}
"""Scheme -> ``module:class`` of its :class:`~oar_scale.storage.Storage`."""
REMOTE_OBJECTS = {"s3": "oar_scale.storage.s3_download:S3Objects"}
"""Scheme -> ``module:class`` of its :class:`~oar_scale.storage.remote.RemoteObjects`; plain paths have none, they are mapped."""


def scheme_of(uri: str) -> str:
    """Return the scheme of a URI: ``"s3"`` for ``s3://bucket/name``, :data:`LOCAL` for a plain path.

    Raises:
        UserError: no storage serves this scheme.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", uri)
    if match is None:
        return LOCAL
    if match[1] not in STORAGES or not uri.startswith(f"{match[1]}://"):
        raise UserError(f"{uri}: cannot store under {match[0]}. Use a local path, or s3://bucket/prefix.")
    return match[1]


@cache
def storage_of(scheme: str) -> Storage:
    """Return the storage of a scheme, one instance a process."""
    storage: Storage = _load(STORAGES[scheme])()
    return storage


@cache
def remote_objects_of(scheme: str) -> RemoteObjects:
    """Return what downloads the objects of a remote scheme, one instance a process."""
    objects: RemoteObjects = _load(REMOTE_OBJECTS[scheme])()
    return objects


def _load(entry: str) -> Any:
    """The class that a ``module:class`` entry names."""
    module, _, name = entry.partition(":")
    return getattr(import_module(module), name)
