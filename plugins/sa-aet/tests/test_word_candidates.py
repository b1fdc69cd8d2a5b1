import json
import math
from collections import Counter
from itertools import product

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from plait import Run
from plait_clip import digit_pairs, tiny_model
from plait_sa_aet.plugin.attacks import BertAttack
from plait_sa_aet.word_candidates import ContextCounts, MaskedLanguageModel, Synonyms, TokenEmbedding

PIECES = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("a", "dog", "cat", "red", "blue", "on", "play", "skate", "run", "the", "bench", "man"),
    *("##ing", "##er", "##board", "##s", "##ed"),
]
CAPTIONS = ["a dog playing on the bench", "the skateboarders running", "a red cat", "man", "a blue xyz runs"]
PARITY = {"allow_multiword": True, "logit_threshold": -1e9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with random weights, saved as BERTs are."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    config = transformers.BertConfig(
        vocab_size=len(PIECES),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.6,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.BertForMaskedLM(config)
    model.save_pretrained(folder)
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    return folder


@pytest.fixture
def load(folder):
    return lambda **options: MaskedLanguageModel.from_pretrained(folder, **{"max_length": 30, **options})


def brute_force(
    lm, caption, index, *, offset=1, max_length=30, threshold=0.3, top_k=10, multiword=False, special=False
):
    """Candidates of one word, straight from the definition: one caption, nothing padded, the whole product."""
    tokenizer, model = lm.tokenizer, lm.model
    words = caption.split(" ")
    pieces = [tokenizer.tokenize(word) for word in words]
    start = sum(map(len, pieces[:index]))
    if start > max_length - 2:
        return []
    tokens = ["[CLS]", *(piece for some in pieces for piece in some)][:max_length]
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])).logits[0]
    rows = logits[start + offset : start + offset + len(pieces[index])]
    best = [sorted(range(len(PIECES)), key=lambda i, row=row: -row[i].item())[:top_k] for row in rows]
    if len(best) == 1:
        found = []
        for piece in best[0]:
            if rows[0][piece] < threshold:
                break
            found.append((PIECES[piece], rows[0][piece].item()))
    else:
        scored = []
        for pieces_of_word in list(product(*(some[:4] for some in best[:12])))[:24]:
            with torch.no_grad():
                log_p = model(torch.tensor([pieces_of_word])).logits[0].log_softmax(-1)
            mean = -sum(log_p[i, piece].item() for i, piece in enumerate(pieces_of_word)) / len(pieces_of_word)
            scored.append((math.exp(mean), pieces_of_word))
        scored.sort(key=lambda pair: pair[0])
        found = [(" ".join(PIECES[i] for i in some).replace(" ##", ""), -score) for score, some in scored]
    unique = {}
    for word, score in found:
        if "##" not in word and (special or "[" not in word) and (multiword or " " not in word):
            unique.setdefault(word, score)
    return list(unique.items())


