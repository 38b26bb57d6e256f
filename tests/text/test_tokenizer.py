"""The tokenizer loses nothing, yields no control token from foreign text, and is the one transformers reads."""

import json
import pathlib
import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxrl.text.sentencepiece_bpe import train_model
from jaxrl.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer, train_sentencepiece
from jaxrl.text.tokens import CONTROL_TOKENS, PAD, TAGS, TURN_END

from .conftest import TEXTS

# Any text, and texts made of what has a meaning to some tokenizer.
TROUBLE = [
    *CONTROL_TOKENS, *TAGS, "\u2581", " ", "  ", "\n", "\r\n", "\t", "\x00", "<0x0A>", "<unk>", "é", "e\u0301", "😀",
    "12", "Tom", " apples", '"code": "', "\ufeff", "\u2028",
]  # fmt: skip
ANY_TEXT = st.one_of(st.text(), st.lists(st.sampled_from(TROUBLE)).map("".join))
quick = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@quick
@given(text=ANY_TEXT)
@example("\t\x0b\x0c  \n\n \u2581 <0x0A> \x00")
def test_round_trip_is_exact(any_tokenizer, text):
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text
    assert any_tokenizer.decode(any_tokenizer.encode(text, special=True)) == text


@quick
@given(text=ANY_TEXT)
def test_plain_text_yields_no_token_that_frames_a_conversation(any_tokenizer, text):
    framing = {i for name in (*CONTROL_TOKENS, *TAGS) for i in _single(any_tokenizer, name)}
    assert len(framing) >= 7
    assert framing.isdisjoint(any_tokenizer.encode(text))


def _single(tokenizer: Tokenizer, name: str) -> list[int]:
    ids = tokenizer.encode(name, special=True)
    return ids if len(ids) == 1 else []


def test_control_tokens_and_tags_are_single_tokens(tokenizer):
    for name in (*CONTROL_TOKENS, *TAGS):
        assert len(tokenizer.encode(name, special=True)) == 1, name
        assert tokenizer.decode(tokenizer.encode(name, special=True)) == name
    assert tokenizer.encode(TURN_END, special=True) == [tokenizer.end_id]
    assert tokenizer.encode(PAD, special=True) == [tokenizer.pad_id]


def test_a_tokenizer_without_reason_and_answer_tags_spells_them(qwen_like):
    ids = qwen_like.encode("<reason>a</reason><answer>", special=True)
    assert len(ids) > 4
    assert qwen_like.decode(ids) == "<reason>a</reason><answer>"


def test_digits_and_newlines_stand_alone(tokenizer):
    assert len(tokenizer.encode("1234567")) == 7
    assert len(tokenizer.encode(" 12")) == 3
    assert len(tokenizer.encode("\n\n\n")) == 3


def test_vocabulary_bounds_every_id(any_tokenizer):
    ids = any_tokenizer.encode(" ".join(TEXTS) + "".join((*CONTROL_TOKENS, *TAGS)), special=True)
    assert max(ids) < any_tokenizer.vocab_size
    assert any_tokenizer.decode([any_tokenizer.vocab_size - 1]) != ""


def test_decode_takes_any_ids_a_policy_may_sample(any_tokenizer):
    spare = any_tokenizer.vocab_size + 3
    assert any_tokenizer.decode([*any_tokenizer.encode("ab"), spare]) == "ab"
    half = any_tokenizer.encode("\u0416")[:1]  # the first byte of a character that was never seen
    assert any_tokenizer.decode(half) == "\ufffd"


def test_lone_surrogates_are_replaced(any_tokenizer):
    assert any_tokenizer.decode(any_tokenizer.encode("a\ud83db")) == "a\ufffdb"


@quick
@given(text=ANY_TEXT)
def test_transformers_reads_the_saved_folder_alike(saved, any_tokenizer, text):
    theirs = saved(any_tokenizer)
    ids = any_tokenizer.encode(text, special=True)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs(text)["input_ids"] == ids  # nothing is added by default either
    assert theirs.decode(ids) == text


@pytest.fixture(scope="session")
def saved(tmp_path_factory, reload):
    loaded = {}

    def read(tokenizer: Tokenizer):
        if tokenizer not in loaded:
            folder = tmp_path_factory.mktemp("saved")
            tokenizer.save(folder)
            loaded[tokenizer] = reload(folder)
        return loaded[tokenizer]

    return read


