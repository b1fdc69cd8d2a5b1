import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_clip.model.architectures import tiny
from plait_sa_aet.source import Source
from plait_sa_aet.stop_words import STOP_WORDS
from plait_sa_aet.text_attack import bert_words, divergence, word_attack
from plait_sa_aet.token_embeddings import token_embedding_candidates
from plait_sa_aet.word_candidates import ContextCounts, Synonyms, TokenEmbedding
from torch.nn.functional import normalize

NOUNS = ["dog", "cat", "man", "tree", "bench", "ball"]
VERBS = ["runs", "sits", "jumps", "waits"]
COLOURS = ["red", "blue", "green", "grey"]
FUNCTION = ["a", "the", "on", "with", "near"]
CONTENT = NOUNS + VERBS + COLOURS
TABLE = {word: [other for other in group if other != word] for group in (NOUNS, VERBS, COLOURS) for word in group}


class BagOfWords:
    """Adds a fixed random vector per word, weighted by its place; counts its calls."""

    def __init__(self, seed=0, width=8):
        generator = torch.Generator().manual_seed(seed)
        vocabulary = [*CONTENT, *FUNCTION, "[UNK]"]
        self.vectors = dict(zip(vocabulary, torch.randn(len(vocabulary), width, generator=generator), strict=True))
        self.start = torch.randn(width, generator=generator)
        self.batches = []

    def raw_text_features(self, texts):
        self.batches.append(list(texts))
        rows = []
        for text in texts:
            row = self.start
            for place, word in enumerate(text.split()):
                row = row + self.vectors.get(word, torch.zeros_like(row)) / (1 + 0.1 * place)
            rows.append(row)
        return torch.stack(rows)

    def text_features(self, texts):
        return normalize(self.raw_text_features(texts), dim=1)


class Fixed:
    """Candidates as a test wants them."""

    def __init__(self, table):
        self.table = table

    def propose(self, words, index, k):
        return [(word, 0.0) for word in self.table.get(words[index], ())][:k]


def kl(p_of, q_of):
    p, q = p_of.double().softmax(0), q_of.double().softmax(0)
    return float((p * (p.log() - q.log())).sum())


def one_by_one(encode, score, captions, candidates, *, budget=1, top_k=10, stop_words=STOP_WORDS, max_length=77):
    """The attack as the paper states it: one caption, one word, one sentence at a time."""
    attacked, changes = [], []
    for m, caption in enumerate(captions):
        words = caption.split(" ")
        original = encode([caption])[0]
        importance = []
        for j in range(len(words)):
            masked = " ".join([*words[:j], "[UNK]", *words[j + 1 :]])
            importance.append(kl(original, encode([masked])[0]))
        current, used = list(words), 0
        for j in sorted(range(len(words)), key=lambda j, importance=importance: -importance[j]):
            if used == budget:
                break
            if words[j] in stop_words or j > max_length - 2:
                continue
            trials = [list(current)]
            for word, _ in candidates.propose(words, j, top_k):
                if word != words[j] and "##" not in word and word not in stop_words and " " not in word:
                    trials.append([*current[:j], word, *current[j + 1 :]])
            scores = [score(m, original, encode([" ".join(trial)])[0]) for trial in trials]
            best = max(range(len(trials)), key=scores.__getitem__)  # the first maximum
            if best:
                current, used = trials[best], used + 1
                changes.append((m, j, words[j], current[j]))
        attacked.append(" ".join(current))
    return attacked, changes


def references(num, count, width=8, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(num, width, generator=generator), dim=1) for _ in range(count)]


captions_strategy = st.lists(
    st.lists(st.sampled_from(CONTENT + FUNCTION), min_size=1, max_size=7).map(" ".join), min_size=1, max_size=6
)


# ------------------------------------------------------------------------------------------------------ by hand


class Lookup:
    def __init__(self, features):
        self.features = features

    def text_features(self, texts):
        return torch.tensor([self.features[text] for text in texts])

    raw_text_features = text_features


