import json
import lzma
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_clip.backdoor.eda import clean, delete_words, eda, insert_synonyms, replace_synonyms, swap_words
from plait_clip.backdoor.synonyms import mapped_synonyms, open_synonyms
from plait_clip.backdoor.wordnet import WordNet, open_wordnet, pack

TABLE = mapped_synonyms(
    {"dog": ["hound", "dog"], "runs": ["sprints"], "small": ["tiny", "little-ish"], "park": ["green"]}
)


def none(word):
    return []


def test_clean_by_hand():
    assert clean("The dog's\tBALL—it’s 2 red-ish!") == "the dogs ball its red ish "
    assert clean("  two  spaces ") == "two spaces "
    assert clean("123") == ""


def test_text_without_letters_is_returned_unchanged():
    for caption in ("", "   ", "123 !"):
        assert eda(caption, TABLE, random.Random(0)) == caption


def test_replacement_changes_all_occurrences_of_one_word():
    words = ["a", "dog", "and", "a", "dog"]
    assert replace_synonyms(words, 1, TABLE, random.Random(0)) == ["a", "hound", "and", "a", "hound"]
    assert replace_synonyms(words, 1, none, random.Random(0)) == words


def test_replacement_never_touches_stop_words():
    everything = mapped_synonyms({"the": ["xx"], "and": ["xx"], "cat": ["feline"]})
    for seed in range(20):
        assert "xx" not in replace_synonyms(["the", "cat", "and"], 3, everything, random.Random(seed))


def test_insertion_adds_the_first_synonym():
    for seed in range(20):
        words = insert_synonyms(["small"], 2, TABLE, random.Random(seed))
        assert Counter(words) == {"small": 1, "tiny": 2}
        # It is inserted before an existing word, never at the end.
        assert words[-1] == "small"


@given(words=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12), seed=st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_swap_keeps_and_deletion_shrinks_the_words(words, seed):
    assert Counter(swap_words(words, 2, random.Random(seed))) == Counter(words)
    kept = delete_words(words, 0.5, random.Random(seed))
    assert 1 <= len(kept) <= len(words)
    assert not Counter(kept) - Counter(words)
    assert len(delete_words(words, 1.0, random.Random(seed))) == 1


def test_a_single_word_is_never_dropped():
    assert delete_words(["dog"], 1.0, random.Random(0)) == ["dog"]


