"""Files beside the weights: found wherever a version of transformers puts them, and never mistaken for ours."""

import json
import pathlib

import pytest

from jaxrl.config import ConfigError
from jaxrl.model import companions
from jaxrl.model.companions import GENERATION_CONFIG, SOURCE_TEMPLATE

OLDER = {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]}


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"tokenizer_config.json": "{}"}, None),
        ({"tokenizer_config.json": '{"chat_template": "yes"}'}, "yes"),
        ({"tokenizer_config.json": json.dumps(OLDER)}, "yes"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "no"}]}'}, None),
        ({"chat_template.json": '{"chat_template": "yes"}', "tokenizer_config.json": '{"chat_template": "no"}'}, "yes"),
        ({"chat_template.jinja": "yes", "chat_template.json": '{"chat_template": "no"}'}, "yes"),
        ({SOURCE_TEMPLATE: "yes", "chat_template.jinja": "ours, from an earlier export"}, "yes"),
    ],
)
def test_the_template_a_model_came_with(files: dict[str, str], template: str | None, tmp_path: pathlib.Path) -> None:
    source, kept, export = (tmp_path / name for name in ("source", "kept", "export"))
    for folder in (source, kept, export):
        folder.mkdir()
    for name, text in files.items():
        (source / name).write_text(text)
    companions.keep(source, kept)
    companions.restore(kept, export)
    written = {file.name: file.read_text() for file in export.iterdir()}
    assert written == ({} if template is None else {SOURCE_TEMPLATE: template})


def test_another_tokenizer_keeps_only_the_generation_config(tmp_path: pathlib.Path) -> None:
    source, kept = tmp_path / "source", tmp_path / "kept"
    source.mkdir()
    kept.mkdir()
    for name in (*companions.TOKENIZER_FILES, "chat_template.jinja", "README.md"):
        (source / name).write_text("x")
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "suppress_tokens": [7], "bad_words_ids": [[8]]}
    (source / GENERATION_CONFIG).write_text(json.dumps(ids | {"top_k": 5, "max_new_tokens": 9}))
    companions.keep(source, kept, tokenizer=False)
    assert [file.name for file in kept.iterdir()] == [GENERATION_CONFIG]
    assert companions.generation_config(kept) == {"top_k": 5, "max_new_tokens": 9}
    assert companions.generation_config(tmp_path / "absent") is None


def test_a_generation_config_that_is_no_json_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / GENERATION_CONFIG).write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config.json is no JSON: .*; fetch it again"):
        companions.generation_config(tmp_path)


@pytest.mark.parametrize(
    ("source", "ends"),
    [
        ({}, 3),
        ({"eos_token_id": None}, 3),
        ({"eos_token_id": 3}, 3),
        ({"eos_token_id": 5}, [3, 5]),
        ({"eos_token_id": [5, 3]}, [5, 3]),
        ({"eos_token_id": [5, 6], "pad_token_id": 9, "temperature": 0.7}, [3, 5, 6]),
    ],
)
def test_generation_stops_where_the_policy_stops(source: dict[str, object], ends: object) -> None:
    ids = {"bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0}
    expected = {"bos_token_id": None, "pad_token_id": 0} | source | {"eos_token_id": ends}
    assert companions.merged_generation_config(ids, source) == expected
    assert companions.merged_generation_config(ids, None)["eos_token_id"] == 3
