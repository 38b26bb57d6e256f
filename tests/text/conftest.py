"""Two tokenizers: one trained here, one laid out as Qwen's published tokenizer.json."""

import pathlib

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxrl.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from jaxrl.text.tokens import CONTROL_TOKENS

TEXTS = [
    "Tom has 12 apples and buys 7 more.  How many apples does Tom have?",
    'Multiply.</reason>\n<tool_call>{"name": "python", "arguments": {"code": "12*7"}}</tool_call>',
    "NameError: name 'x' is not defined",
    "def f(x):\n    return x + 1\n",
    "naïve café – π ≈ 3.14 😀",
] * 8


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_sentencepiece(TEXTS, 420)


@pytest.fixture(scope="session")
def qwen_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with Qwen's added tokens: control tokens special, tool tags not, no reason and answer tags."""
    folder = tmp_path_factory.mktemp("qwen")
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    trained.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in CONTROL_TOKENS])
    tags = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    trained.add_tokens([tokenizers.AddedToken(tag, special=False, normalized=False) for tag in tags])
    trained.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(params=["sentencepiece", "qwen_like"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Tokenizer, qwen_like: Tokenizer) -> Tokenizer:
    return tokenizer if request.param == "sentencepiece" else qwen_like


@pytest.fixture(scope="session")
def reload():
    """Reads a folder as a user of transformers would."""

    def read(folder: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
        return transformers.AutoTokenizer.from_pretrained(folder)

    return read