def test_importance_and_score_by_hand():
    # softmax of (ln 3, 0) is (3/4, 1/4), of (0, 0) (1/2, 1/2), of (0, ln 3) (1/4, 3/4).
    three = math.log(3)
    source = Lookup(
        {
            "dog runs": (three, 0.0),
            "[UNK] runs": (0.0, 0.0),  # KL = 3/4 ln(3/2) + 1/4 ln(1/2)
            "dog [UNK]": (0.0, three),  # KL = 3/4 ln 3 + 1/4 ln(1/3): the larger
            "dog sits": (1.0, 1.0),
            "dog jumps": (-1.0, 0.0),
        }
    )
    reference = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    result = word_attack(source, ["dog runs"], Fixed({"runs": ["sits", "jumps"]}), reference, [0.5, 2.0])
    assert result.captions == ["dog jumps"]
    (change,) = result.changes
    assert (change.caption, change.index, change.old, change.new) == (0, 1, "runs", "jumps")
    assert change.importance == pytest.approx(0.5 * three)
    assert change.score_before == pytest.approx(-0.5 * three)
    assert change.score_after == pytest.approx(0.5)
    first = divergence(torch.tensor([three, 0.0]), torch.tensor([0.0, 0.0])).item()
    assert first == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_bert_attack_by_hand():
    three = math.log(3)
    source = Lookup(
        {
            "dog runs": (three, 0.0),
            "[UNK] runs": (three, 0.0),
            "dog [UNK]": (0.0, 0.0),
            "dog sits": (0.0, 0.0),
            "dog jumps": (7.0, 7.0 + three),
        }
    )
    result = bert_words(source, ["dog runs"], Fixed({"runs": ["sits", "jumps"]}))
    assert result.captions == ["dog jumps"]
    (change,) = result.changes
    assert change.importance == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert (change.score_before, change.score_after) == (pytest.approx(0.0), pytest.approx(0.5 * three))


def test_masking_without_effect_has_importance_0():
    features = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert divergence(features, features).tolist() == [0.0] * 4


@given(st.lists(st.lists(st.floats(-30, 30), min_size=4, max_size=4), min_size=2, max_size=2))
def test_importance_is_not_negative(rows):
    first, second = torch.tensor(rows, dtype=torch.float64)
    assert divergence(first, second) >= -1e-6


# ------------------------------------------------------------------------------- against the plain statement of it


@settings(max_examples=40, deadline=None)
@given(captions_strategy, st.integers(0, 1000), st.integers(0, 3), st.integers(1, 3), st.sampled_from([77, 4]))
def test_word_attack_equals_one_caption_at_a_time(captions, seed, budget, count, max_length):
    source, table = BagOfWords(seed), Synonyms(TABLE)
    refs, weights = references(len(captions), count, seed=seed), [0.6, 0.3, 0.1][:count]
    result = word_attack(source, captions, table, refs, weights, budget=budget, max_length=max_length)

    def score(m, _original, feature):
        return -sum(w * float(feature.double() @ ref[m].double()) for w, ref in zip(weights, refs, strict=True))

    expected, changes = one_by_one(source.text_features, score, captions, table, budget=budget, max_length=max_length)
    assert result.captions == expected
    assert [(change.caption, change.index, change.old, change.new) for change in result.changes] == changes


@settings(max_examples=30, deadline=None)
@given(captions_strategy, st.integers(0, 1000), st.integers(1, 2))
def test_bert_attack_equals_one_caption_at_a_time(captions, seed, budget):
    source, table = BagOfWords(seed), Synonyms(TABLE)
    result = bert_words(source, captions, table, budget=budget)
    expected, changes = one_by_one(
        source.raw_text_features, lambda _m, original, feature: kl(original, feature), captions, table, budget=budget
    )
    assert result.captions == expected
    assert [(change.caption, change.index, change.old, change.new) for change in result.changes] == changes


# --------------------------------------------------------------------------------------------------- invariants


