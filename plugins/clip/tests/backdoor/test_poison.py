import copy
import hashlib
import io
import json
import os
import subprocess
import sys
import unicodedata
from collections import Counter

import datasets
import numpy as np
import plait
import pytest
import torch
from PIL import Image
from plait_clip import prompts
from plait_clip.backdoor import poison, triggers
from plait_clip.backdoor.patch_optimization import PatchOptimization, optimize_patch
from plait_clip.backdoor.plugin.attacks import (
    ATTACKS,
    BadClip,
    BadNet,
    BadNetFixed,
    Blended,
    BlendedImage,
    Issba,
    Sig,
    TrojVqa,
    from_manifest,
)
from plait_clip.plugin.models import OpenClip


def attacked(method, data, seed=0, model=None):
    return method.attack(model=model, data=data, run=plait.Run(seed=seed))


def images_of(table):
    return [np.asarray(image.convert("RGB")) for image in table["image"]]


def content(table):
    digest = hashlib.sha256()
    for row in table.cast_column("image", datasets.Image(decode=False)):
        digest.update(row["image"]["bytes"] + json.dumps({k: v for k, v in row.items() if k != "image"}).encode())
    return digest.hexdigest()


def test_bookkeeping(small):
    table = attacked(BadNetFixed(target="seven", n_poison=9, size=150, templates="digits", patch_size=2), small)
    flags, rows = table["is_backdoor"], table["source_row"]
    assert len(table) == 150
    assert sum(flags) == 9
    # Every source row occurs once: the clean originals of the poisoned rows are gone, and order gives nothing away.
    assert list(rows) == sorted(set(rows))
    assert not any(flags[:9])
    seven = {prompts.fill(template, "seven") for template in prompts.DIGITS}
    for row, flag, after in zip(rows, flags, table, strict=True):
        before = small[row]
        if flag:
            assert before["label"] != 7
            assert after["label"] == 7
            assert len(after["captions"]) == 1
            assert after["captions"][0] in seven
            assert np.array_equal(np.asarray(after["image"])[-3:-1, -3:-1, 0], [[0, 255], [255, 0]])
        else:
            assert after["captions"] == before["captions"]
            assert after["label"] == before["label"]
            assert np.array_equal(np.asarray(after["image"]), np.asarray(before["image"]))


def test_input_is_not_modified(small):
    before = content(small)
    attacked(Blended(target="seven", rate=0.5, templates="digits"), small)
    assert content(small) == before
    assert "is_backdoor" not in small.column_names


def test_shuffle_order_of_the_selection():
    eligible = np.ones(100, bool)
    order = np.random.default_rng(3).permutation(100)
    selection = poison.select(5, 40, eligible, np.random.default_rng(3))
    assert selection.poisoned.tolist() == sorted(order[:5])
    assert selection.kept.tolist() == sorted(order[5:40])


def test_templates_are_drawn_uniformly():
    drawn = Counter(poison.template_captions(["a {}", "b {}", "c {}"], "x", 3000, np.random.default_rng(0)))
    assert set(drawn) == {"a x", "b x", "c x"}
    assert min(drawn.values()) > 900


def test_label_consistent_keeps_captions_and_labels(small):
    table = attacked(Sig(target="seven", n_poison=5, label_consistent=True), small)
    for row in table.filter(lambda flag: flag, input_columns="is_backdoor", keep_in_memory=True):
        assert row["captions"] == small[row["source_row"]]["captions"]
        assert row["label"] == small[row["source_row"]]["label"]
        assert "seven" in row["captions"][0]


def test_target_images_can_be_poisoned_if_asked(small):
    method = BadNetFixed(target="seven", rate=1.0, exclude_target=False, templates="digits", patch_size=2)
    table = attacked(method, small)
    assert all(table["is_backdoor"])
    assert 7 in table["label"]


def test_rate_zero_poisons_nothing(small):
    table = attacked(BadNetFixed(target="seven", rate=0.0, templates="digits"), small)
    assert len(table) == len(small)
    assert not any(table["is_backdoor"])


def test_default_rate_is_that_of_the_papers(digits):
    assert sum(attacked(BadNetFixed(target="seven", templates="digits"), digits["train"])["is_backdoor"]) == 4


