import pytest
from hypothesis import given
from hypothesis import strategies as st
from plait_sa_aet.captions import clean_caption
from plait_sa_aet.stop_words import STOP_WORDS, read_stop_words


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Two  men, on a-bench!", "two men on a bench"),
        ("A <person> and/or <PERSON>'s dog.", "a person and or persons dog"),
        ('(one) "two" #3 * four: five; six ~ seven?', "one two 3 four five six seven"),
        ("\n a\tman \r\n", "a man"),
        ("...!?", ""),
        ("", ""),
    ],
)
def test_cleaning(text, cleaned):
    assert clean_caption(text) == cleaned


def test_the_first_words_are_kept():
    assert clean_caption(" ".join(map(str, range(40)))) == " ".join(map(str, range(30)))
    assert clean_caption("a b c", max_words=2) == "a b"


@given(st.text(), st.integers(1, 40))
def test_any_text_becomes_words_between_single_spaces(text, max_words):
    cleaned = clean_caption(text, max_words)
    assert not set(cleaned) & set(",.'!?\"()*#:;~-/")
    words = cleaned.split(" ")
    assert len(words) <= max_words
    assert cleaned == "" or all(word and not any(map(str.isspace, word)) for word in words)


def test_wrong_captions_are_refused():
    with pytest.raises(TypeError, match="give a string"):
        clean_caption(["a dog"])
    with pytest.raises(ValueError, match="max_words is 0"):
        clean_caption("a dog", 0)


def test_own_stop_words_are_function_words_and_marks():
    assert {"a", "the", "of", "and", "is", "with", "not", ".", ","} <= STOP_WORDS
    assert not {"dog", "red", "man", "standing", "two", "left", "bench"} & STOP_WORDS
    # A stop word that cleaning changes would never meet a cleaned caption.
    assert all(clean_caption(word) in (word, "") for word in STOP_WORDS if word.isalpha())


def test_stop_words_from_a_file(tmp_path):
    path = tmp_path / "stop.txt"
    path.write_text("The\n\n of \n a the\n", encoding="utf-8")
    assert read_stop_words(path) == {"the", "of", "a the"}
    with pytest.raises(ValueError, match=r"missing\.txt.*one word per line"):
        read_stop_words(tmp_path / "missing.txt")