def test_the_saved_folder_names_pad_and_end(saved, any_tokenizer):
    theirs = saved(any_tokenizer)
    assert theirs.eos_token_id == any_tokenizer.end_id
    assert theirs.pad_token_id == any_tokenizer.pad_id
    assert len(theirs) == any_tokenizer.vocab_size


def test_saving_and_loading_changes_nothing(tmp_path, any_tokenizer):
    any_tokenizer.save(tmp_path / "a", chat_template="T")
    again = load_tokenizer(tmp_path / "a")
    again.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "b/tokenizer_config.json").read_text())["chat_template"] == "T"


def test_settings_of_a_published_folder_are_kept(tmp_path, qwen_like):
    qwen_like.save(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"model_max_length": 4096, "x": 1}))
    load_tokenizer(tmp_path).save(tmp_path / "again")
    kept = json.loads((tmp_path / "again/tokenizer_config.json").read_text())
    assert kept["model_max_length"] == 4096
    assert kept["x"] == 1


def test_training_is_deterministic_across_processes():
    program = (
        "import hashlib, sys; from jaxrl.text.sentencepiece_bpe import train_model; "
        "sys.stdout.write(hashlib.sha256(train_model(eval(sys.stdin.read()), 420)).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program], input=repr(TEXTS), env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(runs) == 1


ROOT = pathlib.Path(__file__).resolve().parents[2]


@quick
@given(text=ANY_TEXT.filter(lambda text: "\u2581" not in text))
def test_ids_are_those_of_sentencepiece(processor, tokenizer, text):
    plain = text
    for name in (*CONTROL_TOKENS, *TAGS):  # sentencepiece would match the tags, and drops control pieces
        plain = plain.replace(name, "")
    if any(name in plain for name in (*CONTROL_TOKENS, *TAGS)):
        return
    assert processor.encode(plain) == tokenizer.encode(plain)


@pytest.fixture(scope="session")
def processor():
    return sentencepiece.SentencePieceProcessor(model_proto=train_model(TEXTS, 420))


def test_a_sentencepiece_file_and_its_folder_are_read(tmp_path, tokenizer):
    (tmp_path / "small.model").write_bytes(train_model(TEXTS, 420))
    text = "Tom buys 12 pears.\n"
    assert load_tokenizer(tmp_path / "small.model").encode(text) == tokenizer.encode(text)
    assert load_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)


def test_the_stated_minimum_is_the_minimum():
    with pytest.raises(TokenizerError, match="vocab_size=100 is too small") as caught:
        train_sentencepiece(TEXTS, 100)
    least = int(str(caught.value).split("at least ")[1].split(":")[0])
    assert train_sentencepiece(TEXTS, least).vocab_size == least
    with pytest.raises(TokenizerError, match=f"at least {least}"):
        train_sentencepiece(TEXTS, least - 1)


def test_a_large_vocabulary_takes_what_there_is():
    assert 270 < train_sentencepiece(["a small text"], 5000).vocab_size < 400


@pytest.mark.parametrize("texts", [[], [""], ["\n\t"]])
def test_no_text_to_train_on(texts):
    with pytest.raises(TokenizerError, match="no text to train"):
        train_sentencepiece(texts, 500)


def test_long_texts_are_not_dropped():
    tokenizer = train_sentencepiece(["abab" * 5000], 300)
    assert len(tokenizer.encode("abab" * 4)) < 16


def test_missing_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{broken", "not a tokenizer.json"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("tokenizer.json", b"[]", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "utf-8"),
        ("x.model", b"garbage", "not a sentencepiece model"),
        ("x.model", b"", "not a sentencepiece model"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_missing_control_tokens_are_named(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|other|>"))
    with pytest.raises(TokenizerError, match=r"has no <\|im_end\|>"):
        load_tokenizer(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text"),
        ({"add_dummy_prefix": True}, "normalises text"),
        ({"remove_extra_whitespaces": True}, "normalises text"),
        ({"byte_fallback": False}, "no byte pieces"),
        ({"model_type": "unigram"}, "not BPE"),
    ],
)
def test_sentencepiece_models_that_would_change_text_are_refused(tmp_path, options, message):
    exact = {
        "model_type": "bpe", "normalization_rule_name": "identity", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "byte_fallback": True,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "foreign"), vocab_size=400, minloglevel=2,
        hard_vocab_limit=False, **exact | options,
    )  # fmt: skip
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path / "foreign.model")
