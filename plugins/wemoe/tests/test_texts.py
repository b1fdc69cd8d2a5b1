"""Text models: masks however they are given, token columns, texts by a tokenizer from a folder, evaluation."""

import copy

import datasets
import plait
import pytest
import torch
from plait_wemoe import plugin
from plait_wemoe.baselines import static
from plait_wemoe.columns import Reading, column_of, reading_of, tokenizer_of
from plait_wemoe.routing import Router
from plait_wemoe.texts import TokenColumn
from plait_wemoe.upscaling import UpscaleConfig
from plait_wemoe.wemoe import upscale
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["[PAD]", "[UNK]", "red", "green", "blue", "good", "bad", "so", "very"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = {"vocab_size": len(WORDS), "max_position_embeddings": 12, **SIZES}
TASKS = {"colour": ["red", "green", "blue"], "mood": ["good", "bad"]}


def moved(base, seed, scale=0.1):
    model, draw = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer of nine words."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=10)
    fast.save_pretrained(folder)
    return folder


def texts(task, number=12):
    names = TASKS[task]
    rows = [" ".join(["so"] * (row % 4) + [names[row % len(names)]]) for row in range(number)]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    labels = [row % len(names) for row in range(number)]
    return datasets.Dataset.from_dict({"text": rows, "label": labels}, features=features)


@pytest.fixture(scope="module")
def pool():
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**CONFIG, num_labels=2)).eval()
    experts = {}
    for number, (task, names) in enumerate(TASKS.items()):
        expert = BertForSequenceClassification(BertConfig(**CONFIG, num_labels=len(names))).eval()
        expert.bert.load_state_dict(moved(base.bert, number).state_dict())
        experts[task] = expert
    return base, experts, {task: texts(task) for task in TASKS}


# ------------------------------------------------------------------------------------------------ masks


@pytest.fixture(scope="module", params=["bert", "t5"])
def mixture(request):
    torch.manual_seed(0)
    if request.param == "bert":
        base = BertModel(BertConfig(**CONFIG), add_pooling_layer=False).eval()
    else:
        base = T5EncoderModel(T5Config(vocab_size=30, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8)).eval()
    experts = {f"t{i}": moved(base, i) for i in range(2)}
    return upscale(base, experts, {"input_ids": torch.tensor([[5, 6]])}, UpscaleConfig(router_init_std=0.5)).eval()