def equal(found, expected):
    assert [word for word, _ in found] == [word for word, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("multiword", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_masked_language_model_equals_the_definition(load, offset, multiword, special):
    lm = load(position_offset=offset, allow_multiword=multiword, allow_special=special)
    lm.prepare(CAPTIONS)
    seen = []
    for caption in CAPTIONS:
        words = caption.split(" ")
        for index in range(len(words)):
            expected = brute_force(lm, caption, index, offset=offset, multiword=multiword, special=special)
            equal(lm.propose(words, index, 10), expected)
            seen += expected
    assert any(score > 0 for _, score in seen)
    assert any(score < 0 for _, score in seen)  # words of several pieces took part
    assert any("[" in word for word, _ in seen) == special


def test_offset_0_reads_one_token_earlier(load):
    correct, official = load(position_offset=1, **PARITY), load(position_offset=0, **PARITY)
    words = ["a", "red", "cat"]
    for index in (1, 2):
        equal(official.propose(words, index, 10), correct.propose(words, index - 1, 10))
    assert correct.propose(words, 1, 10) != official.propose(words, 1, 10)


def test_one_forward_reads_a_batch(load):
    lm = load()
    batches = []
    hook = lm.model.register_forward_hook(lambda *_, **__: batches.append(1))
    plain = ["a red cat", "the dog on a bench", "a red cat"]  # no word of several pieces
    lm.prepare(plain)
    assert len(batches) == 1
    for caption in plain:
        for index in range(len(caption.split(" "))):
            lm.propose(caption.split(" "), index, 10)
    lm.prepare(plain)
    assert len(batches) == 1
    lm.prepare(CAPTIONS)  # and one more for each number of pieces of a word
    lengths = {len(lm.tokenizer.tokenize(word)) for caption in CAPTIONS for word in caption.split(" ")} - {1}
    assert len(batches) == 2 + len(lengths)
    hook.remove()


def test_padding_to_the_longest_changes_nothing(load):
    alone, together = load(), load()
    together.prepare(CAPTIONS)
    for caption in CAPTIONS:
        words = caption.split(" ")
        for index in range(len(words)):
            equal(together.propose(words, index, 10), alone.propose(words, index, 10))


def test_logit_threshold_ends_the_list(load):
    words = ["a", "red", "cat"]
    everything = load(logit_threshold=0).propose(words, 1, 10)
    assert min(score for _, score in everything) < 0.3
    middle = everything[len(everything) // 2][1]
    equal(load(logit_threshold=middle).propose(words, 1, 10), [pair for pair in everything if pair[1] >= middle])
    assert load(logit_threshold=1e9).propose(words, 1, 10) == []


def test_k_limits_words_of_one_piece(load):
    lm = load(logit_threshold=0)
    words = ["a", "red", "cat"]
    assert lm.propose(words, 1, 3) == [pair for pair in lm.propose(words, 1, 10) if pair in lm.propose(words, 1, 3)]
    assert len(lm.propose(words, 1, 3)) <= 3
    with pytest.raises(ValueError, match="raise its top_k"):
        lm.propose(words, 1, 11)


@pytest.mark.parametrize("offset", [0, 1])
def test_words_behind_the_cut_get_nothing(load, offset):
    lm = load(max_length=5, position_offset=offset, **PARITY)
    words = ["a", "dog", "playing", "on", "the", "bench"]  # pieces: a 0, dog 1, play 2, ##ing 3, on 4, ...
    for index in range(6):
        equal(
            lm.propose(words, index, 10),
            brute_force(lm, " ".join(words), index, offset=offset, max_length=5, threshold=-1e9, multiword=True),
        )
    assert lm.propose(words, 2, 10)
    assert all(lm.propose(words, index, 10) == [] for index in (3, 4, 5))


def test_a_word_cut_in_its_middle_keeps_what_is_left(load):
    lm = load(max_length=4, **PARITY)
    words = ["a", "dog", "playing"]  # [CLS] a dog play | ##ing
    with torch.no_grad():
        ids = torch.tensor([lm.tokenizer.convert_tokens_to_ids(["[CLS]", "a", "dog", "play"])])
        best = lm.model(ids).logits[0, 3].topk(10).indices.tolist()
    expected = [PIECES[i] for i in best if "##" not in PIECES[i] and "[" not in PIECES[i]]
    assert [word for word, _ in lm.propose(words, 2, 10)] == expected


def test_pieces_that_continue_a_word_and_several_words_are_dropped(load):
    lm, loose = load(), load(allow_multiword=True)
    found, rejected = [], 0
    for caption in CAPTIONS:
        words = caption.split(" ")
        for index in range(len(words)):
            found += [word for word, _ in lm.propose(words, index, 10)]
            rejected += sum(" " in word for word, _ in brute_force(lm, caption, index, multiword=True))
            kept = [word for word, _ in loose.propose(words, index, 10)]
            assert not any("##" in word or "[" in word for word in kept)
    assert found
    assert all(" " not in word and "##" not in word for word in found)
    assert lm.num_rejected_multiword == rejected > 0
    assert loose.num_rejected_multiword == 0


def test_a_long_word_is_no_memory_problem(load):
    lm = load(**PARITY)
    word = "play" + "ing" * 20  # 21 pieces: 4^12 combinations if all were built
    assert len(lm.tokenizer.tokenize(word)) == 21
    found = lm.propose([word], 0, 10)
    assert 0 < len(found) <= 24


def test_combination_limits(load):
    lm = load(bpe_topk=2, bpe_max=3, bpe_pieces=2, **PARITY)
    words = ["skateboarders"]
    with torch.no_grad():
        ids = torch.tensor([lm.tokenizer.convert_tokens_to_ids(["[CLS]", *lm.tokenizer.tokenize(words[0])])])
        top = lm.model(ids).logits[0, 1:3].topk(2).indices.tolist()
    combinations = list(product(*top))[:3]
    lm.propose(words, 0, 10)
    assert {pieces for pieces, _ in lm._memo["skateboarders"].joined[0]} == set(combinations)


def test_wrong_language_models_are_refused(folder, load, tmp_path):
    for options in ({"top_k": 0}, {"bpe_max": 0}, {"max_length": 3}, {"max_length": 33}, {"position_offset": 2}):
        with pytest.raises(ValueError, match=next(iter(options))):
            load(**options)
    with pytest.raises(ValueError, match="is not a folder with a saved model and cannot be downloaded"):
        MaskedLanguageModel.from_pretrained(tmp_path / "none" / "here")
    lm = load()
    words_only = transformers.BertTokenizer({piece: i for i, piece in enumerate(PIECES) if "##" not in piece})
    with pytest.raises(ValueError, match="WordPiece"):
        MaskedLanguageModel(lm.model, words_only, max_length=30)


def test_loading_leaves_the_global_random_state(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    MaskedLanguageModel.from_pretrained(folder, max_length=30)
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------ token embeddings

WORDS = ["east", "north", "northeast", "west", "7", "don't"]
VECTORS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0], [-1.0, 0.0], [1.0, 0.1], [1.0, 0.2]])


def embedding():
    rows = {word: VECTORS[[i]] for i, word in enumerate(WORDS)}
    rows["north-east"] = VECTORS[:2]  # two tokens, mean (1, 0.5)
    return TokenEmbedding(WORDS, VECTORS, lambda word: rows.get(word, VECTORS[:0]))


def test_neighbours_by_cosine():
    found = embedding().propose(["going", "east"], 1, 10)
    assert [word for word, _ in found] == ["northeast", "north", "west"]  # not itself, nothing but letters
    assert [score for _, score in found] == pytest.approx([1 / math.sqrt(2), 0.0, -1.0], abs=1e-6)


def test_several_tokens_are_averaged():
    found = embedding().propose(["north-east"], 0, 2)
    assert [word for word, _ in found] == ["northeast", "east"]
    mean = (1.0, 0.5)
    assert found[0][1] == pytest.approx((mean[0] + mean[1]) / math.hypot(*mean) / math.sqrt(2))


def test_unknown_words_have_no_neighbours_and_preparing_changes_nothing():
    prepared, fresh = embedding(), embedding()
    prepared.prepare(["east north going", "west"])
    assert prepared.propose(["going"], 0, 3) == []
    for word in WORDS:
        for k in (1, 3, 50):
            assert prepared.propose([word], 0, k) == fresh.propose([word], 0, k)
            assert len(fresh.propose([word], 0, k)) <= k


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_neighbours_equal_a_plain_search(seed, k):
    vectors = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed))
    words = list("abcdefghi")
    table = TokenEmbedding(words, vectors, lambda word: vectors[[words.index(word)]])
    for i, word in enumerate(words):
        cosine = torch.nn.functional.cosine_similarity(vectors[i], vectors, dim=1)
        expected = sorted((j for j in range(9) if j != i), key=lambda j, cosine=cosine: -cosine[j].item())[:k]
        assert [near for near, _ in table.propose([word], 0, k)] == [words[j] for j in expected]


