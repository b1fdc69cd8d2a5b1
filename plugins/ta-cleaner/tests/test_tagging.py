import pytest
from hypothesis import given
from hypothesis import strategies as st
from plait_clip import prompts, toy_data
from plait_ta_cleaner import tagging


@pytest.fixture(scope="module")
def words():
    return tagging.open_words(None)


@pytest.fixture(scope="module")
def tagger(words):
    return tagging.LexiconTagger(words)


@pytest.mark.parametrize(
    ("caption", "tags"),
    [
        (
            "a small brown dog chases the red ball across a wet park",
            "DET ADJ ADJ NOUN VERB DET ADJ NOUN ADP DET ADJ NOUN",
        ),
        ("a red dog runs in the park", "DET ADJ NOUN VERB ADP DET NOUN"),
        ("someone is selling a grey boot", "OTHER OTHER VERB DET ADJ NOUN"),
        ("men playing tennis on a very dirty court", "NOUN VERB NOUN ADP DET ADV ADJ NOUN"),
        ("someone wrote the number eight", "OTHER VERB DET NOUN NOUN"),
        ("a black and white dog", "DET ADJ OTHER ADJ NOUN"),
        ("a black dog and a white cat", "DET ADJ NOUN OTHER DET ADJ NOUN"),
        ("a zorgle", "DET NOUN"),
    ],
)
def test_known_captions(tagger, caption, tags):
    assert tagger(tagging.caption_words(caption)) == tags.split()


def test_captions_of_the_toy_data(tagger):
    adjectives = {"small", "dark", "square", "patterned"}
    verbs = {"lying", "hanging", "showing", "selling", "wrote"}
    captions = [
        c.format(b="dark", s="square", t="patterned", n=n)
        for c in toy_data.FASHION_CAPTIONS
        for n in toy_data.FASHION_NAMES
    ]
    captions += [c.format(name) for c in prompts.DIGITS for name in toy_data.DIGIT_NAMES]
    for caption in captions:
        words = tagging.caption_words(caption)
        for word, tag in zip(words, tagger(words), strict=True):
            closed = tagging.CLOSED.get(word)
            assert tag == (closed or ("ADJ" if word in adjectives else "VERB" if word in verbs else "NOUN")), caption


@given(st.text(max_size=60))
def test_any_text_gets_a_tag_a_word(tagger, caption):
    words = tagging.caption_words(caption)
    tagging.check_tags(words, tagger(words), "lexicon")


def test_hyphenated_words_stay_whole():
    assert tagging.caption_words("A T-shirt, the dog's café!") == ["a", "t-shirt", "the", "dog's", "café"]


def test_inflected_forms_share_their_base(words):
    assert ("run", "VERB") in words.bases("running")
    assert ("chase", "VERB") in words.bases("chasing")
    assert ("write", "VERB") in words.bases("wrote")
    assert not words.bases("zorgle")


def test_an_unused_part_of_speech_is_left_out(words):
    assert words("narrow") == {"ADJ", "VERB"}  # the noun never occurs
    assert words("dog") >= {"NOUN"}
    assert ("man", "NOUN") in words.bases("men")


def test_words_do_not_depend_on_what_is_installed(words, tmp_path, monkeypatch):
    for kind in ("index", "data"):
        for name in ("noun", "verb", "adj", "adv"):
            (tmp_path / f"{kind}.{name}").write_text("")
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    tagging.open_words.cache_clear()
    assert tagging.open_words(None).tags == words.tags
    assert not tagging.open_words(tmp_path).tags


def test_wordnet_folder_must_hold_wordnet(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.noun"):
        tagging.open_words(tmp_path)


def test_tags_are_checked():
    with pytest.raises(ValueError, match="one of NOUN"):
        tagging.check_tags(["a"], ["PROPN"], "mine")
    with pytest.raises(ValueError, match="mine"):
        tagging.check_tags(["a", "b"], ["DET"], "mine")
