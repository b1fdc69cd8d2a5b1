"""Text classifiers of the families that people fine-tune, from folders of save_pretrained, through every merge method."""

import copy

import datasets
import plait
import pytest
import torch
import transformers
from plait import codecs
from plait_wemoe import plugin
from plait_wemoe.columns import column_of, reading_of, tokenizer_of
from plait_wemoe.heads import head_places
from plait_wemoe.texts import text_classifier
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["[PAD]", "[UNK]", "[END]", "red", "green", "blue", "good", "bad", "so", "very"]
TASKS = {"colour": ["red", "green", "blue"], "mood": ["good", "bad"]}
PLAIN = {"vocab_size": len(WORDS), "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
SIZES = {**PLAIN, "hidden_size": 8, "intermediate_size": 12, "pad_token_id": 0}
CAUSAL = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}

# Family → (config, body, classifier, places of the head, whether its MLPs can be routed)
FAMILIES = {
    "BERT": (
        transformers.BertConfig(**SIZES),
        transformers.BertModel,
        transformers.BertForSequenceClassification,
        ("classifier",),
        True,
    ),
    "DistilBERT": (
        transformers.DistilBertConfig(
            vocab_size=len(WORDS), dim=8, hidden_dim=12, n_layers=2, n_heads=2, max_position_embeddings=16
        ),
        transformers.DistilBertModel,
        transformers.DistilBertForSequenceClassification,
        ("pre_classifier", "classifier"),
        True,
    ),
    "ALBERT": (
        transformers.AlbertConfig(**SIZES, embedding_size=4),
        transformers.AlbertModel,
        transformers.AlbertForSequenceClassification,
        ("classifier",),
        True,
    ),
    "DeBERTa": (
        transformers.DebertaV2Config(**SIZES),
        transformers.DebertaV2Model,
        transformers.DebertaV2ForSequenceClassification,
        ("pooler", "classifier"),
        True,
    ),
    "T5": (
        transformers.T5Config(
            vocab_size=len(WORDS), d_model=8, d_ff=12, num_layers=1, num_heads=2, d_kv=4, decoder_start_token_id=0,
            eos_token_id=2, pad_token_id=0,
        ),
        transformers.T5Model,
        transformers.T5ForSequenceClassification,
        ("classification_head",),
        True,
    ),
    "Llama": (
        transformers.LlamaConfig(**CAUSAL),
        transformers.LlamaModel,
        transformers.LlamaForSequenceClassification,
        ("score",),
        True,
    ),
    "GPT-2": (
        transformers.GPT2Config(
            vocab_size=len(WORDS), n_positions=16, n_embd=8, n_layer=2, n_head=2, pad_token_id=0, eos_token_id=2
        ),
        transformers.GPT2Model,
        transformers.GPT2ForSequenceClassification,
        ("score",),
        False,
    ),
}  # fmt: skip
FEW = {"num_steps": 1, "batch_size": 4}
METHODS = {
    "individual": plugin.Individual,
    "simple-average": plugin.SimpleAverage,
    "task-arithmetic": plugin.TaskArithmetic,
    "ties": plugin.Ties,
    "dare": plugin.Dare,
    "fisher": lambda **more: plugin.Fisher(num_examples=4, **more),
    "regmean": lambda **more: plugin.RegMean(num_examples=4, **more),
    "adamerging": lambda **more: plugin.AdaMerging(**FEW, **more),
    "adamerging, by task": lambda **more: plugin.AdaMerging(level="task", **FEW, **more),
    "concrete": lambda **more: plugin.Concrete(**FEW, **more),
    "concrete, then adamerging": lambda **more: plugin.Concrete(then="adamerging", **FEW, **more),
    "wemoe": lambda **more: plugin.WEMoE(**FEW, **more),
    "wemoe-icml": lambda **more: plugin.WEMoEIcml(**FEW, **more),
    "e-wemoe": lambda **more: plugin.EWEMoE(**FEW, **more),
    "e-wemoe-fast": lambda **more: plugin.EWEMoEFast(**FEW, **more),
    "e-wemoe-published": lambda **more: plugin.EWEMoEPublished(**FEW, **more),
}
# The others go the same way through most methods.
EVERY_METHOD = ("BERT", "DistilBERT", "T5")
# One of each shape that a result has on disk.
STORED = ("individual", "simple-average", "wemoe", "e-wemoe")


