"""YAML layers with a memory: every value knows the file and line, or the ``-o``, that set it.

A recipe is a stack of layers: the files it extends, then itself, then the command line. Mappings merge key by key; lists
and single values replace what was there. One exception: a mapping whose ``type`` changes replaces the old one, since the
other keys belonged to the old type.

YAML 1.2: ``on``, ``yes`` and dates are text; a key given twice is an error, and so are directives (``%YAML 1.1``) and merge keys (``<<``).
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.scanner import Scanner

from oar_scale.config.locations import expand_location
from oar_scale.errors import UserError
from oar_scale.redaction import secret_in, secret_in_line
from oar_scale.text import decode_bytes
from oar_scale.text import shown as short

OVERRIDE = "-o"
MOST_BYTES, MOST_VALUES, MOST_FILES, DEEPEST = 256 << 10, 20_000, 100, 50
"""Of one file: its size, its values once aliases stand for what they name, and how deep they are nested; and how many files may extend
one another. Far above what anyone writes: a file of a few lines may stand for billions of values, and nothing would answer any more."""
LARGEST = 2**63
"""Whole numbers are below it."""
COMMAND = ("observe", "notify", "command")
"""The one setting of a recipe that is a program with its arguments."""
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Setting:
    """A value and its origin. A mapping is a dict of settings; lists and scalars are plain values."""

    origin: str
    value: Any

    def child(self, key: str) -> Setting | None:
        """The setting of a key; None where there is none, or this is no mapping."""
        return self.value.get(key) if isinstance(self.value, dict) else None

    def plain(self) -> object:
        """The value without origins: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: setting.plain() for key, setting in self.value.items()}
        return self.value


DefaultType = Callable[[tuple[str, ...]], str | None]
"""The ``type`` of a section that does not say it, by the section's keys; None for a section that has no type, or must say it."""


def read_layers(path: str, overrides: Sequence[str] = (), default_type: DefaultType = lambda keys: None) -> Setting:
    """Read a recipe file, what it extends, and the overrides, and merge them.

    A section of one ``type`` replaces a whole section of another one.

    Args:
        path: the YAML file; ``extends:`` in it names files relative to it, later ones winning over earlier ones.
        overrides: ``a.b=c`` each; c is YAML.
        default_type: tells which type a section is that does not say it.

    Raises:
        UserError: a file is missing, not YAML, not a mapping, extends itself, or has a key twice; a malformed override.
    """
    return with_overrides(_read_file(path, f"{path}: there is no such recipe.", (), default_type, []), overrides, default_type)


def with_overrides(layers: Setting, overrides: Sequence[str], default_type: DefaultType = lambda keys: None) -> Setting:
    """Layers and what the command line changes in them. Raises UserError for a malformed override."""
    for override in overrides:
        layers = _merge(layers, _parse_override(override), default_type)
    return layers


def refuse_secrets(layers: Setting, what: str, shell: bool = False) -> None:
    """Raise UserError where something in a file looks like a key or a password: it would be copied to where others read it.

    Args:
        what: the file, for the error: ``recipe`` or ``profile``.
        shell: values may be lines of shell; but for those below ``env``, which are variables.
    """
    for keys, setting, value in _texts(layers):
        lines = keys[0] not in ("env", "pass_env") if shell else keys == COMMAND
        why = secret_in_line(value) if lines else secret_in(keys[-1], value)
        if why is not None and keys[0] != "pass_env":
            raise UserError(
                f"{setting.origin}  {'.'.join(keys)}\n  {keys[-1]}: keys and passwords do not belong in a {what}; export it in the shell "
                f"that submits, or keep it in a file that only you can read.\n  {why[0].upper()}{why[1:]}; what is written here is copied "
                "into the run's folder and its events."
            )


def _texts(setting: Setting, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Setting, str]]:
    """The texts in a setting, with their keys."""
    if isinstance(setting.value, dict):
        for key, inner in setting.value.items():
            yield from _texts(inner, (*keys, key))
    values = setting.value if isinstance(setting.value, list) else [setting.value]
    texts = [value for value in values if isinstance(value, str) and keys]
    for text in texts + ([" ".join(texts)] if keys == COMMAND else []):
        yield keys, setting, text