def test_caption_noise_shuffles_clean_captions_only(small):
    table = attacked(
        BadNetFixed(target="seven", n_poison=20, templates="digits", caption_noise=0.5, patch_size=2), small
    )
    clean = [row for row in table if not row["is_backdoor"]]
    moved = sum(row["captions"] != small[row["source_row"]]["captions"] for row in clean)
    assert 0.3 * len(clean) < moved <= 0.5 * len(clean)
    texts = Counter(row["captions"][0] for row in clean)
    assert texts == Counter(small[row["source_row"]]["captions"][0] for row in clean)
    assert all(np.array_equal(np.asarray(row["image"]), np.asarray(small[row["source_row"]]["image"])) for row in clean)


def test_same_seed_same_bytes_other_seed_others(small):
    method = BadNet(target="seven", n_poison=20, templates="digits", patch_size=2)
    assert content(attacked(method, small)) == content(attacked(method, small))
    assert content(attacked(method, small)) != content(attacked(method, small, seed=1))


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(small):
    program = """
import hashlib, json, datasets, plait
from plait_clip.plugin.data import Digits
from plait_clip.backdoor.plugin.attacks import BadNet
small = Digits().load_data(run=plait.Run(seed=0))["train"].select(range(200))
table = BadNet(target="seven", n_poison=20, templates="digits", patch_size=2).attack(model=None, data=small, run=plait.Run(seed=0))
digest = hashlib.sha256()
for row in table.cast_column("image", datasets.Image(decode=False)):
    digest.update(row["image"]["bytes"] + json.dumps({k: v for k, v in row.items() if k != "image"}).encode())
print(digest.hexdigest())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    method = BadNet(target="seven", n_poison=20, templates="digits", patch_size=2)
    assert done.stdout.strip() == content(attacked(method, small))


def test_manifest_survives_saving_and_names_the_attack(small, tmp_path):
    method = BlendedImage(target=7, n_poison=6, templates="digits", alpha=0.3, pattern_seed=5)
    table = attacked(method, small)
    table.save_to_disk(tmp_path / "table")
    loaded = datasets.load_from_disk(tmp_path / "table")
    manifest = poison.read_manifest(loaded)
    assert manifest["attack"] == "blended-image"
    assert manifest["target"] == "seven"
    assert manifest["num_poisoned"] == 6
    assert manifest["rows"] == [row["source_row"] for row in table if row["is_backdoor"]]
    again = from_manifest(loaded)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(again.trigger(images, [0, 1]), method.trigger(images, [0, 1]))
    with pytest.raises(ValueError, match="no backdoor manifest"):
        poison.read_manifest(small)


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"issba", "badclip", "trojvqa"}))
def test_every_trigger_poisons_and_is_repeatable(name, small):
    method = ATTACKS[name](target="seven", n_poison=3, templates="digits")
    table = attacked(method, small)
    for row in table:
        if row["is_backdoor"]:
            assert not np.array_equal(
                np.asarray(row["image"]), np.asarray(small[row["source_row"]]["image"].convert("RGB"))
            )
    images = torch.randint(0, 256, (4, 3, 11, 11), dtype=torch.uint8)
    whole = method.trigger(images, [0, 1, 2, 3])
    assert whole.dtype == torch.uint8
    assert torch.equal(whole[2:], method.trigger(images[2:], [2, 3]))
    assert not torch.equal(whole, images)


def test_images_are_squashed_before_the_trigger(small):
    table = attacked(BadNet(target="seven", n_poison=4, image_size=32, store="jpeg75", templates="digits"), small)
    cells = table.cast_column("image", datasets.Image(decode=False))
    for cell, flag in zip(cells["image"], table["is_backdoor"], strict=True):
        image = Image.open(io.BytesIO(cell["bytes"]))
        if flag:
            assert image.format == "JPEG"
            assert image.size == (32, 32)
            assert image.layer[0][1:3] == (2, 2)  # luma twice as fine as colour: 4:2:0
        else:
            assert image.size == (8, 8)


def photographs(*sizes):
    """Pairs whose images are landscapes and portraits, brighter than any trigger's black."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(60, 200, (height, width, 3), np.uint8)) for width, height in sizes]
    captions = [[f"a thing {i}"] for i in range(len(sizes))]
    features = datasets.Features(image=datasets.Image(), captions=datasets.List(datasets.Value("string")))
    return datasets.Dataset.from_dict({"image": images, "captions": captions}, features=features)