@given(caption=st.text(max_size=60), seed=st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_letters_and_is_repeatable(caption, seed):
    state = random.getstate()
    result = eda(caption, TABLE, random.Random(seed))
    assert result == eda(caption, TABLE, random.Random(seed))
    assert random.getstate() == state
    if clean(caption).split():
        assert result == clean(result)
        assert result.strip()


def test_shares_of_the_four_operations():
    # A seven-word caption, five of whose words have synonyms.
    table = mapped_synonyms({w: ["xa", "xb"] for w in ("man", "photographs", "small", "dogs", "happily")})
    words = ["a", "man", "photographs", "two", "small", "dogs", "happily"]
    seen = Counter()
    for seed in range(4000):
        result = eda(" ".join(words), table, random.Random(seed)).split()
        if result == words:
            seen["same"] += 1
        elif len(result) > len(words):
            seen["longer"] += 1
        elif len(result) < len(words):
            seen["shorter"] += 1
        elif Counter(result) == Counter(words):
            seen["reordered"] += 1
    shares = {name: count / 4000 for name, count in seen.items()}
    # One in four is a deletion that drops nothing with probability 0.9^7, or a swap.
    assert shares["same"] == pytest.approx(0.25 * 0.9**7, abs=0.02)
    assert shares["shorter"] == pytest.approx(0.25 * (1 - 0.9**7), abs=0.02)
    assert shares["longer"] == pytest.approx(0.25, abs=0.02)
    assert shares["reordered"] == pytest.approx(0.25, abs=0.02)


def test_json_synonyms(tmp_path):
    path = tmp_path / "synonyms.json"
    path.write_text(json.dumps({"dog": ["Hound-Dog", "dog", "!"]}))
    assert list(open_synonyms(path)("dog")) == ["hound dog"]
    assert list(open_synonyms(path)("cat")) == []
    path.write_text(json.dumps({"dog": "hound"}))
    with pytest.raises(ValueError, match=r"not a JSON object of the form"):
        open_synonyms(path)


def test_missing_synonyms_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a JSON file nor a folder"):
        open_synonyms(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"lacks index\.noun"):
        open_synonyms(tmp_path)


@pytest.fixture
def wordnet_folder(tmp_path):
    """Three senses in the format of WordNet's files."""
    licence = "  1 This software and database is being provided to you  \n"
    noun = licence + "00000057 05 n 03 dog 0 domestic_dog 0 Canis-familiaris 0 001 @ 00000000 n 0000 | a pet  \n"
    goose = "00000999 05 n 02 goose 0 fathead 0 000 | a bird  \n"
    noun_data = noun + goose
    offset_dog, offset_goose = len(licence), len(noun)
    verb_data = licence + "00000057 29 v 02 run 0 sprint 0 000 | move fast  \n"
    (tmp_path / "data.noun").write_text(noun_data)
    (tmp_path / "index.noun").write_text(
        f"{licence}dog n 1 1 @ 1 1 {offset_dog:08d}  \ngoose n 1 0 1 1 {offset_goose:08d}  \n"
    )
    (tmp_path / "noun.exc").write_text("geese goose\n")
    (tmp_path / "data.verb").write_text(verb_data)
    (tmp_path / "index.verb").write_text(f"{licence}run v 1 0 1 1 {len(licence):08d}  \n")
    for name in ("adj", "adv"):
        (tmp_path / f"data.{name}").write_text(licence)
        (tmp_path / f"index.{name}").write_text(licence)
    return tmp_path


def test_wordnet_files(wordnet_folder):
    synonyms = open_synonyms(wordnet_folder)
    assert synonyms("dog") == ("canis familiaris", "domestic dog")
    assert synonyms("dogs") == ("canis familiaris", "dog", "domestic dog")
    assert synonyms("geese") == ("fathead", "goose")
    assert synonyms("runs") == ("run", "sprint")
    assert synonyms("unheard") == ()


def test_packed_wordnet_is_that_of_its_files(wordnet_folder, tmp_path):
    pack(wordnet_folder, tmp_path / "packed.xz")
    lines = lzma.decompress((tmp_path / "packed.xz").read_bytes()).decode().splitlines()
    packed, read = WordNet(lines), open_wordnet(wordnet_folder)
    assert packed.occurring == read.occurring == {"n": {"dog", "goose"}, "v": {"run"}, "a": set(), "r": set()}
    assert packed.exceptions == read.exceptions == {"n": {"geese": ["goose"]}, "v": {}, "a": {}, "r": {}}
    for word in ("dog", "dogs", "geese", "ran", "runs"):
        assert packed.senses(word) == read.senses(word)


def test_a_damaged_file_of_wordnet_is_named(wordnet_folder):
    with (wordnet_folder / "data.verb").open("a") as file:
        file.write("00000057 29 v 0\n")
    with pytest.raises(ValueError, match=r"data\.verb, line 3, is not a line of WordNet's files"):
        open_synonyms(wordnet_folder)


def test_the_synonyms_of_the_package_are_those_of_wordnet():
    synonyms = open_synonyms(None)
    assert synonyms("automobile") == ("auto", "car", "machine", "motorcar")
    assert synonyms("mice") == ("black eye", "computer mouse", "mouse", "shiner")
    assert "chuck out" in synonyms("ejected")
    assert synonyms("plait") == ("braid", "lace", "pleat", "tress", "twist")
    assert len(list(open_wordnet().words("n"))) == 117_798  # as WordNet 3.0 states (man wnstats)


def test_draws_do_not_depend_on_what_is_installed(wordnet_folder, monkeypatch):
    for variable in ("WNSEARCHDIR", "WNHOME", "NLTK_DATA"):
        monkeypatch.setenv(variable, str(wordnet_folder))
    drawn = [eda("a small dog runs across the street", open_synonyms(None), random.Random(seed)) for seed in range(6)]
    assert drawn == [
        "a small dog be given runs across the street",
        "a small dog the across runs street",
        "a small dog function across the street",
        "a small dog runs across the street",
        "runs small dog a across the street",
        "a small dog runs crossways the street",
    ]
