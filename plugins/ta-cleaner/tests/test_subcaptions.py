import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plait_ta_cleaner import subcaptions
from plait_ta_cleaner.subcaptions import SubcaptionSource, Tagged, WordPool
from plait_ta_cleaner.tagging import LexiconTagger, WordList

DOG = "a small brown dog chases the red ball across a wet park"
# Of every tag what the captions below hold; other words count as nouns.
WORDS = WordList(
    dict.fromkeys(["black", "brown", "dark", "dirty", "old", "red", "small", "wet", "white"], ("ADJ",))
    | dict.fromkeys(["chase", "lie", "run"], ("VERB",)),
    {},
)
TAGGER = LexiconTagger(WORDS)
POOL = {
    "NOUN": ["apple", "ball", "balls", "cat", "dog", "dogs", "hound", "park", "street"],
    "VERB": ["carries", "chase", "chases", "holding", "runs"],
    "ADJ": ["brown", "brownish", "red", "small", "wet", "yellow"],
}
SYNONYMS = {"dog": ["hound"], "brown": ["brownish"]}


def bases(word):
    plural = {"dogs": "dog", "balls": "ball"}
    return {base for base, _ in WORDS.bases(word)} | {plural.get(word, word)}


def pool(words=POOL):
    return WordPool(words, lambda word: SYNONYMS.get(word, ()), bases)


def source(**settings):
    return SubcaptionSource(TAGGER, pool(), **settings)


def tagged(caption):
    return subcaptions.tag_caption(caption, TAGGER)


# --- factual


def without_adjectives(caption):
    return subcaptions.factual_text(tagged(caption), subcaptions.drop_adjectives(tagged(caption)))


def relation(caption, seed):
    kept = subcaptions.first_relation(tagged(caption), random.Random(seed))
    return subcaptions.factual_text(tagged(caption), kept)


def test_adjectives_go():
    assert without_adjectives(DOG) == "a dog chases the ball across a park"
    assert without_adjectives("a red dog runs in the park") == "a dog runs in the park"
    assert without_adjectives("a very dirty old apple") == "an apple"
    assert without_adjectives("a black and white dog") == "a dog"
    assert without_adjectives("a red dog and a cat") == "a dog and a cat"


def test_first_relation_keeps_two_nouns_and_what_joins_them():
    texts = {relation(DOG, seed) for seed in range(200)}
    assert "a dog chases a park" in texts
    assert {text.replace("small ", "").replace("brown ", "").replace("wet ", "") for text in texts} == {
        "a dog chases a park"
    }
    assert len(texts) == 8  # each of three adjectives stays or goes
    fruit = {relation("apples and pears lie on a table", seed) for seed in range(50)}
    assert fruit == {"apples lie a table", "pears lie a table"}
    assert relation("a dog", 0) == "a dog"


@pytest.mark.parametrize(
    ("caption", "positive"),
    [
        ("A small, brown dog runs in the park.", "A dog runs in the park."),
        ("Small dogs run.", "Dogs run."),
        ("THE DIRTY APPLE!", "THE APPLE!"),
        ("Look: a ball. Small cats run!", "Look: a ball. cats run!"),
        ('"The dog," a red ball (old)', '"The dog," a ball'),
        ("a dog in a park.", "a dog in a park."),
    ],
)
def test_case_and_punctuation_do_not_tell_positives_from_negatives(caption, positive):
    """What the caption has besides words, both rewritings have, whether words were left out or not."""
    texts = source().draw(caption, 0, 0)
    assert texts.positive == positive
    (negative,) = texts.negatives
    signs = re.sub(r"\w+", "", caption)
    assert re.sub(r"\w+", "", negative) == signs
    for old, new in zip(re.findall(r"\w+", caption), re.findall(r"\w+", negative), strict=True):
        assert (new[0].isupper(), new.isupper()) == (old[0].isupper(), old.isupper())


def test_articles_suit_the_next_word():
    assert [subcaptions.article(word) for word in ["apple", "dog", "hour", "university", "one-way", "umbrella"]] == [
        "an",
        "a",
        "an",
        "a",
        "a",
        "an",
    ]


captions = st.lists(
    st.sampled_from(
        [
            "a",
            "the",
            "red",
            "small",
            "very",
            "dirty",
            "dog",
            "ball",
            "park",
            "chases",
            "runs",
            "in",
            "across",
            "and",
            "is",
            "zorgle",
        ]
    ),
    min_size=1,
    max_size=12,
)


@given(captions)
def test_a_factual_text_is_a_subsequence_with_all_nouns(words):
    caption = tagged(" ".join(words))
    places = subcaptions.drop_adjectives(caption)
    assert places == sorted(set(places))
    kept = [caption.words[place] for place in places]
    nouns = [word for word, tag in zip(caption.words, caption.tags, strict=True) if tag == "NOUN"]
    assert Counter(nouns) <= Counter(kept)