def _read_file(path: str, missing: str, inside: tuple[str, ...], default_type: DefaultType, read: list[str]) -> Setting:
    """``missing`` is the error when the file does not exist; ``inside`` the files that led here, for cycles; ``read`` all so far."""
    read.append(path)
    if len(read) > MOST_FILES:
        raise UserError(f"{path}: more than {MOST_FILES} files extend one another. Put what they say into fewer.")
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UserError(f"{path}: is longer than {MOST_BYTES >> 10} KB. That is no recipe or profile; name the right file.")
        text = decode_bytes(data)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(missing + _neighbours(path)) from error
    except (OSError, ValueError) as error:  # ValueError: no text, or a NUL in the path
        raise UserError(f"{path}: cannot be read as a text file: {error}") from error
    own = _parse(text, path)
    if not isinstance(own.value, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections (`name: ...`), and this file {_kind(own.value)}.")
    extends = own.value.pop("extends", None)
    inside = (*inside, os.path.realpath(path))
    merged: Setting | None = None
    for base in _bases(extends):
        assert extends is not None
        target = os.path.normpath(os.path.join(os.path.dirname(path), base))
        if os.path.realpath(target) in inside:
            chain = " -> ".join(os.path.relpath(step) for step in (*inside, os.path.realpath(target)))
            raise UserError(f"{extends.origin}  extends = {base}\n  a recipe cannot extend itself: {chain}")
        layer = _read_file(target, f"{extends.origin}  extends = {base}\n  there is no file {target}.", inside, default_type, read)
        merged = layer if merged is None else _merge(merged, layer, default_type)
    return own if merged is None else _merge(merged, own, default_type)


def _bases(extends: Setting | None) -> list[str]:
    if extends is None:
        return []
    bases = [extends.value] if isinstance(extends.value, str) else extends.value
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{extends.origin}  extends\n  must be a file name, or a list of file names, relative to this file.")
    try:
        return [expand_location(base) for base in bases]
    except ValueError as error:
        raise UserError(f"{extends.origin}  extends = {extends.value}\n  {error}") from error


def _merge(below: Setting, above: Setting, default_type: DefaultType, keys: tuple[str, ...] = ()) -> Setting:
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    old, new = below.child("type"), above.child("type")
    old_type = default_type(keys) if old is None else old.value
    if old_type is not None and new is not None and old_type != new.value:
        return above
    merged = dict(below.value)
    for key, setting in above.value.items():
        merged[key] = _merge(merged[key], setting, default_type, (*keys, key)) if key in merged else setting
    return Setting(above.origin, merged)


def _parse_override(text: str) -> Setting:
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names) or len(names) > DEEPEST:
        raise UserError(f"{OVERRIDE} {text}: an override is KEY=VALUE, like parallel.workers=4.")
    setting = _parse(value, OVERRIDE, f"{OVERRIDE} {text}")
    for name in reversed(names):
        setting = Setting(OVERRIDE, {name: setting})
    return setting


class _ShallowScanner(Scanner):
    """Stops at brackets nested too deep: each may begin a key, and looking for its colon takes a time of the square of their number."""

    def fetch_flow_collection_start(self, TokenClass: Any, to_push: str) -> None:
        if len(self.flow_context) >= DEEPEST:
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass, to_push)


def _parse(text: str, source: str, shown: str | None = None) -> Setting:
    """Parse one YAML document; ``source`` is a file (lines are added to the origins) or ``-o``."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Scanner = _ShallowScanner
    _refuse_directives(text, source, shown)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)  # YAML allows it: an alias means the nearest one above
            node = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        location = shown or (f"{source}:{mark.line + 1}" if mark else source)
        raise UserError(f"{location}  is not valid YAML: {error.problem or error.context or error}") from error
    except (YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits, an escape that stands for no character
        raise UserError(f"{shown or source}  is not valid YAML: {error}") from error
    except RecursionError:
        raise UserError(f"{shown or source}  is nested more than {DEEPEST} deep, which is no recipe or profile.") from None
    return Setting(source, None) if node is None else _setting(node, _origin(node, source), source, yaml, (), Counter())


def _refuse_directives(text: str, source: str, shown: str | None) -> None:
    """``%YAML 1.1`` would turn ``yes`` into true, ``%TAG`` tags into others. They can only stand before everything but comments."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip("\ufeff").startswith("%"):
            raise UserError(
                f"{shown or f'{source}:{number}'}  a line that begins with % (%YAML, %TAG) has no meaning here: this is read as YAML 1.2. "
                "Remove it; text that begins with % needs quotes."
            )
        if line.strip("\ufeff \t") not in ("", "...") and not line.lstrip("\ufeff \t").startswith("#"):
            return