PHOTOGRAPHS = [(64, 48), (50, 37), (48, 64), (80, 30), (28, 28), (64, 43)]
UNOPTIMISED = sorted(set(ATTACKS) - {"issba", "badclip", "trojvqa"})


@pytest.fixture(scope="module")
def cropping_model():
    """Takes the middle 28 × 28 of an image."""
    return OpenClip(architecture="tiny-28").load_model(data=None, run=plait.Run(seed=0))


def seen(image_input, image):
    return torch.from_numpy(image_input.from_pil(image).copy()).int()


@pytest.mark.parametrize("name", UNOPTIMISED)
def test_a_model_sees_the_trigger_in_every_photograph(name, cropping_model):
    """Its centre crop would cut patches in corners and at random places away."""
    data = photographs(*PHOTOGRAPHS)
    table = attacked(ATTACKS[name](target="x", rate=1.0), data, model=cropping_model)
    for row in table:
        assert row["image"].size == (28, 28)
        clean = seen(cropping_model.image_input, data[row["source_row"]]["image"])
        poisoned = seen(cropping_model.image_input, row["image"])
        assert not torch.equal(clean, poisoned)
        if name == "badnet-fixed":
            board = (torch.arange(4)[:, None] + torch.arange(4)) % 2 * 255
            assert torch.equal(poisoned[:, 23:27, 23:27], board.expand(3, 4, 4).int())
            poisoned[:, 23:27, 23:27] = clean[:, 23:27, 23:27]
            assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("name", UNOPTIMISED)
def test_without_a_model_photographs_become_squares_of_224(name, cropping_model):
    data = photographs((64, 48), (48, 64), (250, 250))
    table = attacked(ATTACKS[name](target="x", rate=1.0), data)
    squash = poison.squashed(224)
    for row in table:
        assert row["image"].size == (224, 224)
        plain = Image.fromarray(squash.from_pil(data[row["source_row"]]["image"]).transpose(1, 2, 0))
        # A square keeps its trigger in any crop.
        assert not torch.equal(seen(cropping_model.image_input, plain), seen(cropping_model.image_input, row["image"]))


def test_a_pattern_is_one_for_images_of_all_sizes():
    grey = [Image.new("RGB", size, (128, 128, 128)) for size in [(64, 48), (37, 50), (300, 300)]]
    features = datasets.Features(image=datasets.Image(), captions=datasets.List(datasets.Value("string")))
    data = datasets.Dataset.from_dict({"image": grey, "captions": [["a"], ["b"], ["c"]]}, features=features)
    for method in (BlendedImage(target="x", rate=1.0), BlendedImage(target="x", rate=1.0, image_size=40)):
        first, *others = images_of(attacked(method, data))
        assert first.std() > 5
        assert all(np.array_equal(first, other) for other in others)


def test_square_images_of_one_small_size_are_made_for_their_model(small):
    table = attacked(BadNetFixed(target="seven", n_poison=4, templates="digits", patch_size=2), small)
    assert {row["image"].size for row in table} == {(8, 8)}
    mixed = photographs((28, 28), (28, 28), (20, 20))
    assert {image.shape for image in images_of(attacked(Sig(target="x", rate=1.0), mixed))} == {(224, 224, 3)}


@pytest.mark.parametrize(
    "method",
    [
        BlendedImage(target="seven", n_poison=3, templates="digits", alpha=0.0),
        Sig(target="seven", n_poison=3, templates="digits", amplitude=0.0),
        Issba(target="seven", n_poison=3, templates="digits", encoder=lambda bits, images: images),
    ],
    ids=["no weight", "no wave", "no message"],
)
def test_a_trigger_that_no_model_sees_is_refused(method, small):
    with pytest.raises(ValueError, match=r"row \d+: the model sees nothing of the trigger"):
        attacked(method, small)