def texts(task, number=8):
    names = TASKS[task]
    labels = [row % len(names) for row in range(number)]
    rows = [" ".join(["so"] * (row % 4) + [names[label], "[END]"]) for row, label in enumerate(labels)]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": rows, "label": labels}, features=features)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer of ten words, which says nothing of padding, as those of GPT-2 and Llama."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name, and folders: a pre-trained body, and classifiers that were fine-tuned from it."""
    config, body, classifier, _, _ = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = body(config)
    base.save_pretrained(folder / "base")
    for task, names in TASKS.items():
        tuned = classifier.from_pretrained(folder / "base", num_labels=len(names))
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        tuned.save_pretrained(folder / task)
    return request.param, folder


def load(folder, data=None):
    return plugin.TextClassifier(source=str(folder)).load_model(data=data, run=plait.Run())


@pytest.mark.slow
def test_every_method_merges_and_is_evaluated_on_batches_of_tokens(family, tokenizer, tmp_path):
    name, folder = family
    _, body, classifier, places, is_routed = FAMILIES[name]
    experts, data = {task: load(folder / task) for task in TASKS}, {task: texts(task) for task in TASKS}
    assert all(isinstance(expert, classifier) and head_places(expert) == places for expert in experts.values())
    base = body.from_pretrained(folder / "base").eval()
    run = plait.Run(on_warning=lambda sentence: None)
    merged = {}
    for label, build in METHODS.items():
        if name not in EVERY_METHOD and label not in (*STORED, "regmean"):
            continue
        method = build(tokenizer=tokenizer)
        if isinstance(method, plugin.WEMoE) and not is_routed:
            with pytest.raises(ValueError, match=r"only nn\.Linear layers can be up-scaled"):
                method.merge(base=base, experts=experts, data=data, run=run)
            continue
        merged[label] = method.merge(base=base, experts=experts, data=data, run=run)
    accuracy = plugin.MultiTaskAccuracy(
        tokenizer=tokenizer, batches=("one-task", "mixed"), batch_size=3, pictures=False
    )
    report = accuracy.evaluate(model=merged, data=data, run=run)
    rows = {(row["method"], row["batches"]): row for row in report.rows}
    for label in merged:
        if "any" in {batches for method, batches in rows if method == label}:
            continue
        one, mixed = rows[label, "one-task"], rows[label, "mixed"]
        if label != "e-wemoe-published":  # there an output depends on its batch
            assert all(one[task] == pytest.approx(mixed[task]) for task in TASKS)
    # Every expert answers in the pool as it does alone, on batches of texts of different lengths.
    for task, expert in experts.items():
        inputs = column_of(data[task], reading_of(expert, None, tokenizer_of(tokenizer))).read(range(8))
        with torch.no_grad():
            alone = expert(**inputs).logits
            assert torch.allclose(merged["individual"].logits(inputs, task), alone, atol=1e-5)
            one_by_one = [
                expert(
                    **{
                        key: value[row : row + 1, : int(inputs["attention_mask"][row].sum())]
                        for key, value in inputs.items()
                    }
                ).logits
                for row in range(8)
            ]
        assert torch.allclose(alone, torch.cat(one_by_one), atol=1e-5)
        right = (alone.argmax(dim=1) == torch.tensor(data[task]["label"])).double().mean().item()
        assert rows["individual", "any"][task] == pytest.approx(100 * right)
    for label in set(STORED) & set(merged):
        codecs.save(merged[label], tmp_path / label)
        loaded = codecs.load(tmp_path / label)
        again = accuracy.evaluate(model=loaded, data=data, run=run)
        first = next(row for row in report.rows if row["method"] == label)
        assert [again.rows[0][task] for task in TASKS] == [first[task] for task in TASKS]


def test_a_single_expert_with_lambda_one_is_that_expert(family):
    _, folder = family
    base, expert = load(folder / "base"), load(folder / "mood")
    merged = plugin.TaskArithmetic(scaling=1.0).merge(base=base, experts={"mood": expert}, data=None, run=plait.Run())
    inputs = {"input_ids": torch.tensor([[3, 4, 2], [5, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    with torch.no_grad():
        assert torch.allclose(merged.logits(inputs, "mood"), expert(**inputs).logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["BERT", "T5"], indirect=True)
def test_classifiers_are_fine_tuned_merged_trained_and_merged_again(family, tokenizer):
    name, folder = family
    data, run = {task: texts(task) for task in TASKS}, plait.Run(on_warning=lambda sentence: None)
    base = load(folder / "base")
    training = plugin.MultiTaskTraining(num_steps=2, batch_size=4, train_heads=True, tokenizer=tokenizer)
    experts = {
        task: training.optimize(model=load(folder / "base", part), data=part, run=run) for task, part in data.items()
    }
    for expert, part in zip(experts.values(), data.values(), strict=True):
        assert type(expert) is FAMILIES[name][2]
        assert not expert.training
        fresh = load(folder / "base", part).state_dict()
        assert all(torch.isfinite(value).all() for value in expert.state_dict().values())
        assert any(
            not torch.equal(value, fresh[key])
            for key, value in expert.state_dict().items()
            if "head" in key or "classifier" in key
        )
    with pytest.raises(
        ValueError, match="has one head, and data are of the tasks colour, mood; give those of one task"
    ):
        training.optimize(model=base, data=data, run=run)
    experts = {
        task: training.optimize(model=load(folder / "base", part), data={task: part}, run=run)
        for task, part in data.items()
    }
    merged = plugin.Ties().merge(base=base, experts=experts, data=None, run=run)
    tuned = {task: training.optimize(model=merged, data={task: part}, run=run) for task, part in data.items()}
    again = plugin.SimpleAverage().merge(base=merged, experts=tuned, data=None, run=run)
    mixed = plugin.SimpleAverage().merge(
        base=base, experts={"colour": tuned["colour"], "mood": load(folder / "mood")}, data=None, run=run
    )
    report = plugin.MultiTaskAccuracy(tokenizer=tokenizer, pictures=False).evaluate(
        model={"merged": merged, "again": again, "mixed": mixed}, data=data, run=run
    )
    assert len(report.rows) == 3


@pytest.mark.parametrize("family", ["BERT", "DistilBERT", "DeBERTa"], indirect=True)
def test_a_fresh_head_has_the_classes_of_the_data_and_depends_on_the_seed(family, tmp_path):
    _, folder = family
    one, two, other = (
        plugin.TextClassifier(source=str(folder / "mood")).load_model(data=texts("colour"), run=plait.Run(seed=seed))
        for seed in (0, 0, 1)
    )
    assert one.config.num_labels == 3
    assert list(one.config.id2label.values()) == TASKS["colour"]
    heads = head_places(one)
    stored = load(folder / "mood").state_dict()
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])
        if not key.startswith(heads):
            assert torch.equal(value, stored[key])
            assert torch.equal(value, other.state_dict()[key])
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    before = torch.get_rng_state()
    load(folder / "base")
    assert torch.equal(torch.get_rng_state(), before)


def test_folders_that_are_no_classifiers(tmp_path):
    with pytest.raises(ValueError, match="holds no classifier of texts that transformers can read"):
        text_classifier(str(tmp_path))
    config = copy.deepcopy(FAMILIES["BERT"][0])
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    config.intermediate_size = 20
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks bert\.encoder\.layer\.0\.intermediate|holds no classifier"):
        text_classifier(str(tmp_path), TASKS["mood"])
    unnamed = datasets.Dataset.from_dict({"text": ["so"], "label": [0]})
    with pytest.raises(ValueError, match="data declares no class names"):
        load(tmp_path, unnamed)
    with pytest.raises(ValueError, match="there is no model to evaluate"):
        plugin.MultiTaskAccuracy().evaluate(model={}, data={"mood": texts("mood")}, run=plait.Run())


METHODS_FILE = '''
import attrs, datasets
from plait import hookimpl

TASKS = {"colour": ["red", "green", "blue"], "mood": ["good", "bad"]}


@attrs.frozen(kw_only=True)
class Texts:
    """Texts of a task."""

    task: str = "mood"

    @hookimpl
    def load_data(self, run):
        names = TASKS[self.task]
        rows = {"text": [f"so {name} [END]" for name in names] * 4, "label": [*range(len(names))] * 4}
        data = datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=names))
        return {"train": data, "test": data}
'''

PIPELINE = """
plait: 1
name: texts
steps:
  colour: {load-data: "./methods.py:Texts", with: {task: colour}}
  mood: {load-data: "./methods.py:Texts"}
  base: {load-model: text-classifier, with: {source: MODELS/base}}
  known: {load-model: text-classifier, with: {source: MODELS/colour}}
  fresh: {load-model: text-classifier, from: {data: mood.train}, with: {source: MODELS/base}}
  tuned:
    optimize: multi-task
    from: {model: fresh, data: {mood: mood.train}}
    with: {tokenizer: TOKENIZER, train_heads: true, num_steps: 2, batch_size: 4}
  merged:
    merge: e-wemoe
    from: {base: base, experts: {colour: known, mood: tuned}, data: {colour: colour.test, mood: mood.test}}
    with: {tokenizer: TOKENIZER, num_steps: 2, batch_size: 4}
  folder: {load-model: model-folder, with: {folder: MODELS/base}}
  other: {load-model: model-folder, with: {folder: MODELS/mood}}
  streamed: {merge: ties, from: {base: folder, experts: {mood: other}}}
  accuracy:
    evaluate: multi-task
    from: {model: merged, data: {colour: colour.test, mood: mood.test}}
    with: {tokenizer: TOKENIZER}
  of-one:
    evaluate: multi-task
    from: {model: {tuned: tuned, streamed: streamed}, data: mood.test}
    with: {tokenizer: TOKENIZER}
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["DistilBERT"], indirect=True)
def test_a_pipeline_of_texts(family, tokenizer, tmp_path, monkeypatch):
    _, folder = family
    if not (folder / "whole").exists():  # a base with a head, as a folder of its own
        load(folder / "base", texts("mood")).save_pretrained(folder / "whole")
    (tmp_path / "methods.py").write_text(METHODS_FILE)
    text = PIPELINE.replace("MODELS/base}}\n  other", "MODELS/whole}}\n  other")
    text = text.replace("MODELS", str(folder)).replace("TOKENIZER", str(tokenizer))
    (tmp_path / "texts.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    result = plait.run(tmp_path / "texts.yaml")
    assert {"colour", "mood", "mean"} <= result.output("accuracy").rows[0].keys()
    assert [row["method"] for row in result.output("of-one").rows] == ["tuned", "streamed"]
    assert all("accuracy" in row for row in result.output("of-one").rows)
