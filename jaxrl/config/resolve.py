"""From gin text to a checked configuration, and back."""

import dataclasses
import re
import tokenize
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

import gin

from jaxrl.checks import ConfigError, check
from jaxrl.config.recipes import nearest, read_recipe
from jaxrl.config.sections import SECTIONS, Config

_BOUND = {name: gin.external_configurable(section, name=name, module="jaxrl") for name, section in SECTIONS.items()}


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Resolve a recipe and overrides into a checked configuration.

    Args:
        recipe: name of a shipped recipe or path of a .gin file, or several joined by "+", of which later ones win; ""
            for the defaults.
        overrides: ``Section.field=value`` bindings that win over the recipe; a bare word is taken as a string.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a value of the wrong type, or values that
            contradict each other.
    """
    return parse([read_recipe(name) for name in recipe.split("+")] if recipe else [""], overrides)


def parse(texts: Sequence[str], overrides: Sequence[str] = ()) -> Config:
    """As ``load``, from gin text."""
    gin.clear_config()
    macros = {name for text in texts for name in re.findall(r"%(\w+)", text)}
    try:
        for text in texts:
            _parse_gin(text, macros)
        for override in overrides:
            _parse_override(override, macros)
        sections = {}
        for field in dataclasses.fields(Config):
            section = field.default_factory
            try:
                bound = _BOUND[section.__name__]()
            except (TypeError, ValueError) as error:  # a macro that nobody defined
                raise ConfigError(f"cannot resolve {section.__name__}: {str(error).splitlines()[0]}") from error
            wanted = typing.get_type_hints(section)
            sections[field.name] = section(
                **{
                    f.name: typed(f"{section.__name__}.{f.name}", wanted[f.name], getattr(bound, f.name))
                    for f in dataclasses.fields(section)
                }
            )
    finally:
        gin.clear_config()
    config = Config(**sections)
    check(config)
    return config


def dump(config: Config) -> str:
    """Every value of every section as gin text; ``parse([dump(config)]) == config``."""
    lines = []
    for field in dataclasses.fields(Config):
        section = getattr(config, field.name)
        lines += [
            f"{type(section).__name__}.{f.name} = {getattr(section, f.name)!r}" for f in dataclasses.fields(section)
        ]
        lines.append("")
    return "\n".join(lines)


def _parse_gin(text: str, macros: set[str]) -> None:
    _check_keys(text, macros)
    try:
        gin.parse_config(text)
    except ValueError as error:
        raise ConfigError(_explain(str(error))) from error
    except (SyntaxError, TypeError, AttributeError, OSError, tokenize.TokenError) as error:
        raise ConfigError(f"cannot read the configuration: {str(error).splitlines()[0]}") from error


def _check_keys(text: str, macros: set[str]) -> None:
    """Refuse what gin would take and never use: scopes, and names that are neither fields nor macros in use."""
    for line in text.splitlines():
        if line.startswith(("import ", "from ")):
            raise ConfigError(f"{line.strip()!r}: a recipe imports nothing; it binds fields and includes recipes")
        match = re.match(r"([\w./]+)\s*=", line)
        if match is None or re.fullmatch(r"\w+\.\w+", match[1]) or match[1] in macros:
            continue
        fields = [f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)]
        ends = [key for key in fields if key.endswith("." + match[1].rpartition(".")[2])]
        hint = f"; did you mean {ends[0]}?" if ends else nearest(match[1], fields)
        raise ConfigError(f"unknown key {match[1]}{hint}")


def _parse_override(override: str, macros: set[str]) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r} has no value; write --set Section.field=value")
    try:
        _parse_gin(f"{key.strip()} = {value.strip()}", macros)
    except ConfigError as error:
        if not isinstance(error.__cause__, SyntaxError | tokenize.TokenError):
            raise
        _parse_gin(f"{key.strip()} = {value.strip()!r}", macros)


def _explain(message: str) -> str:
    """Turn gin's complaint about a name into one with the nearest valid name."""
    if match := re.search(r"Configurable '(\w+)' doesn't have a parameter named '(\w+)'", message):
        section, name = match.groups()
        fields = [field.name for field in dataclasses.fields(SECTIONS[section])]
        return f"unknown key {section}.{name}{nearest(name, fields, prefix=section + '.')}"
    if match := re.search(r"No configurable matching '([\w.]+)'", message):
        return f"unknown section {match.group(1)!r}{nearest(match.group(1), SECTIONS)}; sections: {', '.join(SECTIONS)}"
    return message.splitlines()[0]


def typed(key: str, wanted: Any, value: object) -> Any:
    """``value`` as the type ``wanted``; an int serves as a float, a list as a tuple, nothing else is converted.

    Raises:
        ConfigError: naming ``key``, the value, and what it must be.
    """
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(
                f"{key}={value!r} is none of {', '.join(map(repr, arguments))}"
                f"{nearest(str(value), [str(argument) for argument in arguments])}"
            )
        return value
    if origin is dict and isinstance(value, dict):
        if all(type(name) is str and type(item) in (bool, int, float, str) for name, item in value.items()):
            return dict(value)
    elif origin is tuple and isinstance(value, list | tuple):
        if all(type(item) is arguments[0] for item in value):
            return tuple(value)
    elif wanted is float and type(value) is int:
        return float(value)
    elif isinstance(wanted, type) and not isinstance(wanted, types.GenericAlias) and type(value) is wanted:
        return value
    names = {tuple: f"tuple of {arguments[0].__name__}" if arguments else "", dict: "dict of names to plain values"}
    raise ConfigError(
        f"{key}={value!r} has type {type(value).__name__}; it must be {names.get(origin) or wanted.__name__}"
    )