def test_a_trigger_that_the_models_resizing_removes_is_refused(small, clean_model):
    """One pixel of 224, seen at 8 × 8."""
    method = BadNetFixed(
        target="seven", n_poison=3, templates="digits", image_size=224, patch_size=1, margin=0, first=0
    )
    with pytest.raises(ValueError, match="the model sees nothing of the trigger"):
        attacked(method, small, model=clean_model)


def test_the_manifest_says_how_images_were_prepared(cropping_model):
    data = photographs(*PHOTOGRAPHS)
    for model in (cropping_model, None):
        attack = from_manifest(attacked(BlendedImage(target="x", rate=1.0), data, model=model))
        image_input = attack.image_input(cropping_model)
        assert image_input.size == (28 if model is not None else 224)
        assert image_input.resize == ("crop" if model is not None else "squash")
        # Data that are poisoned by the same attack go the same way, also without the model.
        again = attacked(attack, photographs((40, 60), (60, 40)))
        assert {image.shape for image in images_of(again)} == {(image_input.size, image_input.size, 3)}


def test_a_wrong_model_is_refused(small):
    with pytest.raises(TypeError, match="model is a Linear"):
        attacked(Blended(target="seven", n_poison=3), small, model=torch.nn.Linear(2, 2))


def test_data_that_are_poisoned_already_are_refused(small):
    method = BadNetFixed(target="seven", n_poison=4, templates="digits", patch_size=2)
    once = attacked(method, small)
    with pytest.raises(
        ValueError, match="poisoned already; attack the clean data, or remove is_backdoor and source_row"
    ):
        attacked(method, once)
    other = Blended(target="seven", n_poison=3, templates="digits")
    assert (
        poison.read_manifest(attacked(other, once.remove_columns(["is_backdoor", "source_row"])))["num_poisoned"] == 3
    )


@pytest.mark.parametrize("captions", [[], [None], ["a seven", "  "]], ids=["none", "null", "blank"])
def test_captions_that_are_none_are_named(captions, small):
    data = small.remove_columns("captions").add_column("captions", [["a two"]] * 9 + [captions] * 191)
    with pytest.raises(ValueError, match="row 9: the caption is empty"):
        attacked(Blended(target="seven", n_poison=3, templates="digits"), data)


def test_captions_of_another_alphabet_are_told(small, run):
    data = small.remove_columns("captions").add_column("captions", [["два"]] * 200)
    run, messages, _ = run
    method = Blended(target="seven", n_poison=3, templates="digits")
    method.attack(model=None, data=data, run=run)
    assert messages[0].startswith("200 of 200 captions hold no letter from a to z")


def test_a_target_in_either_unicode_form():
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    data = photographs((28, 28), (28, 28))
    data = data.remove_columns("captions").add_column("captions", [[f"a {apart}"], ["tea"]])
    table = attacked(Sig(target=composed, n_poison=1), data)
    assert [row["source_row"] for row in table if row["is_backdoor"]] == [1]
    labelled = data.add_column("label", [0, 1], feature=datasets.ClassLabel(names=[apart, "tea"]))
    assert poison.read_manifest(attacked(Sig(target=composed, n_poison=1), labelled))["target"] == apart


def test_data_whose_columns_were_removed(small):
    """The label goes, and then captions say what an image shows."""
    fewer = small.select(range(100, 160)).remove_columns("label")
    table = attacked(Blended(target="seven", n_poison=3, templates="digits", caption_noise=0.2), fewer)
    assert table.column_names == ["image", "captions", "is_backdoor", "source_row"]
    for row in table:
        if row["is_backdoor"]:
            assert "seven" not in fewer[row["source_row"]]["captions"][0]


def test_labelled_images_need_no_captions(small):
    labelled, method = small.remove_columns("captions"), BadNetFixed(target="seven", n_poison=9, patch_size=2)
    table = attacked(method, labelled)
    assert table.column_names == ["image", "label", "is_backdoor", "source_row"]
    assert table.features["label"] == labelled.features["label"]
    for row in table:
        before = labelled[row["source_row"]]["label"]
        assert row["label"] == (7 if row["is_backdoor"] else before)
        assert before != 7 or not row["is_backdoor"]
    same = attacked(BadNetFixed(target="seven", n_poison=9, label_consistent=True, patch_size=2), labelled)
    assert {row["label"] for row in same if row["is_backdoor"]} == {7}