IDS = torch.tensor([[5, 6, 7, 0, 0], [4, 8, 7, 6, 5]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def test_a_mask_counts_by_name_by_position_and_in_a_mapping(mixture):
    alone = mixture.routing_weights(input_ids=IDS[:1, :3])[:, 0]
    assert not torch.allclose(mixture.routing_weights(IDS)[:, 0], alone, atol=1e-4)
    assert torch.allclose(mixture.routing_weights(input_ids=IDS, attention_mask=MASK)[:, 0], alone, atol=1e-4)
    assert torch.allclose(mixture.routing_weights(IDS, MASK)[:, 0], alone, atol=1e-4)
    assert torch.allclose(mixture.routing_weights(IDS, attention_mask=MASK.bool())[:, 0], alone, atol=1e-4)

    class OfMapping(nn.Module):
        """Takes its inputs as one mapping."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, batch):
            return self.inner(**batch)

    mixture = copy.deepcopy(mixture)
    mixture.backbone = OfMapping(mixture.backbone)
    assert torch.allclose(mixture.routing_weights({"input_ids": IDS, "attention_mask": MASK})[:, 0], alone, atol=1e-4)


def test_a_row_whose_tokens_are_all_masked_stays_finite_and_leaves_the_others_alone(mixture):
    empty = torch.cat([torch.zeros(1, 5, dtype=torch.long), MASK])
    weights = mixture.routing_weights(IDS[[1, 0, 1]], empty)
    assert torch.isfinite(weights).all()
    assert torch.allclose(weights[:, 1:], mixture.routing_weights(IDS, MASK), atol=1e-5)
    assert torch.isfinite(mixture(IDS[[1, 0, 1]], empty).last_hidden_state).all()
    router, x = Router(4, 2, init_std=1.0), torch.randn(2, 3, 4)
    assert torch.allclose(router(x, torch.zeros(2, 3)), router(x))


# ------------------------------------------------------------------------------------------------- data


def test_token_columns_are_padded_and_drop_labels():
    data = datasets.Dataset.from_dict({"input_ids": [[5, 6], [7], [8, 9, 4]], "label": [0, 1, 0]})
    column = column_of(data, Reading(pad_id=3))
    batch = column.read([1, 2])
    assert batch["input_ids"].tolist() == [[7, 3, 3], [8, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert [len(part["input_ids"]) for part in column.batches(2)] == [2, 1]
    joined = column.join([column.read([0]), batch])
    assert joined["input_ids"].tolist() == [[5, 6, 3], [7, 3, 3], [8, 9, 4]]
    other = column_of(data.select([1, 0, 2]), Reading(pad_id=3))
    assert column.fingerprint == column_of(data, Reading(pad_id=3)).fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"input_ids": []}, "no sample"),
        ({"input_ids": [[1], []]}, "row 1 has no token"),
        ({"input_ids": [[1, 30]]}, "row 0 holds token 30; the model knows 9"),
        ({"input_ids": [[1, -1]]}, "row 0 holds token -1"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "2 input_ids and 1 values of attention_mask"),
    ],
)
def test_tokens_that_cannot_be_read(columns, match):
    with pytest.raises(ValueError, match=match):
        TokenColumn(columns, vocabulary=9)


@pytest.mark.parametrize("text", [None, "", "  "])
def test_texts_without_text_are_named(text, tokenizer):
    data = datasets.Dataset.from_dict({"text": ["so", text]})
    with pytest.raises(ValueError, match=r"row 1 of column 'text' is .*; expected a text"):
        column_of(data, Reading(tokenizer=tokenizer_of(tokenizer)))


def test_texts_that_are_too_long_are_reported(pool, tokenizer):
    said = []
    reading = reading_of(pool[0], None, tokenizer_of(tokenizer), warn=said.append)
    assert reading.max_length == 10
    column = column_of(datasets.Dataset.from_dict({"text": ["so " * 11, "so"]}), reading)
    assert column.read([0])["input_ids"].shape == (1, 10)
    assert said == ["1 of 2 texts are longer than 10 tokens and are cut"]


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        tokenizer_of(tmp_path / "nowhere")
    BertModel(BertConfig(**CONFIG)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        tokenizer_of(tmp_path)


# ------------------------------------------------------------------------------------- merge and evaluate


@pytest.mark.slow
def test_texts_through_merge_and_evaluation(pool, tokenizer, tmp_path):
    base, experts, data = pool
    run = plait.Run()
    merged = plugin.WEMoE(num_steps=2, learning_rate=1e-2, tokenizer=tokenizer).merge(
        base=base, experts=experts, data=data, run=run
    )
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    individual = plugin.Individual().merge(base=base, experts=experts, data=None, run=run)
    method = plugin.MultiTaskAccuracy(batches=("one-task", "mixed"), tokenizer=tokenizer, batch_size=5, pictures=False)
    report = method.evaluate(model={"wemoe": merged, "loaded": loaded, "individual": individual}, data=data, run=run)
    rows = {(row["method"], row["batches"]): row for row in report.rows}
    assert rows["wemoe", "one-task"]["colour"] == pytest.approx(rows["wemoe", "mixed"]["colour"])
    assert rows["wemoe", "one-task"]["mood"] == rows["loaded", "one-task"]["mood"]
    inputs = column_of(data["mood"], Reading(tokenizer=tokenizer_of(tokenizer))).read(range(12))
    with torch.no_grad():
        right = experts["mood"](**inputs).logits.argmax(dim=1) == torch.tensor(data["mood"]["label"])
    assert rows["individual", "any"]["mood"] == pytest.approx(100 * right.double().mean().item())
    with pytest.raises(ValueError, match="task 'colour': the data holds texts; set tokenizer"):
        plugin.EWEMoE(num_steps=1).merge(base=base, experts=experts, data=data, run=run)


def test_tokenised_and_raw_texts_give_the_same_merge(pool, tokenizer):
    base, experts, data = pool
    fast = tokenizer_of(tokenizer)
    tokens = {task: part.map(lambda row: fast(row["text"]), remove_columns=["text"]) for task, part in data.items()}
    one, two = (
        plugin.AdaMerging(num_steps=2, learning_rate=0.1, tokenizer=folder).merge(
            base=base, experts=experts, data=given, run=plait.Run()
        )
        for folder, given in ((tokenizer, data), (None, tokens))
    )
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_padding_does_not_enter_regmeans_inner_products(pool):
    base = pool[0]
    short = {"input_ids": torch.tensor([[2, 3]]), "attention_mask": torch.tensor([[1, 1]])}
    padded = {"input_ids": torch.tensor([[2, 3, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    one, two = (static.gram_matrices(base, [inputs]) for inputs in (short, padded))
    name = "bert.encoder.layer.1.intermediate.dense"
    assert torch.allclose(one[name], two[name], atol=1e-5)
