"""From YAML files to a checked recipe, with errors that name the line to change.

    recipes/mine.yaml:14  parallel.micro_batch = 12
      global_batch 256 is not a multiple of micro_batch x workers = 12 x 8 = 96.
      Nearest that fit: micro_batch 8 (accumulation 4) or 16 (accumulation 2).

The value, and the file and line (or ``-o``) that set it, then what would be valid. All wrong fields are listed at once; rules
between fields are checked when each field is right by itself.
"""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined
from ruamel.yaml import YAML

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.layers import Setting, read_layers, refuse_secrets, with_overrides
from oar_scale.config.locations import ESCAPE, EXPAND
from oar_scale.config.schema import NUMBER, RANGE, Recipe, RecipeConflict, SampleConfig
from oar_scale.errors import UserError

DEFAULT = "(default)"

__all__ = ["DEFAULT", "dump_recipe", "fingerprint", "load_recipe", "override_sample", "recipe_origins"]


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path: a YAML file; ``extends:`` names a file or a list of files, relative to it, that it builds on.
        overrides: ``a.b=c`` each, in order; c is YAML.

    Raises:
        UserError: anything wrong with the files, the overrides or the values; the text lists each location and remedy.
    """
    return _check(read_layers(path, overrides, _default_type), path)


def override_sample(sample: SampleConfig, overrides: Sequence[str], where: str) -> SampleConfig:
    """The way to draw of something that is no recipe (``where``), with overrides like ``sample.top_p=0.9``.

    Raises:
        UserError: as :func:`load_recipe`, and for a field that is not in ``sample``.
    """
    fields = {name: Setting(where, value) for name, value in sample.model_dump(mode="json").items()}
    layers = with_overrides(Setting(where, {"sample": Setting(where, fields)}), overrides)
    if other := [each for each in overrides if not each.partition("=")[0].strip().startswith("sample.")]:
        raise UserError(f"-o {other[0]}: {where} is no recipe. Of what it says only fields of sample can be changed: -o sample.top_p=0.9")
    try:
        return SampleConfig.model_validate_json(json.dumps(layers.value["sample"].plain()), strict=True)
    except ValidationError as error:
        details = [{**detail, "loc": ("sample", *detail["loc"])} for detail in error.errors()]
        raise UserError("\n".join(_explain(cast(ErrorDetails, detail), layers, where)[1] for detail in details)) from error


def recipe_origins(path: str, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Say for every leaf of the resolved recipe (``a.b``) where it was set: ``FILE:LINE``, ``-o`` or ``(default)``.

    Raises:
        UserError: as :func:`load_recipe`.
    """
    layers = read_layers(path, overrides, _default_type)
    resolved = _check(layers, path).model_dump(mode="json")
    settings = {keys: _find(layers, keys) for keys in _leaves(resolved)}
    return {".".join(keys): setting.origin if setting is not None else DEFAULT for keys, setting in settings.items()}


def dump_recipe(recipe: Recipe) -> str:
    """Return the whole recipe, defaults included, as YAML that :func:`load_recipe` reads back to an equal recipe."""
    yaml = YAML(typ="safe", pure=True)
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # the library annotates its initial None
    yaml.width = 4096
    text = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json", context=ESCAPE), text)
    return text.getvalue()


def _check(layers: Setting, path: str) -> Recipe:
    refuse_secrets(layers, "recipe")
    try:
        # Strict, and by way of JSON: text is never taken for a number or a switch, while a list may fill a tuple.
        return Recipe.model_validate_json(json.dumps(layers.plain()), strict=True, context=EXPAND)
    except ValidationError as error:
        blocks = sorted(_explain(detail, layers, path) for detail in error.errors())
        raise UserError("\n".join(text for _, text in blocks)) from error


def _explain(detail: ErrorDetails, layers: Setting, path: str) -> tuple[tuple[str, int], str]:
    """One block of the error text (where and what was set, then, indented, what would be valid) and its location to sort by."""
    cause = detail.get("ctx", {}).get("error")
    keys = tuple(cause.key.split(".")) if isinstance(cause, RecipeConflict) else _real_keys(detail["loc"])
    if detail["type"] == "union_tag_invalid":
        keys = (*keys, "type")
    origin, shown = _location(keys, layers, path)
    lines = [f"{origin}  {shown}", *(f"  {line}" for line in _reason(detail, keys, cause).splitlines())]
    file, _, line = origin.rpartition(":")
    return (file, int(line) if line.isdigit() else 0), "\n".join(lines)


def _location(keys: tuple[str, ...], layers: Setting, path: str) -> tuple[str, str]:
    """``FILE:LINE`` and ``a.b = value``; for a value nobody set, the line of the section around it and ``(default)``."""
    names = tuple(key for key in keys if not key.isdigit())
    name = ".".join(names) + "".join(f"[{key}]" for key in keys if key.isdigit())
    setting = _find(layers, names)
    if setting is not None:
        return setting.origin, name if isinstance(setting.value, dict) else f"{name} = {_show(_item(setting.value, keys[-1]))}"
    parents = (_find(layers, names[:end]) for end in range(len(names) - 1, 0, -1))
    origin = next((parent.origin for parent in parents if parent is not None), path)
    default = _default(names)
    return origin, name if default is PydanticUndefined else f"{name} = {_show(default)} {DEFAULT}"