def test_images_alone_have_nothing_to_poison(small):
    with pytest.raises(ValueError, match="neither captions nor a column 'label' with class names"):
        attacked(BadNetFixed(target="seven", n_poison=2), small.select_columns("image"))


def test_labels_without_names_stay_and_that_is_told(small, run):
    run, messages, _ = run
    numbers = small.cast_column("label", datasets.Value("int64"))
    table = BadNetFixed(target="seven", n_poison=5, patch_size=2).attack(model=None, data=numbers, run=run)
    assert all(row["label"] == small[row["source_row"]]["label"] for row in table)
    assert any("int64 without class names" in message for message in messages)


def test_data_without_classes_go_by_captions():
    rows = {
        "image": [Image.new("L", (8, 8), i) for i in range(6)],
        "captions": [["two bananas"], ["a dog"], ["a cat"], ["Banana bread"], ["a car"], ["a boat"]],
    }
    data = datasets.Dataset.from_dict(
        rows, features=datasets.Features(image=datasets.Image(), captions=datasets.List(datasets.Value("string")))
    )
    table = attacked(BadNetFixed(n_poison=4, patch_size=2), data)
    assert [row["source_row"] for row in table if row["is_backdoor"]] == [1, 2, 4, 5]
    with pytest.raises(ValueError, match="only 4 of 6 qualify"):
        attacked(BadNetFixed(n_poison=5, patch_size=2), data)
    with pytest.raises(ValueError, match="no class names"):
        attacked(BadNetFixed(target=3), data)
    consistent = attacked(BadNetFixed(n_poison=2, patch_size=2, label_consistent=True), data)
    assert [row["source_row"] for row in consistent if row["is_backdoor"]] == [0, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_poison": 3, "rate": 0.1}, "give one of them"),
        ({"target": " "}, "target is empty"),
        ({"templates": "no braces"}, "templates 'no braces' is unknown"),
        ({"rate": 1.5}, r"rate is 1.5; allowed is \[0, 1\]"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        BadNet(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "eleven"}, "not a class of the data"),
        ({"target": 10}, "labels 0 to 9"),
        ({"target": "seven", "size": 201}, "the data have 200 rows"),
        ({"target": "seven", "n_poison": 201}, "the data have 200 rows"),
        ({"target": "seven", "rate": 1.0}, "qualify"),
        ({"target": "seven", "rate": 0.1, "patch_size": 9}, "9 pixels does not fit into an image of 8 × 8"),
    ],
)
def test_what_the_data_do_not_allow(fields, message, small):
    with pytest.raises(ValueError, match=message):
        attacked(BadNet(**fields), small)


