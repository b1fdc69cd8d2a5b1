import json

import plait
import pytest
import torch
from plait import Run
from plait_clip.backdoor import released_groups
from plait_ta_cleaner.plugin import FtHardNegatives, Subcaptions, TaCleaner

TRAINING = {"num_epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 2}
RULES = {"synonyms": "toy-data", "min_pool_count": 1}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def collected():
    warnings = []
    return Run(on_warning=warnings.append), warnings


def test_without_alignment_the_step_is_clean_clip_bit_for_bit(make_model, pairs):
    plain = plait.load("clean-clip", **TRAINING, synonyms="toy-data").defend(make_model(), pairs, None, Run())
    off = TaCleaner(**TRAINING, **RULES, ta_weight=0.0).defend(make_model(), {"clean": pairs}, None, Run())
    assert same(plain, off)
    on = TaCleaner(**TRAINING, **RULES).defend(make_model(), pairs, None, Run())
    assert not same(plain, on)


@pytest.mark.slow
def test_the_optimizer_state_of_the_authors_checkpoints_is_taken_over(make_model, pairs, tmp_path):
    """By the kit's own function: the same state as clean-clip starts from."""
    trained, released = make_model(), {**TRAINING, "as_released": True, "learning_rate": 1e-4}
    adamw = torch.optim.AdamW(released_groups(trained.model, 0.1))
    trained.encode_text(["a bag", "a boot"]).sum().backward()
    adamw.step()
    weights = {f"module.{name}": tensor for name, tensor in trained.model.state_dict().items()}
    torch.save({"state_dict": weights, "optimizer": adamw.state_dict()}, tmp_path / "victim.pt")
    state = {"optimizer_checkpoint": tmp_path / "victim.pt"}
    plain, off, without = (
        method.defend(make_model(), pairs, None, Run())
        for method in (
            plait.load("clean-clip", **released, **state, synonyms="toy-data"),
            TaCleaner(**released, **state, **RULES, ta_weight=0.0),
            TaCleaner(**released, **RULES, ta_weight=0.0),
        )
    )
    assert same(plain, off)
    assert not same(off, without)


def test_counters_add_up_and_nothing_is_modified(make_model, pairs):
    model, run = make_model(), Run()
    columns = pairs.column_names
    TaCleaner(**TRAINING, **RULES, n_subtext=10).defend(model, pairs, None, run)
    assert same(model, make_model())
    assert pairs.column_names == columns
    row = run.reports[0].rows[0]
    assert row["drawn"] == 20  # 10 in each of 2 epochs
    assert row["rewritten"] + row["positive = caption"] + row["no counterfactual"] == 20
    assert row["rewritten"] == 20
    assert "counterfactual" in run.reports[0].notes[0]


def test_the_truth_is_not_read(make_model, pairs):
    garbage = pairs.remove_columns("is_backdoor").add_column("is_backdoor", [i % 3 == 0 for i in range(64)])
    method = TaCleaner(**TRAINING, **RULES)
    assert same(method.defend(make_model(), pairs, None, Run()), method.defend(make_model(), garbage, None, Run()))


@pytest.mark.slow
def test_one_run_serves_several_defences(make_model, pairs):
    run, other = Run(), TaCleaner(**TRAINING, **RULES, ta_weight=0.5)
    first = TaCleaner(**TRAINING, **RULES).defend(make_model(), pairs, None, run)
    second = other.defend(make_model(), pairs, None, run)
    assert not same(first, second)
    assert same(second, other.defend(make_model(), pairs, None, Run()))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(make_model, pairs, tmp_path):
    method = TaCleaner(**TRAINING, **RULES)
    whole = method.defend(make_model(), pairs, None, Run(step="ta"))

    def stop(values, at):
        if at == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.defend(make_model(), pairs, None, Run(step="ta", folder=tmp_path, on_log=stop))
    assert same(method.defend(make_model(), pairs, None, Run(step="ta", folder=tmp_path)), whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", [TaCleaner(**TRAINING, **RULES), FtHardNegatives(**TRAINING, **RULES)])
def test_a_frozen_model_is_cleaned_as_another_and_comes_back_frozen(make_model, pairs, method):
    frozen = make_model().requires_grad_(False)
    thawed, cleaned = (method.defend(model, pairs, None, Run()) for model in (make_model(), frozen))
    assert same(thawed, cleaned)
    assert all(p.requires_grad for p in thawed.parameters())
    assert not any(p.requires_grad for p in cleaned.parameters())
    assert not same(method.defend(cleaned, pairs, None, Run()), cleaned)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"n_negatives": 0},
        {"positive_mode": "caption"},
        {"positive_mode": "first_relation", "n_negatives": 2},
        {"self_supervised_weight": 0.0},
        {"n_subtext": 1.0},
        {"negative_scope": "own", "negative_slots": ("noun",)},
        {"negative_loss": "margin"},
        {"augment_images": False, "augment_texts": False},
        {"as_released": True, "eda_resample": "epoch"},
        {"pool_extra": ("purse",), "pool_exclude_synonyms": False},
    ],
)
def test_variants_and_ablations_train(make_model, pairs, change):
    result = TaCleaner(**{**TRAINING, "num_epochs": 1, **RULES, **change}).defend(make_model(), pairs, None, Run())
    assert not same(result, make_model())
    assert all(bool(p.isfinite().all()) for p in result.parameters())


