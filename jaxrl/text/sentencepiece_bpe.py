"""Training a sentencepiece BPE model, and rewriting one as the tokenizer.json that everything here runs on.

BPE rather than Unigram, because only BPE converts exactly. A BPE model is its ordered merges; Unigram compares sums
of rounded scores, where two implementations break ties differently, and its lattice would take the text ``<0x0A>``
for the byte piece of that name.

sentencepiece writes a space as ``▁`` (U+2581) and so cannot tell the two apart. The rewritten vocabulary holds real
spaces and no normaliser: a literal ``▁`` falls back to its bytes, and every text survives the round trip.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from jaxrl.text.tokens import CONTROL_TOKENS, TAGS

_SPACE = "\u2581"
_UNKNOWN = "<unk>"  # sentencepiece insists on one; byte fallback never yields it
_BYTES = 256
# Newlines are tokens of their own; other characters that sentencepiece uses as marks go by byte fallback.
_BREAKS = re.compile("|".join(map(re.escape, (*CONTROL_TOKENS, *TAGS))) + rf"|[\x00-\x1f\x7f{_SPACE}]")


def train_model(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a lossless BPE model in memory: same texts in the same order, same bytes.

    Identity normalisation, no dummy prefix, byte fallback, digits one by one; ChatML control tokens, the tags and
    the newline are single pieces.

    Args:
        texts: training texts; read once.
        vocab_size: pieces, special ones included. A small corpus may give fewer.

    Raises:
        ValueError: ``vocab_size`` has no room for the alphabet; the message says the least that would do.
    """
    chunks = [chunk for text in texts for chunk in _chunks(text)]
    alphabet = {_SPACE if character == " " else character for chunk in chunks for character in chunk}
    least = 1 + len(CONTROL_TOKENS) + len(TAGS) + 1 + _BYTES + len(alphabet)
    if not chunks:
        raise ValueError("no text to train a tokenizer on; give at least one text that is not empty")
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for a tokenizer of these texts; they need at least {least}: "
            f"{len(alphabet)} characters, {_BYTES} bytes and {least - _BYTES - len(alphabet)} special pieces"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(chunks),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        split_by_unicode_script=False,  # lets `"code":` become one piece
        control_symbols=list(CONTROL_TOKENS),
        user_defined_symbols=[*TAGS, "\n"],
        unk_id=0,
        unk_piece=_UNKNOWN,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        max_sentence_length=1 + max(len(chunk.encode()) for chunk in chunks),
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_json(model: bytes) -> str:
    """A sentencepiece BPE model as the text of a tokenizer.json that gives the same ids.

    Raises:
        ValueError: the model cannot represent every text exactly (it normalises, adds a space, or lacks byte
            pieces), or is not BPE.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"not a sentencepiece model: {error}") from error
    if not model:
        raise ValueError("not a sentencepiece model: it is empty")
    if processor.normalize(" \ufb01  x ") != f"{_SPACE}\ufb01{_SPACE}{_SPACE}x{_SPACE}":
        raise ValueError(
            "this sentencepiece model normalises text or adds a space, so token ids would not stand for the exact "
            "text; train one with normalization_rule_name=identity, add_dummy_prefix=false, "
            "remove_extra_whitespaces=false, or use the model's tokenizer.json"
        )
    ids = range(processor.vocab_size())
    pieces = [processor.id_to_piece(i) for i in ids]
    if sum(processor.is_byte(i) for i in ids) != _BYTES:
        raise ValueError("this sentencepiece model has no byte pieces; train one with byte_fallback=true")
    normal = _normal_ids(processor)
    special = [i for i in ids if i not in normal and not processor.is_byte(i) and not processor.is_unknown(i)]
    written = [piece.replace(_SPACE, " ") for piece in pieces]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added_token(i, written[i], processor.is_control(i)) for i in special],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": {piece: i for i, piece in enumerate(written)},
                "merges": list(_merges([written[i] for i in normal])),
            },
        },
        ensure_ascii=False,
    )


def _chunks(text: str) -> Iterator[str]:
    return (chunk for chunk in _BREAKS.split(text) if chunk)


def _normal_ids(processor: sentencepiece.SentencePieceProcessor) -> range:
    """Ids of the learned pieces: they stand last, with scores 0, -1, -2, … in the order of their merges."""
    size = processor.vocab_size()
    count = 1 - round(processor.get_score(size - 1))
    ids = range(size - count, size)
    if not 0 < count <= size or any(processor.get_score(i) != -rank for rank, i in enumerate(ids)):
        raise ValueError(
            "this sentencepiece model is not BPE; use its tokenizer.json, or train one with model_type=bpe"
        )
    return ids


def _merges(pieces: list[str]) -> Iterator[tuple[str, str]]:
    """Every way to join two learned pieces into a third, in the order in which the thirds were learned."""
    known = set(pieces)
    for piece in pieces:
        for cut in range(1, len(piece)):
            if piece[:cut] in known and piece[cut:] in known:
                yield piece[:cut], piece[cut:]


def _added_token(token_id: int, content: str, special: bool) -> dict[str, object]:
    return {
        "id": token_id, "content": content, "special": special,
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
    }  # fmt: skip
