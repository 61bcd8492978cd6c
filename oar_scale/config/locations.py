"""Paths and URLs in recipes and profiles: ``~`` and variables in them are expanded, as a shell does it.

    run_dir: ~/runs/x           source: {path: $SCRATCH/photos}          root: ${WORK}/runs          weights: s3://bucket/vq.safetensors

When: as a recipe or profile is read, with the variables of the shell that reads it. A job gets the recipe as it was read, so that it
works in the same folders wherever it runs. Only what lies on a node's own disk (:data:`NodeLocation`) is expanded there, as it is
used: such variables (``$TMPDIR``, ``$SLURM_TMPDIR``) are another on each node. URLs (``s3://``) stay as they are written.
"""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, PlainSerializer, SerializationInfo, ValidationInfo

from oar_scale.errors import UserError
from oar_scale.redaction import secret_name

EXPAND = {"locations": "expand"}
"""The context of pydantic in which locations are expanded: text that a person wrote is read."""
ESCAPE = {"locations": "escape"}
"""The context in which they are written so that reading gives the same again."""
_VARIABLE = re.compile(r"\$(?:(?P<escaped>[$~])|(?P<command>\([^)]*\)?)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^}]*)\})")


def expand_location(given: str) -> str:
    """The location with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` replaced; ``$$`` is a dollar, ``$~`` a tilde.

    Raises:
        ValueError: a variable that is not set, a user who has no home here, or a NUL.
    """
    if "\0" in given:
        raise ValueError("has a NUL in it, which no path has")
    if "://" in given:
        return given
    head, slash, rest = given.partition("/")
    if not head.startswith("~"):
        return _VARIABLE.sub(_value, given)
    home = os.path.expanduser(head)
    if home == head:
        raise ValueError(f"there is no home folder of {head} here. Write the whole path; a name that begins with ~ is ./{head}.")
    return home + slash + _VARIABLE.sub(_value, rest)


def escape_location(path: str) -> str:
    """What :func:`expand_location` makes this very path of."""
    if "://" in path:
        return path
    escaped = path.replace("$", "$$")
    return f"${escaped}" if escaped.startswith("~") else escaped


def node_path(given: str, field: str) -> str:
    """A :data:`NodeLocation`, expanded and absolute, on the node where it is used. Raises UserError that names the field."""
    try:
        return os.path.abspath(expand_location(given))
    except ValueError as error:
        raise UserError(f"{field} = {given}\n  {error}") from error


def _name(match: re.Match[str]) -> str:
    """The variable that a part of a location means. Raises ValueError where it means none, or one that holds a secret."""
    if match["command"]:
        raise ValueError(f"{match[0]}: commands are not run here. Write the path, or a variable; a dollar sign itself is $$.")
    name = match["name"] or match["braced"]
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{match[0]} is no variable: $NAME and ${{NAME}} are; a dollar sign itself is $$.")
    if secret_name(name):
        raise ValueError(f"{name} is the name of a secret, and the path would be written into the run's folder. Use another variable.")
    return name


def _value(match: re.Match[str]) -> str:
    if match["escaped"]:
        return match["escaped"]
    name = _name(match)
    value = os.environ.get(name)
    if not value:
        raise ValueError(
            f"the variable {name} is not set. Set it (export {name}=...), or write the whole path; a dollar sign itself is $$."
        )
    return value


def expand_in_context(given: object, info: ValidationInfo) -> object:
    """Expand a text where a person's recipe or profile is read; anything else is passed on."""
    return expand_location(given) if isinstance(given, str) and info.context == EXPAND else given


def _expanded(given: str, info: ValidationInfo) -> str:
    return expand_location(given) if info.context == EXPAND else given


def _written(path: str, info: SerializationInfo) -> str:
    return escape_location(path) if info.context == ESCAPE else path


def _readable(given: str) -> str:
    """Refuse what no node could expand."""
    if "\0" in given:
        raise ValueError("has a NUL in it, which no path has")
    if "://" in given:
        raise ValueError("is a folder on a node's own disk, and no URL")
    for match in _VARIABLE.finditer(given):
        if not match["escaped"]:
            _name(match)
    return given


Location = Annotated[str, AfterValidator(_expanded), PlainSerializer(_written)]
"""The type of a field that holds a path or a URL."""
NodeLocation = Annotated[str, AfterValidator(_readable), "expanded on the node"]
"""The type of a field that holds a path on a node's own disk; who uses it expands it (:func:`node_path`).
Whether it can be expanded at all is seen as it is read."""