def test_wrong_tables_are_refused():
    with pytest.raises(ValueError, match="one vector per word"):
        TokenEmbedding(["a"], VECTORS, lambda word: VECTORS)
    with pytest.raises(ValueError, match="no alphabetic word"):
        TokenEmbedding(["1", "2"], VECTORS[:2], lambda word: VECTORS)


# -------------------------------------------------------------------------------------------------- context counts


def test_probabilities_by_hand():
    counts = ContextCounts.fit(["a red dog runs", "a blue dog runs", "a red cat", "red dog runs"])
    # Places: 14. Between a and dog: red 1, blue 1. After a: red 2, blue 1. Before dog: red 2, blue 1.
    found = dict(counts.propose(["a", "black", "dog", "runs"], 1, 10))
    red = 0.7 / 2 + 0.15 * 2 / 3 + 0.15 * 2 / 3 + 0.01 * 3 / 14 + 1e-12
    blue = 0.7 / 2 + 0.15 / 3 + 0.15 / 3 + 0.01 / 14 + 1e-12
    assert found == pytest.approx({"red": math.log(red), "blue": math.log(blue)})
    # Ends are neighbours: after red only dog and cat, at the end runs 3 and cat 1; between red and the end: cat.
    found = counts.propose(["a", "red", "bird"], 2, 10)
    cat = 0.7 + 0.15 / 3 + 0.15 / 4 + 0.01 / 14
    dog = 0.15 * 2 / 3 + 0.01 * 3 / 14
    runs = 0.15 * 3 / 4 + 0.01 * 3 / 14
    assert found == [
        ("cat", pytest.approx(math.log(cat))),
        ("runs", pytest.approx(math.log(runs))),
        ("dog", pytest.approx(math.log(dog))),
    ]


