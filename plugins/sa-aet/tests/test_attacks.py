"""The attacks as methods: whole data sets in, adversarial pairs out."""

import copy
import json
import zlib
from pathlib import Path

import attrs
import datasets
import numpy as np
import plait
import pytest
import torch
from PIL import Image
from plait import Run
from plait.errors import ConfigurationError
from plait_clip import digit_pairs, tiny_model, toy_data
from plait_sa_aet.plugin.attacks import BertAttack, CoAttack, Dra, Pgd, PgdCos, SaAet, SepAttack, Sga
from plait_sa_aet.plugin.transfer import Transfer
from plait_sa_aet.sa_aet import SemanticProjection
from plait_sa_aet.source import NotDifferentiableError
from plait_sa_aet.stop_words import STOP_WORDS
from safetensors import safe_open
from safetensors.torch import load_file

WORDS = {"generator": "synonyms", "synonyms": {word: tuple(others) for word, others in toy_data.SYNONYMS.items()}}
QUICK = {"num_steps": 3, "batch_size": 4}
IMAGES = {
    "sa-aet": SaAet(**QUICK, **WORDS),
    "dra": Dra(**QUICK, **WORDS),
    "sga": Sga(**QUICK, **WORDS),
    "co-attack": CoAttack(**QUICK, **WORDS),
    "sep-attack": SepAttack(**QUICK, **WORDS),
    "pgd": Pgd(**QUICK),
    "pgd-cos": PgdCos(**QUICK),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def pixels(data):
    return np.stack([np.asarray(image) for image in data["image"]]).astype(int)


@pytest.mark.parametrize("attack", IMAGES.values(), ids=IMAGES)
def test_images_move_by_no_more_than_eight_levels_and_do_move(attack, model):
    data = digit_pairs(12)
    moved = np.abs(pixels(attack.attack(model, data, Run())) - pixels(data))
    assert 0 < moved.max() <= 8
    assert (moved.max(axis=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize(("rounding", "epsilon"), [("round", 8 / 255), ("floor", 8 / 255), ("floor", 3.5 / 255)])
def test_the_budget_holds_after_rounding(rounding, epsilon, model):
    data = digit_pairs(12)
    changed = SaAet(**QUICK, text=False, quantize=rounding, epsilon=epsilon).attack(model, data, Run())
    assert np.abs(pixels(changed) - pixels(data)).max() <= np.floor(255 * epsilon)


def test_floats_are_kept_where_nothing_is_rounded(model):
    data = digit_pairs(12)
    changed = SaAet(**QUICK, text=False, quantize="none", epsilon=0.02).attack(model, data, Run())
    floats = changed.with_format("torch")["pixels"][:]
    clean = torch.from_numpy(pixels(data)).permute(0, 3, 1, 2) / 255
    assert changed.features["pixels"] == datasets.Array3D((3, 8, 8), "float32")
    assert 0.015 < (floats - clean).abs().max() <= 0.02 + 1e-6
    # 0.02 is 5.1 levels: the 8-bit copy keeps them, too
    assert np.abs(pixels(changed) - pixels(data)).max() == 5
    assert np.abs(pixels(changed) - 255 * floats.permute(0, 2, 3, 1).numpy()).max() < 1


def test_one_run_serves_several_attacks(model):
    run, data = Run(), digit_pairs(12)
    first = PgdCos(**QUICK).attack(model, data, run)
    weaker = PgdCos(**QUICK, epsilon=2 / 255).attack(model, data, run)
    assert np.abs(pixels(first) - pixels(data)).max() > 2
    assert np.abs(pixels(weaker) - pixels(data)).max() == 2
    # Neither other rows nor another model get what was made before.
    others = data.select(range(11, -1, -1))
    assert 2 < np.abs(pixels(PgdCos(**QUICK).attack(model, others, run)) - pixels(others)).max() <= 8
    another = copy.deepcopy(model)
    for parameter in another.parameters():
        parameter.data *= -1
    assert (pixels(PgdCos(**QUICK).attack(another, data, run)) != pixels(first)).any()
    assert (pixels(PgdCos(**QUICK).attack(model, data, run)) == pixels(first)).all()


def test_floats_of_an_earlier_attack_do_not_stay(model):
    data = digit_pairs(12)
    before = PgdCos(**QUICK, quantize="none").attack(model, data, Run())
    assert "pixels" in before.column_names
    after = PgdCos(**QUICK).attack(model, before, Run())
    assert after.column_names == data.column_names


def test_images_are_written_under_their_names_with_folders(model, tmp_path):
    data = digit_pairs(3).add_column("file_name", ["train/a.jpg", "test/a.jpg", "../b.png"])
    attack = PgdCos(**QUICK, save_to=tmp_path / "out")
    changed = attack.attack(model, data, Run())
    assert changed["file_name"] == data["file_name"]
    for name, image in zip(["train/a.png", "test/a.png", "b.png"], changed["image"], strict=True):
        assert (np.asarray(Image.open(tmp_path / "out" / name)) == np.asarray(image)).all()
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_images_of_one_name_are_written_side_by_side(model, tmp_path):
    data = digit_pairs(3)
    cells = [cell | {"path": "a.jpg"} for cell in data.cast_column("image", datasets.Image(decode=False))["image"]]
    named = datasets.Dataset.from_dict({"image": cells, "captions": data["captions"]}).cast_column(
        "image", datasets.Image()
    )
    PgdCos(**QUICK, save_to=tmp_path / "out").attack(model, named, Run())
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "a-00000001.png",
        "a-00000002.png",
        "a.png",
    ]
    lines = (tmp_path / "out" / "captions.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in lines] == ["a.png", "a-00000001.png", "a-00000002.png"]


def test_ratios_are_three(model):
    with pytest.raises(ValueError, match="ratios has 2 values; give three"):
        SaAet(**WORDS, ratios=(0.5, 0.5))


def test_captions_change_by_one_word_of_the_table(model):
    data = digit_pairs(12)
    plain = [[word for word in texts[0].split() if word in WORDS["synonyms"]] for texts in data["captions"]]
    assert any(len(words) > 1 for words in plain)  # so that one word is fewer than could change
    changed = SaAet(**QUICK, **WORDS).attack(model, data, Run())
    pairs = [(a[0].split(), b[0].split()) for a, b in zip(data["captions"], changed["captions"], strict=True)]
    differing = [[(old, new) for old, new in zip(a, b, strict=True) if old != new] for a, b in pairs]
    assert any(differing)
    assert all(len(words) <= 1 for words in differing)
    assert all(new in WORDS["synonyms"][old] for words in differing for old, new in words)


@pytest.mark.parametrize("attack", [SaAet(**QUICK, text=False), Pgd(**QUICK), PgdCos(**QUICK)])
def test_without_text_captions_stay_as_they_were_written(attack, model):
    written = [["A photo, of: a Digit!"], ["the number-two."]]
    data = digit_pairs(2).remove_columns("captions").add_column("captions", written)
    run = Run()
    if isinstance(attack, SaAet):
        attack = attrs.evolve(attack, corpus_fraction=1.0)
    assert attack.attack(model, data, run)["captions"] == written
    if isinstance(attack, SaAet):
        assert "images alone" in run.reports[0].notes[0]


def test_equal_captions_of_an_image_are_counted_each(model):
    data = digit_pairs(3).remove_columns("captions").add_column("captions", [["a photo of a two"] * 3] * 3)
    run = Run()
    changed = BertAttack(generator="synonyms", synonyms={"photo": ("picture",), "two": ("three",)}).attack(
        model, data, run
    )
    different = sum(text != "a photo of a two" for texts in changed["captions"] for text in texts)
    assert different == 9
    assert run.reports[0].value("changed") == 9


def test_the_report_names_the_corpus(model, tmp_path):
    (tmp_path / "texts.txt").write_text("a photo of a two\nthe number three\na digit\n")
    for corpus, named in (
        (None, "12 captions, drawn from the captions under attack"),
        ("texts.txt", "3 captions, drawn from texts.txt"),
    ):
        run = Run()
        path = None if corpus is None else tmp_path / corpus
        SaAet(**QUICK, text=False, corpus=path, corpus_fraction=1.0).attack(model, digit_pairs(12), run)
        assert any(f"The projection was made of {named}" in note for note in run.reports[0].notes)


def test_bert_attack_leaves_the_images(model):
    data, run = digit_pairs(12), Run()
    changed = BertAttack(**WORDS).attack(model, data, run)
    assert (pixels(changed) == pixels(data)).all()
    assert run.reports[0].value("largest change of a pixel") == 0
    pairs = [(a[0].split(), b[0].split()) for a, b in zip(data["captions"], changed["captions"], strict=True)]
    swaps = [[(old, new) for old, new in zip(a, b, strict=True) if old != new] for a, b in pairs]
    assert max(map(len, swaps)) == 1
    assert all(new in WORDS["synonyms"][old] for words in swaps for old, new in words)


def test_several_captions_for_an_image_and_other_columns_are_kept(model):
    data = digit_pairs(12).remove_columns("captions").add_column("number", list(range(12)))
    captions = [[f"photo {toy_data.DIGIT_NAMES[(i + j) % 10]}" for j in range(1 + i % 3)] for i in range(12)]
    data = data.add_column("captions", captions).select(range(11, 0, -1))
    words = {"generator": "synonyms", "synonyms": {"photo": ("picture",)}}
    changed = SaAet(**QUICK, **words, corpus_fraction=1.0).attack(model, data, Run())
    assert changed.column_names == data.column_names
    assert changed["number"] == list(range(11, 0, -1))
    assert changed["label"] == data["label"]
    # Every caption is still at its image, in its place.
    assert [[text.split()[1] for text in texts] for texts in changed["captions"]] == [
        [text.split()[1] for text in texts] for texts in data["captions"]
    ]
    assert {text.split()[0] for texts in changed["captions"] for text in texts} == {"photo", "picture"}
    moved = np.abs(pixels(changed) - pixels(data)).max(axis=(1, 2, 3))
    assert (moved > 0).all()
    assert moved.max() <= 8


def test_a_column_of_single_captions(model):
    data = digit_pairs(8)
    single = data.remove_columns("captions").add_column("caption", [texts[0] for texts in data["captions"]])
    changed = SaAet(**QUICK, **WORDS).attack(model, single, Run())
    assert "captions" not in changed.column_names
    assert changed["caption"] != single["caption"]
    several = SaAet(**QUICK, **WORDS).attack(model, data, Run())
    assert changed["caption"] == [texts[0] for texts in several["captions"]]
    assert (pixels(changed) == pixels(several)).all()


class KilledError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("rng", ["per_image", "released"])
def test_a_killed_attack_goes_on_where_it_was(rng, model, tmp_path, monkeypatch):
    monkeypatch.setattr("plait_sa_aet.plugin.attacking.SHARD_IMAGES", 4)
    data, attack = digit_pairs(14), SaAet(**QUICK, **WORDS, rng=rng)
    whole = attack.attack(model, data, Run(seed=3, folder=tmp_path / "whole"))

    def killed_after(count):
        def progress(description, done, total):
            if done == count:
                raise KilledError

        return Run(seed=3, folder=tmp_path / "killed", on_progress=progress)

    with pytest.raises(KilledError):
        attack.attack(model, data, killed_after(2))
    assert len(list((tmp_path / "killed").glob("loops/*/shard-*.arrow"))) == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("loops/*/shard-*.arrow")}
    resumed = attack.attack(model, data, Run(seed=3, folder=tmp_path / "killed"))
    assert (pixels(resumed) == pixels(whole)).all()
    assert resumed["captions"] == whole["captions"]
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


@pytest.mark.slow
def test_results_do_not_depend_on_batches_where_every_image_chooses():
    # In float64 the sums of other batches, threads or processors flip no signs of gradients.
    model, data = tiny_model().double(), digit_pairs(12)
    one, four = (
        SaAet(num_steps=4, text=False, selection="image", batch_size=size).attack(model, data, Run()) for size in (1, 4)
    )
    assert (pixels(one) == pixels(four)).mean() > 0.999


def test_a_fusion_model_is_attacked_through_its_two_towers(blip):
    data = digit_pairs(6)
    changed = SaAet(**QUICK, **WORDS, projection="none").attack(blip, data, Run())
    assert 0 < np.abs(pixels(changed) - pixels(data)).max() <= 8
    assert changed["captions"] != data["captions"]
    report = Transfer(top=(6,), candidates=6, num_panels=1).evaluate(blip, changed, data, Run())
    assert report.rows[0]["ASR"] == 0  # of six images all are among the first six


def test_a_source_without_gradients_is_refused_in_one_sentence(model):
    class Detached(type(model)):
        def encode_image(self, images):
            return super().encode_image(images).detach()

    detached = copy.deepcopy(model)
    detached.__class__ = Detached
    with pytest.raises(NotDifferentiableError, match="must be differentiable"):
        PgdCos(**QUICK).attack(detached, digit_pairs(4), Run())


def test_another_seed_gives_other_images(model):
    data = digit_pairs(6)
    first, second = (SaAet(**QUICK, text=False).attack(model, data, Run(seed=seed)) for seed in (0, 1))
    assert (pixels(first) != pixels(second)).any()


def test_files_for_other_programs(model, tmp_path):
    data = digit_pairs(5)
    changed = SaAet(**QUICK, **WORDS, save_to=tmp_path / "out").attack(model, data, Run())
    lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == changed["captions"]
    images = np.stack([np.asarray(Image.open(tmp_path / "out" / line["image"])) for line in lines])
    assert (images == pixels(changed)).all()
    steps = [json.loads(line) for line in (tmp_path / "out" / "trace.jsonl").read_text().splitlines()]
    assert [batch["first_row"] for batch in steps] == [0, 4]
    assert all(len(batch["steps"]) == 3 for batch in steps)
    changes = [json.loads(line) for line in (tmp_path / "out" / "changes.jsonl").read_text().splitlines()]
    assert changes
    assert all(change["score_after"] > change["score_before"] for change in changes)
    for change in changes:
        assert change["adversarial"] == changed["captions"][change["row"]][change["caption"]]
        assert change["clean"].split()[change["index"]] == change["old"] != change["new"]
        assert change["adversarial"].split()[change["index"]] == change["new"]
    assert [(change["row"], change["caption"]) for change in changes] == sorted(
        (change["row"], change["caption"]) for change in changes
    )
    saved = SemanticProjection.from_state_dict(load_file(tmp_path / "out" / "projection.safetensors"))
    assert saved.num_texts == 2  # 0.4 of 5 captions
    with safe_open(tmp_path / "out" / "projection.safetensors", "pt") as file:
        first = file.metadata()
    assert set(first) == {"corpus_sha256", "model_sha256"}
    SaAet(**QUICK, **WORDS, corpus_fraction=0.8, save_to=tmp_path / "other").attack(model, data, Run())
    with safe_open(tmp_path / "other" / "projection.safetensors", "pt") as file:
        other = file.metadata()
    assert first["model_sha256"] == other["model_sha256"]
    assert first["corpus_sha256"] != other["corpus_sha256"]


def test_the_report_explains_rho_1_and_warns_where_texts_share_no_direction(model):
    class Unrelated(type(model)):
        """Every text has a direction of its own."""

        def encode_text(self, texts):
            draws = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
            return torch.stack([torch.randn(48, generator=draw) for draw in draws])

    unrelated = copy.deepcopy(model)
    unrelated.__class__ = Unrelated
    for encoder, low in ((model, False), (unrelated, True)):
        warned = []
        run = Run(on_warning=warned.append)
        data = digit_pairs(12)
        SaAet(**QUICK, text=False, corpus_fraction=1.0).attack(encoder, data, run)
        (report,) = run.reports
        corpus = torch.stack([encoder.encode_text(texts)[0] for texts in data["captions"]]).double()
        values = torch.linalg.svdvals(torch.nn.functional.normalize(corpus, dim=1))
        rho_1 = float(values[0] ** 2 / (values**2).sum())
        assert (rho_1 < 0.3) == low
        assert report.value("rho_1") == pytest.approx(rho_1, abs=1e-4)
        assert any(f"rho_1 = {rho_1:.2f}" in note for note in report.notes)
        assert any("the texts share no direction" in text for text in warned) == low


def test_captions_without_a_word_to_attack_are_counted_and_passed_through(model):
    data = digit_pairs(3).remove_columns("captions").add_column("captions", [["a the of"], ["!!!"], ["a photo of it"]])
    run = Run()
    changed = BertAttack(generator="synonyms", synonyms={"photo": ("image",)}).attack(model, data, run)
    assert changed["captions"][:2] == [["a the of"], ["!!!"]]
    assert run.reports[0].value("no word to attack") == 2


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SaAet(), "mlm, token-embedding, context-counts, synonyms"),
        (lambda: SaAet(generator="bert"), "allowed is mlm, "),
        (lambda: SaAet(generator="mlm"), "needs language_model"),
        (lambda: SaAet(generator="synonyms"), "synonyms"),
        (lambda: SaAet(generator="context-counts", synonyms={"a": ("b",)}), "set generator: synonyms"),
        (lambda: SaAet(text=False, ratios=(0, 0, 0)), "ratios"),
        (lambda: SaAet(text=False, projection_rank=3), "top_k"),
        (lambda: SaAet(text=False, epsilon=2), "epsilon is 2"),
        (lambda: Pgd(epsilon=0.003), "below one 8-bit level"),
        (lambda: SaAet(text=False, step_size=0), "step_size"),
        (lambda: SaAet(text=False, scales=(0.5, 0)), "scales"),
        (lambda: BertAttack(text=False), "attacks nothing but captions"),
        (lambda: Pgd(save_to=Path(__file__)), "save_to is .*, which is a file; name a folder"),
        (lambda: Pgd(save_to=Path(__file__) / "out"), "save_to is .*/out', but .*test_attacks.py is a file"),
    ],
)
def test_wrong_fields(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("attack", "sentence"),
    [
        (SaAet(text=False, scales=(0.1,)), "scale 0.1 leaves nothing"),
        (SaAet(text=False, corpus_fraction=0.1), "needs at least 2"),
        (SaAet(text=False, projection="top_k", projection_rank=49), "49"),
        (SaAet(generator="mlm", language_model="/nowhere/bert"), "/nowhere/bert"),
        (SaAet(generator="synonyms", synonyms_file="/nowhere.yaml"), "/nowhere.yaml"),
        (SaAet(generator="nowhere:Words"), "nowhere:Words"),
        (SaAet(text=False, corpus="/nowhere.txt"), "/nowhere.txt"),
    ],
)
def test_refused_before_the_work_starts(attack, sentence, model):
    run = Run(on_progress=lambda *_: pytest.fail("the attack has begun"))
    with pytest.raises(ValueError, match=sentence):
        attack.attack(model, digit_pairs(12), run)


