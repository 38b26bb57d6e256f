"""Recipes by name or path, their includes expanded."""

import difflib
import importlib.resources
import os
import pathlib
import re
from collections.abc import Iterable

from jaxrl.checks import ConfigError


def recipe_names() -> list[str]:
    """Names of the recipes that come with jaxrl."""
    folder = importlib.resources.files("jaxrl_configs")
    return sorted(entry.name.removesuffix(".gin") for entry in folder.iterdir() if entry.name.endswith(".gin"))


def read_recipe(name: str, within: tuple[str, ...] = ()) -> str:
    """The text of a recipe, given by path or by the name of one that comes with jaxrl, its includes expanded.

    Args:
        within: the recipes that include this one.

    Raises:
        ConfigError: no such file and no such name; the message lists the nearest names. Or a file that is no text, or
            includes itself.
    """
    if name in within:
        raise ConfigError(f"recipe {name} includes itself: {' → '.join((*within, name))}")
    if name.endswith(".gin") or os.sep in name:
        path = pathlib.Path(name)
        if not path.is_file():
            raise ConfigError(
                f"no recipe file {name}; give the path of a .gin file or one of: {', '.join(recipe_names())}"
            )
        data = path.read_bytes()
    elif name in recipe_names():
        data = (importlib.resources.files("jaxrl_configs") / f"{name}.gin").read_bytes()
    else:
        raise ConfigError(
            f"no recipe called {name!r}{nearest(name, recipe_names())}; recipes: {', '.join(recipe_names())}"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {name} is no UTF-8 text: {error}") from error
    return re.sub(
        r"^include\s+['\"](.+?)['\"]\s*$",
        lambda match: read_recipe(match.group(1), (*within, name)),
        text,
        flags=re.MULTILINE,
    )


def nearest(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """Words that propose the valid name most like ``name``; "" if none is like it."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