@settings(max_examples=60, deadline=None)
@given(captions_strategy, st.integers(0, 1000), st.integers(0, 3))
def test_what_a_word_attack_may_change(captions, seed, budget):
    source = BagOfWords(seed)
    refs = references(len(captions), 1, seed=seed)
    result = word_attack(source, captions, Synonyms(TABLE), refs, [1.0], budget=budget)
    assert result == word_attack(source, captions, Synonyms(TABLE), refs, [1.0], budget=budget)
    assert len(result.captions) == len(captions)
    before, after = (-(source.text_features(some) * refs[0]).sum(1) for some in (captions, result.captions))
    assert (after >= before - 1e-6).all()
    for m, (old, new) in enumerate(zip(captions, result.captions, strict=True)):
        pairs = list(zip(old.split(" "), new.split(" "), strict=True))  # as many words
        changed = [(a, b) for a, b in pairs if a != b]
        own = [change for change in result.changes if change.caption == m]
        assert len(changed) == len(own) <= budget
        assert all(a not in STOP_WORDS and b not in STOP_WORDS for a, b in changed)
        assert [change.importance for change in own] == sorted((change.importance for change in own), reverse=True)
        assert all(change.importance >= -1e-6 and change.score_after > change.score_before for change in own)
        for one, following in pairwise(own):
            assert one.score_after == pytest.approx(following.score_before)
        only_stop_words = all(word in STOP_WORDS for word in old.split(" "))
        assert (m in result.unattackable) == only_stop_words
        if only_stop_words:
            assert new == old


def test_ratios_1_0_0_repeat_round_one():
    captions = ["a red dog runs near the bench", "the cat sits", "a man with a ball"]
    clean, final, previous = references(3, 3)
    first = word_attack(BagOfWords(), captions, Synonyms(TABLE), [clean], [1.0])
    second = word_attack(BagOfWords(), captions, Synonyms(TABLE), [clean, final, previous], [1.0, 0.0, 0.0])
    other = word_attack(BagOfWords(), captions, Synonyms(TABLE), [clean, final, previous], [0.0, 1.0, 0.0])
    assert second == first
    assert other.captions != first.captions


def test_a_caption_stays_only_where_no_word_is_better():
    source, captions = BagOfWords(1), ["red dog"]
    worst = source.text_features(["red dog"])  # every other sentence is farther from this one
    assert word_attack(source, captions, Synonyms(TABLE), [worst], [1.0]).captions != captions
    assert word_attack(source, captions, Synonyms(TABLE), [worst], [-1.0]).captions == captions


def test_projection_of_texts_or_of_references_is_the_same():
    captions = ["a red dog runs", "the grey cat sits on a bench"] * 4
    source, refs = BagOfWords(2), references(8, 2)
    u = normalize(source.start, dim=0)  # the direction that all texts share

    def project(x):
        return x - (x @ u)[:, None] * u

    result = word_attack(source, captions, Synonyms(TABLE), refs, [0.5, 0.5], project=project)

    def score(m, _original, feature):
        return -sum(0.5 * float(project(feature[None])[0].double() @ ref[m].double()) for ref in refs)

    assert result.captions == one_by_one(source.text_features, score, captions, Synonyms(TABLE))[0]
    assert result.captions != word_attack(source, captions, Synonyms(TABLE), refs, [0.5, 0.5]).captions


def test_candidates_are_proposed_for_the_original_caption():
    captions = ["a red dog runs", "the grey cat sits on a bench"]
    counts = ContextCounts.fit(
        [f"a {colour} {noun} {verb} on a bench" for colour, noun, verb in zip(COLOURS, NOUNS, VERBS, strict=False)]
        + ["a red cat waits", "the grey dog jumps", "a blue dog sits", "the red cat sits near a tree"]
    )
    asked = []

    class Listening:
        def propose(self, words, index, k):
            asked.append(" ".join(words))
            return counts.propose(words, index, k)

    result = word_attack(BagOfWords(3), captions, Listening(), references(2, 1), [1.0], budget=3)
    assert len(result.changes) > 2
    assert set(asked) == set(captions)


# ------------------------------------------------------------------------------------------------- odd candidates


