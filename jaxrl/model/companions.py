"""What lies in a Hugging Face folder beside architecture, weights and tokenizer.json, carried from import to export."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from jaxrl.model.folders import read_json

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")
"""The vocabulary in older forms, for readers that do not know tokenizer.json."""
TOKEN_KEYS = ("_token_id", "_ids", "suppress_tokens", "sequence_bias")
"""Ends of the keys of a generation config that hold ids of tokens: ``eos_token_id``, ``bad_words_ids`` and so on."""
SOURCE_TEMPLATE = "source_chat_template.jinja"
"""The chat template a model came with. Exports have the one it was trained with as their chat template, and this one
beside it under a name that no reader takes for it."""


def keep(source: str | os.PathLike[str], folder: pathlib.Path, *, tokenizer: bool = True) -> None:
    """Copy the companions of the model in ``source`` into ``folder``.

    Args:
        tokenizer: whether the model's own tokenizer stays in use; without it only the generation config is kept, less
            the ids of tokens, which mean others in another vocabulary.

    Raises:
        ConfigError: one of them is no JSON although it should be.
    """
    source = pathlib.Path(source)
    for name in (GENERATION_CONFIG, *TOKENIZER_FILES) if tokenizer else ():
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not tokenizer and (source / GENERATION_CONFIG).is_file():
        kept = {
            key: value for key, value in read_json(source / GENERATION_CONFIG).items() if not key.endswith(TOKEN_KEYS)
        }
        (folder / GENERATION_CONFIG).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    template = _chat_template(source) if tokenizer else None
    if template is not None:
        (folder / SOURCE_TEMPLATE).write_text(template, encoding="utf-8")


def restore(folder: pathlib.Path, export: pathlib.Path) -> None:
    """Copy what ``keep`` kept in ``folder``, if anything, into an export, which writes its own generation config."""
    for name in (SOURCE_TEMPLATE, *TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, export / name)


def generation_config(folder: pathlib.Path) -> dict[str, Any] | None:
    """The kept generation config; None without one."""
    return read_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else None


def merged_generation_config(ids: Mapping[str, int | None], source: Mapping[str, Any] | None) -> dict[str, Any]:
    """The generation config of an export.

    Args:
        ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of the tokenizer.
        source: the kept one, made to stop where the policy stops too. None: plain sampling, as the policy was trained.
    """
    if source is None:
        return {**ids, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    ends = source.get("eos_token_id")
    ends = [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
    own = ids["eos_token_id"]
    if own is not None and own not in ends:
        ends = [own, *ends]
    kept = {name: source[name] if source.get(name) is not None else value for name, value in ids.items()}
    return {**source, **kept, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def _chat_template(source: pathlib.Path) -> str | None:
    """The template of a folder, from wherever a version of transformers puts it."""
    for name in (SOURCE_TEMPLATE, "chat_template.jinja"):
        if (source / name).is_file():
            return (source / name).read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (source / name).is_file():
            template = read_json(source / name).get("chat_template")
            if isinstance(template, list):  # several with names, of which readers take this one
                template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
            if isinstance(template, str):
                return template
    return None