@pytest.mark.slow
def test_columns_give_the_sub_captions(make_model, pairs):
    written = Subcaptions(**RULES, n_negatives=2).transform(pairs, Run())
    assert written.column_names == [*pairs.column_names, "caption_pos", "caption_neg_1", "caption_neg_2"]
    for row in written:
        words = row["captions"][0].split()
        assert row["caption_pos"] == " ".join(["a", "photo", "of", "a", words[-1]])
        for name in ("caption_neg_1", "caption_neg_2"):
            changed = [(a, b) for a, b in zip(words, row[name].split(), strict=True) if a != b and a not in ("a", "an")]
            assert len(changed) == 1
    method = TaCleaner(**TRAINING, **RULES, n_negatives=2, subcaptions="columns")
    assert not same(method.defend(make_model(), written, None, Run()), make_model())
    with pytest.raises(ValueError, match="caption_pos"):
        method.defend(make_model(), pairs, None, Run())
    again = Subcaptions(**RULES, n_negatives=2).transform(written, Run())
    assert again.column_names == written.column_names


@pytest.mark.slow
def test_hard_negatives(make_model, pairs):
    method = FtHardNegatives(**TRAINING, **RULES)
    first, second = (method.defend(make_model(), pairs, None, Run()) for _ in range(2))
    assert same(first, second)
    assert not same(first, make_model())


def test_overlap_with_the_suspicious_data_is_refused_unless_allowed(make_model, pairs):
    data = {"clean": pairs.select(range(32)), "suspicious": pairs.select(range(24, 64))}
    with pytest.raises(ValueError, match="8 clean images occur"):
        TaCleaner(**TRAINING, **RULES).defend(make_model(), data, None, Run())
    run = Run()
    TaCleaner(**{**TRAINING, "num_epochs": 1}, **RULES, allow_overlap=True).defend(make_model(), data, None, run)
    assert run.reports[0].notes[0].startswith("8 of 32 clean images")


def test_warnings(make_model, pairs, collected):
    run, warnings = collected
    TaCleaner(**TRAINING, synonyms="toy-data", min_pool_count=60, n_subtext=4).defend(make_model(), pairs, None, run)
    text = " ".join(warnings)
    assert "no verb and no adj occurs 60 times" in text
    assert "less than two of the 4 pairs" in text


def test_captions_without_a_replacement_are_counted(make_model, pairs, collected):
    run, warnings = collected
    TaCleaner(**TRAINING, synonyms="toy-data", min_pool_count=1000).defend(make_model(), pairs, None, run)
    assert run.reports[0].rows[0]["no counterfactual"] == 32
    assert "no word to exchange" in warnings[-1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ta_weight": 0.0, "clip_weight": 0.0, "self_supervised_weight": 0.0}, "all 0"),
        ({"n_negatives": 9}, "n_negatives"),
        ({"negative_slots": ()}, "negative_slots"),
        ({"negative_slots": ("adverb",)}, "negative_slots"),
        ({"n_subtext": 3.5}, "n_subtext"),
        ({"positive_mode": "short"}, "positive_mode"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TaCleaner(**fields)


@pytest.mark.slow
def test_bad_input_is_one_sentence(make_model, pairs, tmp_path):
    empty = pairs.remove_columns("captions").add_column("captions", [[""]] * 64)
    cases = [
        (TaCleaner(**TRAINING, **RULES, n_subtext=65), pairs, "n_subtext"),
        (TaCleaner(**{**TRAINING, "batch_size": 65}, **RULES), pairs, "batch"),
        (TaCleaner(**TRAINING, **RULES), {"suspicious": pairs}, "clean"),
        (TaCleaner(**TRAINING, **RULES), empty, "row 0"),
        (TaCleaner(**TRAINING, **RULES, word_list=tmp_path), pairs, "WordNet"),
        (TaCleaner(**TRAINING, synonyms=str(tmp_path / "none.json")), pairs, "none.json"),
        (TaCleaner(**{**TRAINING, "learning_rate": 1e30}, **RULES), pairs, "learning rate"),
        (TaCleaner(**TRAINING, **RULES, as_released=True, optimizer_checkpoint=tmp_path / "no.pt"), pairs, "no.pt"),
    ]
    for method, data, message in cases:
        with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=message) as error:
            method.defend(make_model(), data, None, Run())
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="dataset"):
        Subcaptions(**RULES).transform({"train": pairs}, Run())


def test_synonyms_from_a_file_are_never_drawn(pairs, tmp_path):
    nouns = ["bag", "boot", "coat", "dress", "photo"]
    (tmp_path / "all.json").write_text(json.dumps(dict.fromkeys(nouns, nouns)))
    rules = {"synonyms": str(tmp_path / "all.json"), "min_pool_count": 1, "negative_slots": ("noun",)}
    written = Subcaptions(**rules).transform(pairs, Run())
    assert set(written["caption_neg_1"]) == {""}


def test_a_tagger_by_import_path(pairs, monkeypatch, tmp_path):
    (tmp_path / "my_tagger.py").write_text("def tag(words):\n    return ['OTHER' for _ in words]\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    for tagger in ("my_tagger:tag", "./my_tagger.py:tag", f"{tmp_path}/my_tagger.py:tag"):
        written = Subcaptions(**{**RULES, "tagger": tagger}).transform(pairs, Run())
        assert set(written["caption_neg_1"]) == {""}
    for bad, message in [
        ("spacy", "allowed is lexicon, or package.module:name"),
        ("os:system", "Python's own library"),
        ("my_tagger:nothing", "there is no 'nothing'"),
        ("no_such_module:tag", "cannot be imported"),
        ("my_tagger:number", "is not a function"),
    ]:
        with pytest.raises(ValueError, match=message):
            Subcaptions(**{**RULES, "tagger": bad}).transform(pairs, Run())
