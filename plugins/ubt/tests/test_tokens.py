import math
import unicodedata
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plait_ubt import tokens

captions = st.text(alphabet="abz Ä中9-'", min_size=1, max_size=40).filter(lambda text: text.split())


def test_lift_of_a_word_in_all_of_16_top_and_100_of_1000_normal_captions():
    lifts = tokens.word_lifts(["the bag"] * 16, ["bag"] * 100 + ["shoe"] * 900, {})
    assert lifts["bag"].lift == pytest.approx(2.268744, abs=1e-6)
    assert tokens.concentration({"bag": lifts["bag"]}) == pytest.approx(2.268744, abs=1e-6)
    doubled = tokens.word_lifts(["bag"] * 32, ["bag"] * 200 + ["shoe"] * 1800, {})
    assert doubled["bag"].lift == pytest.approx(2.285321, abs=1e-6)


def test_equal_shares_in_equally_large_sets_have_no_lift():
    assert tokens.word_lifts(["a bag", "shoe"], ["bag", "b"], {})["bag"].lift == 0


def test_plural_counts_as_the_singular_where_both_occur():
    folding = tokens.plural_folding(["two bags", "a bag", "a glass"])
    assert folding == {"bags": "bag"}
    assert tokens.word_lifts(["two bags", "a bag"], ["x"], folding)["bag"].top_share == 1
    assert tokens.split_at_words("two bags here", {"bag"}, folding) == tokens.CaptionSplit(
        forget="bags", keep="two here"
    )


def test_forget_words_are_common_and_lifted_and_limited():
    top = ["red bag on a table"] * 8 + ["rare bag on a table"] + ["zebra"]
    normal = ["red thing on a table"] * 50 + ["thing on a bag"]
    lifts = tokens.word_lifts(top, normal, {})
    assert lifts["zebra"].lift > 0
    assert tokens.select_forget_words(lifts, 3) == ["bag"]
    many = tokens.word_lifts(["w x y z"] * 4, ["a"] * 100, {})
    assert tokens.select_forget_words(many, 2) == ["w", "x"]
    assert tokens.select_forget_words(tokens.word_lifts(["a"] * 4, ["a"] * 4, {}), 3) == []


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A Bag, 2 bags!", ["a", "bag", "bags"]),
        ("the dog's bone-dry CAFÉ", ["the", "dog", "s", "bone", "dry", "café"]),
        ("cafe\u0301", ["café"]),
        ("Красная сумка, 2 шт.", ["красная", "сумка", "шт"]),
        ("μια τσάντα", ["μια", "τσάντα"]),
        ("एक बैग की फ़ोटो", ["एक", "बैग", "की", "फ़ोटो"]),
        ("红包, red 包", ["红", "包", "red", "包"]),
        ("7 + 7", ["7", "+", "7"]),
    ],
)
def test_words_of_any_alphabet(caption, words):
    assert [unicodedata.normalize("NFC", word) for word in words] == tokens.caption_words(caption)
    assert tokens.has_letters(caption) == (caption != "7 + 7")


@given(captions, st.integers(0, 1000))
def test_forget_and_keep_words_are_the_caption_s_words_in_order(caption, seed):
    words = tokens.caption_words(caption)
    generator = torch.Generator().manual_seed(seed)
    for split in (
        tokens.split_at_random_span(caption, generator),
        tokens.split_at_words(caption, {words[0]}, {}),
    ):
        forget, keep = split.forget.split(), split.keep.split()
        assert Counter(forget) + Counter(keep) == Counter(words)
        assert split.forget
        for part in (forget, keep):
            rest = iter(words)
            assert all(word in rest for word in part)


def test_random_spans_are_uniform():
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(tokens.split_at_random_span("x y z", generator).forget for _ in range(6000))
    assert set(drawn) == {"x", "y", "z", "x y", "y z", "x y z"}
    assert sum((n - 1000) ** 2 / 1000 for n in drawn.values()) < 20.5  # chi-square, 5 degrees, p = 0.001


def test_all_words_forgotten_leaves_nothing_to_keep():
    words = tokens.caption_words("A photo of a bag!")
    assert tokens.split_caption(words, range(len(words))) == tokens.CaptionSplit(forget="a photo of a bag", keep="")


def test_leave_one_out_texts():
    assert tokens.without_each_word("a red bag") == ["red bag", "a bag", "a red"]


def test_concentration_is_low_for_unrelated_captions():
    top = [f"w{chr(97 + i)}" for i in range(20)]
    assert tokens.concentration(tokens.word_lifts(top, ["x"] * 1000, {})) < math.log(2000) / 20