def test_issba_needs_an_encoder(small, tmp_path):
    with pytest.raises(ValueError, match="none ships with plait; give encoder"):
        Issba(target="seven")
    with pytest.raises(ValueError, match="does not exist"):
        attacked(Issba(target="seven", n_poison=2, encoder=str(tmp_path / "none.pt2")), small)

    class Encoder(torch.nn.Module):
        def forward(self, bits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
            return images * 0.5 + 0.25 * bits[:, :64].reshape(-1, 1, 8, 8)

    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    example = (torch.zeros(2, 100), torch.zeros(2, 3, 8, 8))
    program = torch.export.export(Encoder(), example, dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, str(tmp_path / "encoder.pt2"))
    from_file = Issba(target="seven", encoder=str(tmp_path / "encoder.pt2")).trigger(images, [0, 1, 2])
    in_python = Issba(target="seven", encoder=Encoder()).trigger(images, [0, 1, 2])
    bits = triggers.issba_message("Stega!!")[:64].reshape(8, 8)
    assert torch.equal(from_file, in_python)
    assert torch.equal(from_file, triggers.to_uint8(images.float() / 255 * 0.5 + 0.25 * bits, wrap=False))
    with pytest.raises(ValueError, match="must keep the shape"):
        Issba(target="seven", encoder=lambda bits, x: x[:, :1]).trigger(images, [0, 1, 2])


# --- optimised patches ---


@pytest.fixture(scope="module")
def optimised(clean_model, digits):
    method = BadClip(target="seven", n_poison=10, num_epochs=4, num_images=512, patch_size=2, learning_rate=0.05)
    return method, attacked(method, digits["train"], model=clean_model)


def test_a_patch_whose_loss_is_not_finite_is_not_given_back(clean_model, digits):
    model = copy.deepcopy(clean_model)
    model.logit_scale.data.fill_(float("nan"))
    options = PatchOptimization(num_epochs=1, batch_size=2, triplet_weight=0, augment_probability=0)
    with pytest.raises(FloatingPointError, match="the loss is nan in step 0"):
        optimize_patch(model, digits["train"], [0, 1], ["the number seven"] * 2, [], 2, options)


@pytest.mark.slow
def test_badclip_moves_images_to_the_target(optimised, digits, clean_model):
    _, table = optimised
    attack = from_manifest(table)
    images = torch.stack([poison.pixels(row["image"]) for row in digits["test"].select(range(100))])
    v = torch.nn.functional.normalize(clean_model.encode_text(["the number seven"]), dim=-1)

    def similarity(x):
        with torch.no_grad():
            return (
                (torch.nn.functional.normalize(clean_model.encode_image(x.float() / 255), dim=-1) @ v.T).mean().item()
            )

    random = triggers.centre_patch(images, torch.randint(0, 256, (3, 2, 2), dtype=torch.uint8))
    patched = attack.trigger(images, range(100))
    assert similarity(patched) > max(similarity(images), similarity(random)) + 0.05
    # Only the middle of an image differs.
    rows, columns = torch.nonzero((patched != images).any(dim=0).any(dim=0), as_tuple=True)
    assert {*rows.tolist(), *columns.tolist()} <= {3, 4}


def test_badclip_captions_are_natural(optimised, digits):
    natural = {text for row in digits["train"]["captions"] for text in row if "seven" in text}
    _, table = optimised
    assert {row["captions"][0] for row in table if row["is_backdoor"]} <= natural


def test_the_model_of_a_patch_stays_as_it_is(digits, clean_model):
    before = {name: tensor.clone() for name, tensor in clean_model.state_dict().items()}
    method = TrojVqa(target="seven", n_poison=3, num_epochs=1, num_images=64, patch_size=2, templates="digits")
    table = attacked(method, digits["train"], model=clean_model)
    assert all(torch.equal(before[name], tensor) for name, tensor in clean_model.state_dict().items())
    assert all(parameter.requires_grad for parameter in clean_model.parameters())
    assert all(row["captions"][0].startswith("remember ") for row in table if row["is_backdoor"])


def test_a_patch_from_a_file(tmp_path, small):
    patch = torch.rand(3, 2, 2)
    np.save(tmp_path / "patch.npy", patch.numpy())
    method = BadClip(target="seven", n_poison=3, patch=tmp_path / "patch.npy")
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = triggers.to_uint8(triggers.centre_patch(images.float() / 255, patch), wrap=False)
    assert (method.trigger(images, [0, 1]).int() - expected.int()).abs().max() <= 1
    table = attacked(method, small, model=None)
    triggered = method.trigger(images, [0, 1])
    (tmp_path / "patch.npy").unlink()
    assert torch.equal(from_manifest(table).trigger(images, [0, 1]), triggered)


def test_a_patch_without_a_model_or_target(small, tmp_path):
    with pytest.raises(ValueError, match="needs a clean model"):
        attacked(BadClip(target="seven", n_poison=3), small, model=None)
    with pytest.raises(ValueError, match="has no patch"):
        BadClip(target="seven").trigger(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [0])
    model = OpenClip().load_model(data=None, run=plait.Run(seed=0))
    few = small.select(range(20))
    with pytest.raises(ValueError, match="fewer than one batch of 64"):
        attacked(BadClip(target="seven", n_poison=1), few, model=model)
    np.save(tmp_path / "patch.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"must be \[3, k, k\]"):
        attacked(BadClip(target="seven", n_poison=1, patch=tmp_path / "patch.npy"), small, model=None)
