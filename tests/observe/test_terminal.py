from hypothesis import given
from hypothesis import strategies as st

from jaxrl.observe.terminal import beginning, printable


@given(st.text())
def test_printable_text_cannot_steer_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not any((ord(c) < 0x20 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 for c in shown)
    shown.encode("utf-8")


def test_printable_text_keeps_what_is_harmless() -> None:
    assert printable("a\tb\nπ ≈ 3 \r\n\x1b[0m\ud800") == "a\tb\nπ ≈ 3 \n␛[0m?"


@given(st.text(max_size=50), st.integers(1, 20))
def test_a_beginning_is_one_line_that_fits(text: str, width: int) -> None:
    shown = beginning(text, width)
    assert len(shown) <= width and "\n" not in shown


def test_a_cut_is_marked() -> None:
    assert beginning("one two\n three", 20) == "one two three"
    assert beginning("one two\n three", 9) == "one two…"
