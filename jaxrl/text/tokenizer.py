"""One tokenizer class over tokenizer.json, whether trained here, read from sentencepiece, or a published model's."""

import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import tokenizers

from jaxrl.text.sentencepiece_bpe import tokenizer_json, train_model
from jaxrl.text.tokens import CONTROL_TOKENS, PAD, TAGS, TURN_END

_CONTROL_LIKE = re.compile(r"<\|.*\|>", re.DOTALL)


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained, read or used; the message says what to do."""


class Tokenizer:
    """Text to ids and back.

    Attributes:
        vocab_size: one more than the largest id.
        pad_id: id of ``<|endoftext|>``.
        end_id: id of ``<|im_end|>``, which ends every turn.
    """

    def __init__(self, definition: str, settings: dict[str, object] | None = None) -> None:
        """
        Args:
            definition: text of a tokenizer.json.
            settings: content of the tokenizer_config.json that came with it, kept by ``save``.

        Raises:
            TokenizerError: the definition is unreadable or lacks a ChatML control token.
        """
        try:
            parsed = json.loads(definition)
            self._full = tokenizers.Tokenizer.from_str(definition)
            parsed["added_tokens"] = [token for token in parsed.get("added_tokens") or [] if not _structural(token)]
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(parsed))
        except Exception as error:  # the library raises bare Exception for a definition it cannot read
            raise TokenizerError(f"not a tokenizer.json: {error}") from error
        self._definition = definition
        self._settings = settings or {}
        vocabulary = self._full.get_vocab(with_added_tokens=True)
        missing = [token for token in CONTROL_TOKENS if token not in vocabulary]
        if missing:
            raise TokenizerError(
                f"the tokenizer has no {', '.join(missing)}; conversations are written in ChatML, so add "
                "these as special tokens or use a tokenizer that has them (Qwen2 and Qwen3 do)"
            )
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.pad_id: int = vocabulary[PAD]
        self.end_id: int = vocabulary[TURN_END]
        self.control_ids: frozenset[int] = frozenset(vocabulary[token] for token in CONTROL_TOKENS)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of ``text``; nothing is added around it.

        Args:
            text: any text; a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD.
            special: True reads control tokens and tags written in the text as the tokens they name, for text that
                is ours. False spells them out like any other text, for problems and tool output: then no text
                yields a control token or the single token of a tag.
        """
        tokenizer = self._full if special else self._plain
        try:
            return tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, control tokens and tags written out.

        Ids beyond the vocabulary (an embedding may have spare rows) are left out; bytes that form no UTF-8 become
        U+FFFD.
        """
        return self._full.decode([int(token) for token in ids], skip_special_tokens=False)

    def save(self, folder: str | pathlib.Path, *, chat_template: str = "") -> None:
        """Write tokenizer.json and tokenizer_config.json, from which ``transformers.AutoTokenizer`` gives these ids.

        Args:
            folder: made if absent.
            chat_template: Jinja text of the conversation's form (``ChatFormat.template``); "" keeps the one this
                tokenizer came with, if any.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "model_max_length": int(1e30),  # transformers' own value for "no limit"
            **self._settings,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
        }
        if chat_template:
            settings["chat_template"] = chat_template
        text = json.dumps(settings, ensure_ascii=False, indent=2)
        (folder / "tokenizer.json").write_text(self._definition, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a sentencepiece BPE tokenizer in memory; the same texts in the same order give the same tokenizer.

    Args:
        texts: training texts; control tokens and tags in them are set aside.
        vocab_size: pieces, special ones included; a small corpus may give fewer.

    Raises:
        TokenizerError: ``vocab_size`` is too small for the alphabet (the message says the least), or no text.
    """
    try:
        return Tokenizer(tokenizer_json(train_model(texts, vocab_size)))
    except ValueError as error:
        raise TokenizerError(str(error)) from error


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Read a tokenizer from a tokenizer.json, a sentencepiece ``.model``, or a folder that holds one of them.

    Raises:
        FileNotFoundError: nothing at ``path``, or a folder without a tokenizer.
        TokenizerError: the file is unreadable or cannot be used; the message begins with its path.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _tokenizer_file(path)
    elif not path.exists():
        raise FileNotFoundError(
            f"no tokenizer at {path}; give a tokenizer.json, a sentencepiece .model, or their folder"
        )
    settings_path = path.parent / "tokenizer_config.json"
    try:
        if path.suffix == ".model":
            return Tokenizer(tokenizer_json(path.read_bytes()))
        settings = json.loads(settings_path.read_text(encoding="utf-8")) if settings_path.exists() else {}
        return Tokenizer(path.read_text(encoding="utf-8"), settings)
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path}: {error}") from error


def _tokenizer_file(folder: pathlib.Path) -> pathlib.Path:
    candidates = [folder / "tokenizer.json", *sorted(folder.glob("*.model"))]
    found = [candidate for candidate in candidates if candidate.is_file()]
    if not found:
        raise FileNotFoundError(f"no tokenizer.json and no sentencepiece .model in {folder}")
    return found[0]


def _structural(token: dict[str, object]) -> bool:
    """Whether an added token frames the conversation, so that plain text must not yield it."""
    content = str(token["content"])
    return bool(token.get("special")) or content in TAGS or _CONTROL_LIKE.fullmatch(content) is not None