# --- counterfactual


@given(captions, st.integers(0, 10_000))
def test_a_counterfactual_differs_in_one_word_of_the_same_kind(words, seed):
    caption = tagged(" ".join(words))
    text = subcaptions.exchange_word(caption, pool(), random.Random(seed))
    if text is None:
        assert not set(caption.tags) & {"NOUN", "VERB", "ADJ"}
        return
    changed = [
        (old, new, tag)
        for old, new, tag in zip(caption.words, text.split(), caption.tags, strict=True)
        if old != new and old not in ("a", "an")
    ]
    assert len(changed) == 1
    old, new, tag = changed[0]
    assert new in POOL[tag]
    assert new not in SYNONYMS.get(old, ())
    assert bases(old).isdisjoint(bases(new))
    assert new not in caption.words


def test_every_slot_of_a_caption_is_reached():
    caption = tagged("a red dog runs in the park")
    changed = Counter()
    for seed in range(400):
        text = subcaptions.exchange_word(caption, pool(), random.Random(seed)).split()
        changed[next(i for i, (a, b) in enumerate(zip(caption.words, text, strict=True)) if a != b and a != "a")] += 1
    assert set(changed) == {1, 2, 3, 6}
    assert min(changed.values()) > 60


def test_without_an_allowed_word_another_slot_is_taken():
    only_synonym = WordPool({"NOUN": ["hound"], "ADJ": ["yellow"]}, lambda word: SYNONYMS.get(word, ()))
    assert subcaptions.exchange_word(tagged("a red dog"), only_synonym, random.Random(0)) == "a yellow dog"
    assert subcaptions.exchange_word(tagged("a dog"), only_synonym, random.Random(0)) is None


def test_the_pool_holds_frequent_words_of_each_kind():
    table = [tagged("a red dog runs")] * 3 + [tagged("a rare cat runs")]
    found = subcaptions.pool_words(table, 3, extra=["Fire Truck"])
    assert found["NOUN"] == ["dog", "fire", "truck"]
    assert found["VERB"] == ["runs"]
    assert found["ADJ"] == ["red"]
    assert subcaptions.pool_words(table, 5)["NOUN"] == []
    assert set(subcaptions.pool_words(table, 1, slots=["noun"])) == {"NOUN"}


# --- both


def test_draws_depend_on_seed_epoch_and_row_only():
    one, other = source(num_negatives=3, positive_mode="mixed"), source(num_negatives=3, positive_mode="mixed")
    forward = [one.draw(DOG, epoch, row) for epoch in range(2) for row in range(20)]
    backward = [other.draw(DOG, epoch, row) for epoch in (1, 0) for row in reversed(range(20))]
    assert forward == backward[::-1]
    assert len(set(forward)) > 10
    assert source(seed=1, num_negatives=3).draw(DOG, 0, 0) != source(seed=2, num_negatives=3).draw(DOG, 0, 0)


def test_negatives_of_a_caption_differ():
    for row in range(30):
        negatives = source(num_negatives=8).draw(DOG, 0, row).negatives
        assert len(set(negatives)) == len(negatives) >= 6
        assert DOG not in negatives


@pytest.mark.parametrize(
    "caption",
    ["dog", "the of and", "собака бежит", "红 包", "!!!", "word " * 200, "a red dog " * 70, "…", "ein großer Hund"],
)
@pytest.mark.parametrize("mode", ["drop_adj", "first_relation", "mixed", "caption"])
def test_odd_captions(caption, mode):
    texts = source(positive_mode=mode, num_negatives=2).draw(caption, 0, 0)
    assert texts.positive.strip()
    assert texts.identity == (texts.positive == caption)
    assert caption not in texts.negatives


def test_a_caption_without_a_noun_stays():
    texts = source().draw("very red and small", 0, 0)
    assert texts.identity
    assert texts.positive == "very red and small"


def test_captions_are_tagged_once():
    calls = []

    def counting(words):
        calls.append(words)
        return TAGGER(words)

    drawn = SubcaptionSource(counting, pool())
    for row in range(5):
        drawn.draw(DOG, 0, row)
    assert len(calls) == 1


def test_a_tagger_that_gives_wrong_tags_is_named():
    with pytest.raises(ValueError, match="'mine'"):
        SubcaptionSource(lambda words: ["X"] * len(words), pool(), tagger_name="mine").draw("a dog", 0, 0)


def test_words_come_from_the_caption():
    found = tagged("A Dog, a ball.")
    assert found == Tagged(
        words=("a", "dog", "a", "ball"),
        tags=("DET", "NOUN", "DET", "NOUN"),
        spelled=("A", "Dog", "a", "ball"),
        between=("", " ", ", ", " ", "."),
    )
    assert found.text(range(4)) == "A Dog, a ball."
