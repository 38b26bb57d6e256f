"""Methods by name: a row of a table or a function in a file of the user's, with its settings bound and checked."""

import functools
import importlib.util
import inspect
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl.config import ConfigError, nearest, typed

MODULE_PREFIX = "jaxrl_method_"
"""Begins the name of the module that a file of the user's becomes."""


def configured(key: str, table: Mapping[str, Callable], name: str, settings: Mapping[str, Any]) -> Callable:
    """The method called ``name``, with ``settings`` bound to its keyword arguments.

    A method takes its data as its first argument; everything else is a keyword argument with a default and a type,
    which is a setting.

    Args:
        key: the field that names the method, e.g. "AlgorithmConfig.loss"; that of its settings ends in "_settings".
        table: the methods there are.
        name: a row of the table, or "path/to/file.py:function".
        settings: values by name.

    Raises:
        ConfigError: no such method, file or function; a function of another form; a setting it does not have, or of
            the wrong type. The message names the nearest valid name.
    """
    method = table.get(name) or _from_file(key, table, name)
    types = _settings_of(key, name, method)
    for setting in settings:
        if setting not in types:
            known = f"{name} has {', '.join(types)}" if types else f"{name} has no settings"
            raise ConfigError(f"unknown key {setting!r} in {key}_settings{nearest(setting, types)}; {known}")
    return functools.partial(
        method,
        **{setting: typed(f"{key}_settings[{setting!r}]", types[setting], settings[setting]) for setting in settings},
    )


def _from_file(key: str, table: Mapping[str, Callable], name: str) -> Callable:
    path, colon, function = name.rpartition(":")
    if not colon:
        raise ConfigError(
            f"{key}={name!r} is no method{nearest(name, table)}; there are {', '.join(table)}, "
            'or give a function of your own as "path/to/file.py:function"'
        )
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"{key}={name!r}: there is no file {path}; give its path from where jaxrl is started")
    module_spec = importlib.util.spec_from_file_location(f"{MODULE_PREFIX}{pathlib.Path(path).stem}", path)
    if module_spec is None:
        raise ConfigError(f"{key}={name!r}: {path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{key}={name!r}: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    method = vars(module).get(function)
    if not callable(method):
        functions = [other for other, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"{key}={name!r}: {path} has no function {function}{nearest(function, functions)}; "
            f"it has {', '.join(functions) or 'none'}"
        )
    return method


def _settings_of(key: str, name: str, method: Callable) -> dict[str, Any]:
    """The types of a method's settings, by name."""
    data, *rest = inspect.signature(method).parameters.values() or (None,)
    if data is None or data.kind not in (data.POSITIONAL_ONLY, data.POSITIONAL_OR_KEYWORD):
        raise ConfigError(f"{key}={name!r} must take its data as its first argument")
    hints = typing.get_type_hints(method)
    for setting in rest:
        if setting.kind is not setting.KEYWORD_ONLY or setting.default is setting.empty or setting.name not in hints:
            raise ConfigError(
                f"{key}={name!r}: its argument {setting.name!r} must be by keyword alone, with a type and a default: "
                f"def {method.__name__}({data.name}, *, {setting.name}: float = 0.0)"
            )
    return {setting.name: hints[setting.name] for setting in rest}


def not_negative(method: str, **settings: float) -> None:
    """Refuse settings below 0.

    Raises:
        ConfigError: naming the first of them.
    """
    for name, value in settings.items():
        if value < 0:
            raise ConfigError(f"{method}: {name}={value} must not be negative")
