import open_clip
import pytest
import torch
import transformers
from plait_clip import CallableModel, ImageInput, OpenClipModel, TransformersModel, WordTokenizer
from plait_clip.model.architectures import from_config, tiny
from plait_sa_aet.token_embeddings import token_embedding_candidates
from torch import nn
from torch.nn.functional import cosine_similarity

IMAGE = ImageInput(8, [0.5] * 3, [0.5] * 3)
TEXTS = ["a red dog beside the bench", "a blue cat near 7 trees"]


@pytest.fixture(autouse=True)
def _weights_from_one_seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def nearest(vector, vectors, words, without, k):
    cosine = cosine_similarity(vector[None], vectors, dim=1)
    order = [i for i in cosine.argsort(descending=True).tolist() if words[i] not in without]
    return [words[i] for i in order if words[i].isascii() and words[i].isalpha()][:k]


def test_open_clip_with_the_word_tokenizer():
    model = tiny("tiny", TEXTS)
    words = model.tokenizer.words
    table = model.model.token_embedding.weight.detach()[1 : len(words) + 1]
    found = token_embedding_candidates(model).propose(["a", "red", "dog"], 1, 4)
    assert [word for word, _ in found] == nearest(table[words.index("red")], table, words, {"red"}, 4)
    assert "7" not in [word for word, _ in token_embedding_candidates(model).propose(["dog"], 0, 100)]
    assert token_embedding_candidates(model).propose(["unheard"], 0, 4) == []
    assert not any(parameter.grad_fn for parameter in model.parameters())


def test_open_clip_with_its_own_tokenizer():
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    model = from_config(config)
    tokenizer, table = model.tokenizer, model.model.token_embedding.weight.detach()
    whole = {token[:-4]: i for token, i in tokenizer.encoder.items() if token.endswith("</w>")}
    words, vectors = list(whole), table[list(whole.values())]
    candidates = token_embedding_candidates(model)
    found = [word for word, _ in candidates.propose(["dog"], 0, 5)]
    assert found == nearest(table[whole["dog"]], vectors, words, {"dog"}, 5)
    several = tokenizer.encode("skateboarderly")
    assert len(several) > 1
    found = [word for word, _ in candidates.propose(["skateboarderly"], 0, 5)]
    assert found == nearest(table[several].mean(dim=0), vectors, words, set(), 5)


def test_open_clip_with_a_text_tower_of_its_own():
    model = tiny("tiny", TEXTS)
    custom = open_clip.model.CustomTextCLIP(**model.config)
    candidates = token_embedding_candidates(OpenClipModel(custom, model.config, model.tokenizer, model.image_input))
    table = custom.text.token_embedding.weight.detach()[1 : len(model.tokenizer.words) + 1]
    words = model.tokenizer.words
    assert [word for word, _ in candidates.propose(["cat"], 0, 3)] == nearest(
        table[words.index("cat")], table, words, {"cat"}, 3
    )


def clip_tokenizer():
    """CLIP's byte-pair tokenizer with the words red, dog, ren and the pieces of others."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    merges = ["r e", "re d</w>", "re n</w>", "d o", "do g</w>"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=pairs), vocabulary


def hf_clip(tokenizer, size):
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": size,
        "max_position_embeddings": 12,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
    }
    vision = {**tower, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return TransformersModel(transformers.CLIPModel(config).eval(), tokenizer, IMAGE)


def test_transformers_clip():
    tokenizer, vocabulary = clip_tokenizer()
    model = hf_clip(tokenizer, len(vocabulary))
    table = model.model.text_model.embeddings.token_embedding.weight.detach()
    whole = {token[:-4]: i for token, i in vocabulary.items() if token.endswith("</w>")}
    words, vectors = list(whole), table[list(whole.values())]
    candidates = token_embedding_candidates(model)
    found = [word for word, _ in candidates.propose(["red"], 0, 4)]
    assert found == nearest(table[whole["red"]], vectors, words, {"red"}, 4)
    ids = [vocabulary["do"], vocabulary["ren</w>"]]
    found = [word for word, _ in candidates.propose(["doren"], 0, 4)]
    assert found == nearest(table[ids].mean(dim=0), vectors, words, set(), 4)


class Bag(nn.Module):
    def __init__(self, **tables):
        super().__init__()
        self.image = nn.Linear(3, 5)
        for name, table in tables.items():
            self.add_module(name, table)


def callable_model(module, tokenizer=None):
    tokenizer = tokenizer or WordTokenizer(TEXTS, 10)
    return CallableModel(
        module, lambda m, x: m.image(x.mean(dim=(2, 3))), lambda m, t: m.words(t).sum(dim=1), tokenizer, IMAGE
    )


@pytest.mark.parametrize("names", [["words"], ["token_embedding", "position"]])
def test_any_module_with_a_table(names):
    tokenizer = WordTokenizer(TEXTS, 10)
    module = Bag(**{name: nn.Embedding(tokenizer.vocab_size, 5) for name in names})
    table = getattr(module, names[0]).weight.detach()[1 : len(tokenizer.words) + 1]
    found = token_embedding_candidates(callable_model(module)).propose(["dog"], 0, 3)
    words = tokenizer.words
    assert [word for word, _ in found] == nearest(table[words.index("dog")], table, words, {"dog"}, 3)


def test_what_is_needed_is_said(tmp_path):
    size = WordTokenizer(TEXTS).vocab_size
    for module in (Bag(), Bag(words=nn.Embedding(size, 5), others=nn.Embedding(size, 5))):
        with pytest.raises(ValueError, match=r"CallableModel shows no text embedding table.*WordTokenizer"):
            token_embedding_candidates(callable_model(module))
    with pytest.raises(ValueError, match=r"the tokenizer is a function.*whole words"):
        token_embedding_candidates(
            callable_model(Bag(words=nn.Embedding(size, 5)), lambda texts, context_length: texts)
        )
    with pytest.raises(ValueError, match=r"ids up to .* 3 rows"):
        token_embedding_candidates(callable_model(Bag(words=nn.Embedding(3, 5))))
    tokenizer, vocabulary = clip_tokenizer()
    model = hf_clip(tokenizer, len(vocabulary))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ndog\n", encoding="utf-8")
    model.tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    with pytest.raises(ValueError, match="the tokenizer is a BertTokenizer"):
        token_embedding_candidates(model)