def test_unusable_candidates_are_dropped_and_counted():
    source, refs = BagOfWords(), references(1, 1)
    table = Fixed({"dog": ["dog", "the", "##s", "", "big dog", "cat", "cat"]})
    result = word_attack(source, ["dog"], table, refs, [1.0])
    assert result.num_rejected_multiword == 1
    tried = source.batches[-1]
    assert tried == ["dog", "cat"]
    # Generators that drop them themselves count too, each attack its own.
    synonyms = Synonyms({"dog": ["big dog", "cat"]})
    for _ in range(2):
        assert word_attack(source, ["dog"], synonyms, refs, [1.0]).num_rejected_multiword == 1


def test_several_words_where_they_are_allowed():
    source = BagOfWords()
    table = Synonyms({"dog": ["grey cat"]}, allow_multiword=True)
    refs = [source.text_features(["red dog"])]
    assert word_attack(source, ["red dog"], table, refs, [1.0]).captions == ["red grey cat"]


def test_captions_without_attackable_words():
    captions = ["the", "", "a red dog", "on the"]
    result = word_attack(
        BagOfWords(), captions, Synonyms(TABLE), references(4, 1), [1.0], stop_words={"the", "on", "a"}
    )
    assert result.unattackable == [0, 1, 3]
    assert [result.captions[i] for i in (0, 1, 3)] == ["the", "", "on the"]
    assert word_attack(BagOfWords(), [], Synonyms({}), [torch.zeros(0, 8)], [1.0]).captions == []
    nothing = word_attack(BagOfWords(), ["dog runs"], Synonyms({}), references(1, 1), [1.0])
    assert (nothing.captions, nothing.changes, nothing.unattackable) == (["dog runs"], [], [])


def test_wrong_arguments_are_refused():
    source, table, refs = BagOfWords(), Synonyms(TABLE), references(2, 2)
    with pytest.raises(ValueError, match="one weight per reference"):
        word_attack(source, ["dog", "cat"], table, refs, [1.0])
    with pytest.raises(ValueError, match=r"reference 0 is \[2, 8\].*3 captions"):
        word_attack(source, ["dog", "cat", "man"], table, refs, [1.0, 1.0])
    with pytest.raises(ValueError, match="budget is -1"):
        word_attack(source, ["dog", "cat"], table, refs, [1.0, 1.0], budget=-1)
    with pytest.raises(ValueError, match="top_k 0"):
        bert_words(source, ["dog"], table, top_k=0)


# --------------------------------------------------------------------------------------------- one call per round


def test_all_captions_share_their_calls():
    source = BagOfWords()
    captions = ["a red dog runs near the bench", "the grey cat sits", "a red dog runs near the bench", "a ball"] * 5
    result = word_attack(source, captions, Synonyms(TABLE), references(20, 1), [1.0])
    most_words = max(sum(word not in STOP_WORDS for word in caption.split()) for caption in captions)
    assert len(source.batches) <= 1 + most_words  # importance, then rounds
    assert all(len(set(batch)) == len(batch) for batch in source.batches)
    assert len(result.changes) > 10


def test_on_a_kit_model_with_its_own_candidates():
    captions = ["a red dog runs near the bench", "the grey cat sits", "a man jumps with a ball", "the"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tiny("tiny", [" ".join(CONTENT + FUNCTION)]).eval()
    source = Source(model)
    refs = [source.text_features(captions)]
    for candidates in (
        token_embedding_candidates(model),
        ContextCounts.fit([*captions, "a red cat runs near the tree", "the blue dog waits", "a dog jumps with a man"]),
        TokenEmbedding(CONTENT, torch.eye(len(CONTENT)), lambda word: torch.ones(1, len(CONTENT))),
    ):
        result = word_attack(source, captions, candidates, refs, [1.0])

        def score(m, _original, feature):
            return -float(feature.double() @ refs[0][m].double())

        assert result.captions == one_by_one(source.text_features, score, captions, candidates)[0]
        assert result.changes
        assert result.unattackable == [3]
        assert bert_words(source, captions, candidates).captions[3] == "the"