def _item(value: object, index: str) -> object:
    """The item of a list that an error is about, or the whole value."""
    return value[int(index)] if isinstance(value, list) and index.isdigit() and int(index) < len(value) else value


def _reason(detail: ErrorDetails, keys: tuple[str, ...], cause: object) -> str:
    context = detail.get("ctx", {})
    match detail["type"]:
        case "value_error":
            return str(cause)
        case "extra_forbidden":
            return _unknown_key(keys)
        case "missing":
            return "is required and not set."
        case "literal_error":
            return f"must be {context['expected']}."
        case "union_tag_invalid":
            return f"must be one of {context['expected_tags']}."
        case "union_tag_not_found":
            return f"needs a type: one of {', '.join(_tags(keys))}."
        case "bool_type":
            return "must be true or false (in YAML 1.2 yes, no, on and off are text)."
        case "string_type" if detail["input"] is None:
            return "must be text. In YAML ~ and null mean nothing at all: put the tilde in quotes if your home folder is meant."
        case "string_type":
            return "must be text; put a number or true/false in quotes."
        case "model_type" | "model_attributes_type" | "dict_type":
            fields = _fields_at(keys)
            return f"must be a mapping with keys among: {', '.join(fields)}." if fields else "must be a mapping."
        case "string_pattern_mismatch":
            return f"must match the pattern {context['pattern']}"
    return re.sub(r"^Input should", "must", detail["msg"]) + "."


def _unknown_key(keys: tuple[str, ...]) -> str:
    """Name the nearest valid key: of the same section if one is near, else of any section."""
    *section, wrong = keys
    here = _fields_at(tuple(section))
    if wrong in here:  # of another variant of the section
        name = ".".join(section)
        owners = [tag for tag, model in _variants(_type_at(tuple(section))).items() if wrong in model.model_fields]
        return f"only {name}.type {' or '.join(owners)} has this key. Set that type, or remove the key."
    near = difflib.get_close_matches(wrong, here, n=1)
    if near:
        return f"unknown key. Did you mean {'.'.join([*section, near[0]])}?"
    everywhere = [".".join(path) for path in _schema_leaves(Recipe)]
    elsewhere = [name for name in everywhere if name.rsplit(".", 1)[-1] == wrong]
    hint = f"Did you mean {' or '.join(elsewhere[:3])}? " if elsewhere else ""
    return f"unknown key. {hint}Keys of {'.'.join(section) or 'a recipe'}: {', '.join(here)}."


def _real_keys(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """The path a user would write: pydantic also names the variant of a tagged union (``data.source.folder.path``)."""
    keys: list[str] = []
    model: object = Recipe
    for part in location:
        variants = _variants(model)
        if len(variants) > 1 and part in _tags(tuple(keys)):
            model = variants[part]
            continue
        if part in (NUMBER, RANGE):
            continue
        keys.append(str(part))
        model = _field_type(model, str(part))
    return tuple(keys)


def _find(layers: Setting, keys: tuple[str, ...]) -> Setting | None:
    setting: Setting | None = layers
    for key in keys:
        setting = setting.child(key) if setting is not None else None
    return setting


def _leaves(value: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if not isinstance(value, dict):
        yield keys
        return
    for key, item in value.items():
        yield from _leaves(item, (*keys, key))


def _show(value: object) -> str:
    """A value as a recipe writes it, cut to a readable length."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


# What follows asks the schema itself for its fields and variants, so that no list of keys has to be kept by hand.


def _variants(kind: object) -> dict[str, type[BaseModel]]:
    """The models a field may hold, by ``type`` for a tagged union; empty for a plain value, and for a mapping with names of the user's."""
    if get_origin(kind) is dict:
        return {}
    bare = [getattr(arg, "__origin__", arg) if hasattr(arg, "__metadata__") else arg for arg in (kind, *get_args(kind))]
    models = [arg for arg in bare if isinstance(arg, type) and issubclass(arg, BaseModel)]
    return {get_args(model.model_fields["type"].annotation)[0] if "type" in model.model_fields else "": model for model in models}


def _field_type(kind: object, key: str) -> object:
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    for model in _variants(kind).values():
        if key in model.model_fields:
            return model.model_fields[key].annotation
    return None


def _type_at(keys: tuple[str, ...]) -> object:
    kind: object = Recipe
    for key in keys:
        kind = _field_type(kind, key)
    return kind


def _fields_at(keys: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(name for model in _variants(_type_at(keys)).values() for name in model.model_fields))


def _tags(keys: tuple[str, ...]) -> list[str]:
    return list(_variants(_type_at(keys)))


def _schema_leaves(kind: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    variants = _variants(kind)
    if not variants:
        yield keys
    for model in variants.values():
        for name, field in model.model_fields.items():
            yield from _schema_leaves(field.annotation, (*keys, name))


def _default_type(keys: tuple[str, ...]) -> str | None:
    """The ``type`` of a section that does not say it: where that may be left out, its default's."""
    variants = _variants(_type_at(keys)) if keys else {}
    return next((tag for tag, model in variants.items() if len(variants) > 1 and model.model_fields["type"].default == tag), None)


def _default(keys: tuple[str, ...]) -> object:
    """The default of a field, or ``PydanticUndefined`` where there is none (or it belongs to a variant not chosen)."""
    field = next((model.model_fields.get(keys[-1]) for model in _variants(_type_at(keys[:-1])).values()), None)
    return PydanticUndefined if field is None else field.default