def test_the_word_itself_and_new_contexts():
    counts = ContextCounts.fit(["a red dog", "a blue dog"])
    assert counts.propose(["a", "red", "dog"], 1, 10) == [("blue", pytest.approx(math.log(0.5 * 1 + 0.01 / 6)))]
    assert counts.propose(["the", "red", "cat"], 1, 10) == []
    with pytest.raises(ValueError, match="hold no word"):
        ContextCounts.fit(["", " "])


def plain_counts(captions, words, index):
    places = [
        (padded[i - 1], padded[i], padded[i + 1])
        for caption in captions
        for padded in [["<", *caption.split(), ">"]]
        for i in range(1, len(padded) - 1)
    ]
    left, _, right = ["|", *words, "|"][index : index + 3]
    places = [(("|" if a == "<" else a), w, ("|" if b == ">" else b)) for a, w, b in places]
    after = Counter(w for a, w, _ in places if a == left)
    before = Counter(w for _, w, b in places if b == right)
    between = Counter(w for a, w, b in places if (a, b) == (left, right))
    common = [
        {w for w, _ in sorted(some.items(), key=lambda pair: (-pair[1], pair[0]))[:50]} for some in (after, before)
    ]
    alone = Counter(w for _, w, _ in places)
    scores = {}
    for word in (set(between) | common[0] | common[1]) - {words[index]}:
        p = 0.01 * alone[word] / alone.total() + 1e-12
        for weight, some in ((0.7, between), (0.15, after), (0.15, before)):
            p += weight * some[word] / max(1, some.total())
        scores[word] = math.log(p)
    return scores


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6), min_size=1, max_size=8), st.data())
def test_counts_equal_plain_counting(split, data):
    captions = [" ".join(words) for words in split]
    words = data.draw(st.lists(st.sampled_from("abcdefgz"), min_size=1, max_size=5))
    index = data.draw(st.integers(0, len(words) - 1))
    found = ContextCounts.fit(captions).propose(words, index, 100)
    assert dict(found) == pytest.approx(plain_counts(captions, words, index))
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_only_the_commonest_bigram_fillers_are_scored():
    captions = [f"x w{i:02d} y{i:02d}" for i in range(60)] + ["x w59 z"]
    found = ContextCounts.fit(captions).propose(["x", "q", "nowhere"], 1, 100)
    assert len(found) == 50
    assert found[0][0] == "w59"
    assert {word for word, _ in found} == {"w59", *(f"w{i:02d}" for i in range(49))}