def test_a_budget_below_one_level_is_allowed_without_rounding(model):
    data = digit_pairs(4)
    changed = SaAet(**QUICK, text=False, projection="none", epsilon=0.003, quantize="none").attack(model, data, Run())
    clean = torch.from_numpy(pixels(data)).permute(0, 3, 1, 2) / 255
    assert 0 < (changed.with_format("torch")["pixels"][:] - clean).abs().max() <= 0.003 + 1e-6


@pytest.fixture
def own_words(tmp_path, monkeypatch):
    """The current folder, with classes that propose words, or fail to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_words.py").write_text("""
class Fillers:
    def propose(self, words, index, k):
        return [("thing", 1.0), ("other thing", 2.0)][:k]

class Pairs(Fillers):
    allow_multiword = True
    def propose(self, words, index, k):
        return [("some thing", 1.0)]

class Bare:
    def propose(self, words, index, k):
        return ["thing"]

class Mute:
    pass

class Needy:
    def __init__(self, table):
        self.table = table

    def propose(self, words, index, k):
        return []

TABLE = {}
""")
    (tmp_path / "broken.py").write_text("class Words\n")
    return tmp_path


@pytest.mark.parametrize("place", ["own_words", "own_words.py", "./own_words.py"])
def test_any_generator_by_name(place, model, own_words):
    run = Run()
    changed = BertAttack(generator=f"{place}:Fillers").attack(model, digit_pairs(6), run)
    words = [text.split() for texts in changed["captions"] for text in texts]
    assert any("thing" in text for text in words)
    assert not any("other" in text for text in words)
    assert any("several words were dropped" in note for note in run.reports[0].notes)


def test_a_generator_of_ones_own_may_propose_several_words(model, own_words):
    def changed(**options):
        data = BertAttack(generator="own_words.py:Pairs", **options).attack(model, digit_pairs(6), Run())
        return any("some thing" in text for texts in data["captions"] for text in texts)

    assert changed()
    assert changed(allow_multiword=True)
    assert not changed(allow_multiword=False)


@pytest.mark.parametrize(
    ("generator", "sentence"),
    [
        ("nowhere.py:Words", r"'nowhere.py:Words' cannot be imported: .*nowhere.py"),
        ("nowhere:Words", r"'nowhere:Words' cannot be imported: .*No module named 'nowhere'"),
        ("broken.py:Words", r"'broken.py:Words' cannot be imported: SyntaxError"),
        ("own_words.py:Words", "there is no 'Words' in own_words.py"),
        ("own_words.py:TABLE", r"TABLE' is not a class with a method propose"),
        ("own_words.py:Mute", r"Mute' is not a class with a method propose\(words, index, k\)"),
        ("own_words.py:Needy", r"cannot be made without arguments \(TypeError: .*'table'"),
        ("own_words.py:Bare", r"Bare.propose returned \['thing'\] for '\w+'; it has to return a list of pairs"),
    ],
)
def test_generators_that_cannot_be_used_are_refused(generator, sentence, model, own_words):
    with pytest.raises(ValueError, match=sentence):
        BertAttack(generator=generator).attack(model, digit_pairs(6), Run())


@pytest.mark.parametrize("generator", ["token-embedding", "context-counts"])
def test_generators_without_a_source(generator, model):
    data = digit_pairs(40)
    run = Run()
    changed = BertAttack(generator=generator).attack(model, data, run)
    pairs = [(a[0].split(), b[0].split()) for a, b in zip(data["captions"], changed["captions"], strict=True)]
    swaps = [[(old, new) for old, new in zip(a, b, strict=True) if old != new] for a, b in pairs]
    assert max(map(len, swaps)) == 1
    assert sum(map(len, swaps)) == run.reports[0].value("changed") > 20
    assert not any({old, new} & STOP_WORDS for words in swaps for old, new in words)
    if generator == "context-counts":  # only words of the captions themselves
        known = {word for a, _ in pairs for word in a}
        assert all(new in known for words in swaps for _, new in words)


def test_a_changed_generator_makes_another_attack(model, own_words):
    run, data = Run(), digit_pairs(6)

    def attacked():
        return str(BertAttack(generator="own_words.py:Fillers").attack(model, data, run)["captions"][:])

    assert "thing" in attacked()
    file = own_words / "own_words.py"
    file.write_text(file.read_text().replace("thing", "stuff"))
    assert "stuff" in attacked()
    assert "thing" not in attacked()


@pytest.mark.parametrize(
    ("attack", "sentences"),
    [
        (SaAet(text=False, projection="none"), []),
        (SaAet(**WORDS), []),
        (Dra(**WORDS, corpus_fraction=0.5), ["projection is none, so corpus_fraction has no effect"]),
        (
            SaAet(**WORDS, text=False, projection="span", text_budget=2),
            ["text is false, so generator, synonyms, text_budget have no effect"],
        ),
        (
            SaAet(**WORDS, corpus_fraction=1.0, rank_tol=1e-3, logit_threshold=0.5, bpe_max=3),
            [
                "generator is synonyms, so logit_threshold, bpe_max have no effect",
                "projection is drop_top, so rank_tol has no effect",
            ],
        ),
        (
            SaAet(text=False, projection="none", triangle="none", num_samples=3),
            ["triangle is none, so num_samples has no effect"],
        ),
        (
            Sga(generator="token-embedding", allow_multiword=True, scales=(), scale_noise_std=0.1),
            [
                "scales is empty, so scale_noise_std has no effect",
                "generator token-embedding gives single words only, so allow_multiword has no effect",
            ],
        ),
    ],
)
def test_fields_that_change_nothing_are_named(attack, sentences, model):
    warned = []
    attrs.evolve(attack, num_steps=1).attack(model, digit_pairs(12), Run(on_warning=warned.append))
    assert [text for text in warned if "no effect" in text] == sentences


def test_progress_goes_by_batches_and_logs_the_loss(model):
    done, losses = [], {}
    run = Run(
        on_progress=lambda what, count, total: done.append((what, count, total)),
        on_log=lambda values, step: losses.update({step: values}),
    )
    attack = PgdCos(**QUICK)  # batches of 4
    attack.attack(model, digit_pairs(10), run)
    assert done == [("attacking", count, 3) for count in range(1, 4)]
    assert sorted(losses) == [0, 1, 2]
    (curve,) = run.reports[0].curves
    values = [values["loss of the last step, by batch"] for values in losses.values()]
    assert np.mean(values) == pytest.approx(curve.y[-1], abs=1e-6)


def test_old_names_of_fields_are_told_apart():
    for old, new in (("official", "as_released"), ("generator_source", "language_model")):
        with pytest.raises(ConfigurationError, match=f"{old}.*{new}"):
            plait.load("sa-aet", text=False, **{old: "x"})


def test_captions_that_are_cut_are_counted(model, tmp_path):
    """One caption has 30 words, which fit, and one 40."""
    long, fits = " ".join(["photo"] * 40), " ".join(["photo"] * 30)
    data = digit_pairs(3).remove_columns("captions").add_column("captions", [[long], ["a photo"], [fits]])
    (tmp_path / "corpus.txt").write_text(f"{long}\n{fits}\na photo\n")

    def warned_of(method, *data):
        warned = []
        getattr(method, "attack" if len(data) == 1 else "evaluate")(model, *data, Run(on_warning=warned.append))
        return [text for text in warned if "words" in text]

    words = {"generator": "synonyms", "synonyms": {"photo": ("image",)}}
    assert warned_of(BertAttack(**words), data) == [
        "1 of 3 captions have more than 30 words and are returned without the rest"
    ]
    assert warned_of(PgdCos(num_steps=1), data) == ["1 of 3 captions have more than 30 words and are read no further"]
    assert warned_of(Pgd(num_steps=1), data) == []
    from_file = SaAet(num_steps=1, text=False, corpus=tmp_path / "corpus.txt", corpus_fraction=1.0)
    assert warned_of(from_file, data.select([1, 2])) == [
        "1 of 3 captions in corpus.txt are cut to their first 30 words"
    ]
    evaluation = Transfer(top=(3,), candidates=3, num_panels=0)
    assert warned_of(evaluation, data, data) == ["1 of 3 captions have more than 30 words and are compared by these"]
    assert warned_of(attrs.evolve(evaluation, clean_captions=False), data, data) == []


def test_a_transformers_model_reads_a_photograph_by_its_own_processor(photo_clip, photographs):
    """Attacks and retrieval give it the very pixels that its processor makes of a 4:3 photograph."""
    for attack in (PgdCos(num_steps=2), BertAttack(generator="synonyms", synonyms={"photo": ("image",)})):
        attack = attrs.evolve(attack, epsilon=0) if isinstance(attack, PgdCos) else attack
        unmoved = attack.attack(photo_clip, photographs, Run())
        expected = [
            photo_clip.image_input.processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")
            for image in photographs["image"]
        ]
        assert (pixels(unmoved) == np.stack([found["pixel_values"][0].transpose(1, 2, 0) for found in expected])).all()