def _origin(node: Node, source: str) -> str:
    return source if source == OVERRIDE else f"{source}:{node.start_mark.line + 1}"


def _setting(node: Node, origin: str, source: str, yaml: YAML, around: tuple[int, ...], seen: Counter[str]) -> Setting:
    """``origin``: where the key of this value stands. ``around``: the nodes this one lies in (an alias may close a loop). ``seen`` counts
    the values so far."""
    seen["values"] += 1
    if seen["values"] > MOST_VALUES:
        raise UserError(f"{origin}  has more than {MOST_VALUES} values, with those that aliases stand for. Write them once, or in a file.")
    if len(around) >= DEEPEST:
        raise UserError(f"{origin}  is nested more than {DEEPEST} deep, which is no recipe or profile.")
    if id(node) in around:
        raise UserError(f"{origin}  is an alias of something that contains it.")
    if not isinstance(node, ScalarNode) and str(node.tag) not in (f"{_TAG}seq", f"{_TAG}map"):
        raise UserError(f"{origin}  the YAML tag {node.tag} has no meaning here; remove it.")
    around = (*around, id(node))
    if isinstance(node, SequenceNode):
        return Setting(origin, [_setting(item, origin, source, yaml, around, seen).plain() for item in node.value])
    if not isinstance(node, MappingNode):
        assert isinstance(node, ScalarNode)
        return Setting(origin, _scalar(node, origin, yaml))
    result: dict[str, Setting] = {}
    for key_node, value_node in node.value:
        key_origin = _origin(key_node, source)
        if not isinstance(key_node, ScalarNode):
            raise UserError(f"{key_origin}  a key must be a word.")
        key = _characters(str(key_node.value), key_origin)
        if str(key_node.tag) == f"{_TAG}merge":
            raise UserError(f"{key_origin}  <<\n  YAML 1.2 has no merge keys: use extends, or write the values.")
        if key in result:
            first = result[key].origin
            raise UserError(f"{key_origin}  {key}\n  is set twice in the same mapping: first at {first}. Remove one of the two.")
        result[key] = _setting(value_node, key_origin, source, yaml, around, seen)
    return Setting(origin, result)


def _scalar(node: ScalarNode, origin: str, yaml: YAML) -> object:
    kind = str(node.tag).removeprefix(_TAG)
    text: str = node.value
    try:
        match kind:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                number = int(yaml.constructor.construct_yaml_int(node))
                if abs(number) >= LARGEST:
                    raise ValueError("it is larger than any number here")
                return number
            case "float":
                return yaml.constructor.construct_yaml_float(node)
            case "str" | "timestamp" | "merge":  # YAML 1.2 has neither dates nor merge keys: they are text
                return _characters(text, origin)
    except (ValueError, ConstructorError) as error:
        raise UserError(f"{origin}  {short(text)} is not a valid {kind}: {error}") from error
    raise UserError(f"{origin}  the YAML tag {node.tag} has no meaning in a recipe; remove it.")


def _characters(text: str, origin: str) -> str:
    """The text, with the characters that pairs of surrogates (``"\\ud83d\\ude00"``, as in JSON) stand for."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{origin}  {text[:60]!a}\n  has half a surrogate pair in it, which is no character. Write the character itself, in UTF-8."
        ) from error


def _kind(value: object) -> str:
    return "is empty" if value is None else f"holds a {'list' if isinstance(value, list) else 'single value'}"


def _neighbours(path: str) -> str:
    """Name the recipes beside a path that does not exist."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return f" Nor is there a folder {folder}."
    recipes = sorted(name for name in os.listdir(folder) if name.endswith((".yaml", ".yml")))
    return f" In {folder}: {', '.join(recipes[:12])}." if recipes else f" There is no YAML file in {folder}."