# -------------------------------------------------------------------------------------------------------- synonyms


def test_synonyms_keep_their_order():
    table = Synonyms({"Dog": ["hound", "guide dog", "Puppy"], "cat": ()})
    assert [word for word, _ in table.propose(["a", "dog"], 1, 10)] == ["hound", "puppy"]
    assert table.num_rejected_multiword == 1
    assert [word for word, _ in table.propose(["dog"], 0, 1)] == ["hound"]
    assert table.propose(["cat"], 0, 10) == table.propose(["bird"], 0, 10) == []
    loose = Synonyms({"dog": ["guide  dog"]}, allow_multiword=True)
    assert loose.propose(["dog"], 0, 10) == [("guide dog", 0.0)]


def test_synonyms_from_files(tmp_path):
    table = {"near": ["beside", "by"]}
    (tmp_path / "a.json").write_text(json.dumps(table), encoding="utf-8")
    (tmp_path / "b.yml").write_text("near: [beside, by]\n", encoding="utf-8")
    for name in ("a.json", "b.yml"):
        found = Synonyms.from_file(tmp_path / name).propose(["near"], 0, 10)
        assert [word for word, _ in found] == ["beside", "by"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "dog: hound", "'dog'.*not a list of words"),
        ("a.yaml", "cat: [kitty]\ndog: [hound, 3]", "'dog'.*not a list of words"),
        ("a.yaml", "yes: [sure]", "True.*quotes"),
        ("a.yaml", "- dog", "list; give a table"),
        ("a.yaml", "dog: [", "not valid YAML"),
        ("a.yaml", "dog: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a.json", "{", "not valid JSON"),
        ("a.txt", "dog hound", r"use \.yaml, \.yml or \.json"),
    ],
)
def test_wrong_tables_of_synonyms(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Synonyms.from_file(tmp_path / name)


def test_missing_file_of_synonyms(tmp_path):
    with pytest.raises(ValueError, match=r"no\.json cannot be read"):
        Synonyms.from_file(tmp_path / "no.json")


def test_captions_respelled_by_the_tokenizer(load):
    lm = load(max_length=7)
    assert lm.respelled("a dog skateboards on the bench") == "a dog skateboards"  # 5 pieces of 7 are the caption's
    assert lm.respelled("a [UNK] xyz") == "a [UNK] [UNK]"


@pytest.fixture
def listening():
    """A model, and the texts that it has read so far."""
    model = tiny_model()
    read = []

    class Listening(type(model)):
        def encode_text(self, texts):
            read.extend(texts)
            return super().encode_text(texts)

    model.__class__ = Listening
    return model, read


@pytest.mark.parametrize(("as_released", "generator"), [(True, "mlm"), (False, "mlm"), (True, "context-counts")])
def test_only_the_released_code_lets_clip_read_respelled_captions(as_released, generator, folder, listening):
    model, read = listening
    source = str(folder) if generator == "mlm" else None
    attack = BertAttack(generator=generator, language_model=source, as_released=as_released, max_length=30)
    attack.attack(model, digit_pairs(4), Run())
    assert any("[UNK] [UNK]" in text for text in read) == (as_released and generator == "mlm")


@pytest.mark.parametrize("as_released", [True, False])
def test_only_the_released_code_tries_special_tokens_as_words(as_released, folder, listening):
    model, read = listening
    attack = BertAttack(generator="mlm", language_model=str(folder), as_released=as_released, max_length=30)
    attack.attack(model, digit_pairs(4), Run())
    assert any(token in text for text in read for token in ("[SEP]", "[MASK]", "[PAD]")) == as_released
