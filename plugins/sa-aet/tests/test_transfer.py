"""Attack success rates: by hand, as laws, and of whole data sets."""

import io

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from plait import Run
from plait_clip import ImageInput, digit_pairs, evaluate_retrieval, pixels_from_pil, recall, tiny_model, undecoded
from plait_sa_aet.captions import clean_caption
from plait_sa_aet.plugin.attacks import PgdCos
from plait_sa_aet.plugin.transfer import Transfer
from plait_sa_aet.transfer import Gallery, ResampledGallery, attack_success_rate, geometry, retrieve, top_captions

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "digit", "number")
ranks = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=30)


def test_success_rate_by_hand():
    # right without the attack: 0, 1, 2, 3; with it: 1, 3, 5
    clean, attacked = torch.tensor([0, 0, 0, 0, 7, 4]), torch.tensor([1, 0, 9, 0, 1, 0])
    assert attack_success_rate(clean, attacked, 1) == 50.0
    assert attack_success_rate(clean, clean, 1) == 0.0
    # k = 5: right are 0, 1, 2, 3 and 5, of which 2 is lost
    assert attack_success_rate(clean, attacked, 5) == 20.0


def test_no_right_query_is_an_error_and_no_nan():
    with pytest.raises(ValueError, match="no query is right without the attack at k = 1"):
        attack_success_rate(torch.tensor([3, 1]), torch.tensor([0, 0]), 1)
    with pytest.raises(ValueError, match="k is 0"):
        attack_success_rate(torch.tensor([0]), torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="give as many"):
        attack_success_rate(torch.tensor([0]), torch.tensor([0, 1]), 1)


@given(ranks, st.integers(1, 12))
def test_success_rate_is_a_share_of_the_right_queries(pairs, k):
    clean, attacked = (torch.tensor(column) for column in zip(*pairs, strict=True))
    right = [after for before, after in pairs if before < k]
    if not right:
        with pytest.raises(ValueError, match="no query is right"):
            attack_success_rate(clean, attacked, k)
        return
    rate = attack_success_rate(clean, attacked, k)
    assert rate == pytest.approx(100 * sum(after >= k for after in right) / len(right), abs=0.0051)
    assert attack_success_rate(clean, clean, k) == 0
    # Queries that were wrong anyway change nothing, and the order of queries neither.
    hopeless, fallen = torch.tensor([k, k + 3]), torch.tensor([0, k])
    assert attack_success_rate(torch.cat([clean, hopeless]), torch.cat([attacked, fallen]), k) == rate
    assert attack_success_rate(clean.flip(0), attacked.flip(0), k) == rate
    # Losing one more query raises it by its share.
    kept = ((clean < k) & (attacked < k)).nonzero()
    if len(kept):
        worse = attacked.clone()
        worse[kept[0]] = k
        assert attack_success_rate(clean, worse, k) == pytest.approx(rate + 100 / len(right), abs=0.0101)


@pytest.fixture(scope="module")
def pairs():
    """Ten digits, one of each class, with a clean caption and one that needs cleaning."""
    data = digit_pairs(60)
    rows = [data["label"].index(k) for k in range(10)]
    captions = [[f"A photo of the number {name}!", f"the digit {name}"] for name in WORDS[:10]]
    return data.select(rows).remove_columns("captions").add_column("captions", captions)


@pytest.fixture(scope="module")
def knowing(pairs):
    """Two different models that find each of the ten pairs."""
    return {"a": _taught(pairs, 0), "b": _taught(pairs, 1)}


def _taught(pairs, seed):
    model = tiny_model()
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=draw)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    texts = [f"the digit {word}" for word in WORDS[:10]]
    images = torch.stack([_pixels(image) for image in pairs["image"]])
    for _ in range(60):
        u, w = (F.normalize(f, dim=-1) for f in (model.encode_image(images), model.encode_text(texts)))
        logits = 20 * u @ w.T
        loss = F.cross_entropy(logits, torch.arange(10)) + F.cross_entropy(logits.T, torch.arange(10))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _pixels(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def _with(data, **columns):
    """The data with some columns anew."""
    features = data.features.copy()
    if "pixels" in columns:
        features["pixels"] = datasets.Array3D(np.shape(columns["pixels"])[1:], "float32")
    return datasets.Dataset.from_dict({**undecoded(data).to_dict(), **columns}, features=features)


def _named(pairs, names):
    cells = undecoded(pairs)["image"][:]
    return [{"bytes": cell["bytes"], "path": name} for cell, name in zip(cells, names, strict=True)]


def shifted(pairs, step):
    """The images of other rows under the captions of these."""
    images = undecoded(pairs)["image"][:]
    return _with(pairs, image=images[step:] + images[:step])


@pytest.mark.slow
def test_table_of_sources_and_targets(pairs, knowing):
    data = {"a": shifted(pairs, 1), "b": pairs, "c": shifted(pairs, 3)}
    run = Run()
    report = Transfer(top=(1, 5)).evaluate(knowing, data, pairs, run)
    assert [(row["source"], row["target"], row["setting"]) for row in report.rows] == [
        ("a", "a", "white-box"),
        ("a", "b", "transfer"),
        ("b", "a", "transfer"),
        ("b", "b", "white-box"),
        ("c", "a", "transfer"),
        ("c", "b", "transfer"),
        ("c", "others (mean)", "transfer"),
        ("all", "others (mean)", "transfer"),
    ]
    assert list(report.rows[0])[3:] == ["ASR", "TR ASR@1", "TR ASR@5", "IR ASR@1", "IR ASR@5"]
    # All images exchanged: nothing that was right stays right. None changed: all stays.
    assert report.value("TR ASR@1", source="a", target="b") == 100
    assert report.value("ASR", source="b", target="a") == 0
    for source in data:
        pair = [report.value(f"{task} ASR@1", source=source, target="b") for task in ("TR", "IR")]
        assert report.value("ASR", source=source, target="b") == pytest.approx(sum(pair) / 2)
    of_c = [report.value("IR ASR@1", source="c", target=target) for target in "ab"]
    assert report.value("IR ASR@1", source="c", target="others (mean)") == pytest.approx(sum(of_c) / 2)
    transferred = [row["ASR"] for row in report.rows[:6] if row["setting"] == "transfer"]
    assert report.value("ASR", source="all") == pytest.approx(sum(transferred) / 4)
    (recalls,) = run.reports
    assert [row["target"] for row in recalls.rows] == ["a", "b"]
    alone = evaluate_retrieval(knowing["a"], _with(pairs, captions=_cleaned(pairs)), Run().folder)
    assert recalls.value("TR R@1", target="a") == recall(alone[0], 1)
    assert recalls.value("IR R@5", target="a") == recall(alone[1], 5)


def _cleaned(pairs):
    return [[text.lower().rstrip("!") for text in captions] for captions in pairs["captions"]]


@pytest.mark.slow
def test_a_defender_reads_restored_images_and_wants_low_rates(pairs, knowing):
    data = {"restored": pairs, "b": pairs}
    report = Transfer(top=(1,), reader="defender", num_panels=0).evaluate(knowing, data, pairs, Run())
    assert set(report.better.values()) == {"lower"}
    assert all("setting" not in row for row in report.rows)
    assert [(row["source"], row["target"]) for row in report.rows] == [
        (source, target) for source in data for target in knowing
    ]
    assert all(row["ASR"] == 0 for row in report.rows)
    assert "White-box" not in report.notes[0]
    attacker = Transfer(top=(1,), num_panels=0).evaluate(knowing, data, pairs, Run())
    assert set(attacker.better.values()) == {"higher"}


def test_a_single_model_and_a_single_dataset_have_no_names(pairs, knowing):
    report = Transfer(top=(1,)).evaluate(knowing["a"], shifted(pairs, 1), pairs, Run())
    assert [list(row) for row in report.rows] == [["ASR", "TR ASR@1", "IR ASR@1"]]
    for source, setting in (("b", "transfer"), ("a", "white-box")):
        named = Transfer(top=(1,), source=source).evaluate({"a": knowing["a"]}, shifted(pairs, 1), pairs, Run())
        assert [(row["source"], row["target"], row["setting"]) for row in named.rows] == [(source, "a", setting)]
        assert named.rows[0]["TR ASR@1"] == report.rows[0]["TR ASR@1"]
        assert len(named.panels) == 1


def test_cleaning_of_captions_is_no_attack(pairs, knowing):
    cleaned = _with(pairs, captions=_cleaned(pairs))
    for data, clean_captions, changed in ((cleaned, True, False), (pairs, True, False), (cleaned, False, True)):
        method = Transfer(top=(1,), clean_captions=clean_captions, num_panels=10)
        report = method.evaluate(knowing["a"], data, pairs, Run())
        assert any("→" in row[2].caption for row in report.panels[0].images) == changed
    # What cleaning leaves nothing of stays, as the attacks leave it.
    shouting = _with(pairs, captions=[[text, "!!!"] for text, _ in pairs["captions"]])
    assert Gallery.of(shouting, clean_caption).captions[:2] == ["a photo of the number zero", "!!!"]


def test_float_pixels_stand_for_the_rounded_images(pairs, knowing, tmp_path):
    clean = torch.stack([_pixels(image) for image in pairs["image"]])
    moved = (clean + 0.3 / 255).clamp(0, 1)
    exact = _with(pairs, pixels=moved.numpy())
    model = knowing["a"]
    found = retrieve(model, Gallery.of(exact), tmp_path, batch_size=3)
    with torch.no_grad():
        torch.testing.assert_close(found.images, F.normalize(model.encode_image(moved), dim=-1))
        rounded = F.normalize(model.encode_image(clean), dim=-1)
    assert not torch.allclose(found.images, rounded, atol=1e-6)
    torch.testing.assert_close(retrieve(model, Gallery.of(pairs), tmp_path, batch_size=3).images, rounded)
    # Larger pixels are resized by the model; pictures of them are made at their size.
    large = F.interpolate(moved, scale_factor=2)
    report = Transfer(top=(1,)).evaluate(model, _with(pairs, pixels=large.numpy()), pairs, Run())
    assert report.rows[0]["TR ASR@1"] < 60
    for bad in (torch.nan, 1.01, -0.01):
        wrong = moved.clone()
        wrong[7, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="row 7: pixels lie outside"):
            Transfer().evaluate(model, _with(pairs, pixels=wrong.numpy()), pairs, Run())


def test_batches_do_not_matter_and_nothing_is_changed(pairs, knowing):
    before = {name: value.clone() for name, value in knowing["a"].state_dict().items()}
    knowing["a"].train()
    one, other = (
        Transfer(top=(1, 5), batch_size=size).evaluate(knowing, {"a": shifted(pairs, 2)}, pairs, Run()).rows
        for size in (3, 256)
    )
    assert one == other
    assert knowing["a"].training
    knowing["a"].eval()
    assert all(torch.equal(value, before[name]) for name, value in knowing["a"].state_dict().items())


def test_pictures_show_fooled_images_first(pairs, knowing):
    images = undecoded(pairs)["image"][:]
    images[4], images[7] = images[7], images[4]
    captions = [list(texts) for texts in _cleaned(pairs)]
    captions[4][1] = "the number four"
    attacked = _with(pairs, image=images, captions=captions)
    report = Transfer(top=(1,), num_panels=3).evaluate(knowing, {"a": attacked, "z": attacked}, pairs, Run())
    (panel,) = report.panels
    assert panel.title == "z → a"
    rows = panel.images
    assert len(rows) == 3
    clean, adversarial, difference = rows[0]
    assert clean.caption in (
        "clean; retrieved first: the digit four",
        "clean; retrieved first: a photo of the number four",
    )
    assert adversarial.caption.endswith("seven")
    assert difference.caption == "10 × difference; the [digit → number] four"
    assert rows[1][0].caption.endswith("seven")
    assert not Transfer(num_panels=0).evaluate(knowing["a"], attacked, pairs, Run()).panels


def test_fusion_models_rank_by_match(pairs, blip, tmp_path):
    data = _with(pairs, captions=[[f"number {name}", f"digit {name}"] for name in WORDS[:10]])
    pixels = torch.stack([_pixels(image) for image in data["image"]])
    moved = (1 - pixels).contiguous()  # far away, so that taking ``image`` instead would be seen
    for rows, seen in ((data, pixels), (_with(data, pixels=moved.numpy()), moved)):
        attacked = Gallery.of(rows)
        found = retrieve(blip, attacked, tmp_path, batch_size=4)
        with torch.no_grad():
            scores = torch.stack([blip.match(seen, [text] * 10) for text in attacked.captions], dim=1)
        assert min(scores.std(dim=0).min(), scores.std(dim=1).min()) > 0.01  # images and texts matter
        order = scores.argsort(dim=1, descending=True, stable=True)
        first_own = [next(p for p, t in enumerate(row.tolist()) if t // 2 == i) for i, row in enumerate(order)]
        assert found.text_ranks.tolist() == first_own
        places = scores.T.argsort(dim=1, descending=True, stable=True)
        assert found.image_ranks.tolist() == [row.tolist().index(j // 2) for j, row in enumerate(places)]
        assert top_captions(blip, attacked, found, [3, 5]) == [attacked.captions[int(order[i, 0])] for i in (3, 5)]
    assert not list(tmp_path.iterdir())  # the states of the images are gone
    report = Transfer(top=(20,), candidates=20, batch_size=4).evaluate({"blip": blip}, {"blip": data}, data, Run())
    assert report.rows[0]["TR ASR@20"] == 0


def test_kinds_of_models_do_not_share_a_table(pairs, knowing, blip):
    with pytest.raises(ValueError, match=r"different embedding kinds in one table \(contrastive: a; fusion: blip"):
        Transfer().evaluate({"a": knowing["a"], "blip": blip}, {"a": pairs}, pairs, Run())
    fields = {"mixed_kinds": True, "top": (20,), "candidates": 20}
    report = Transfer(**fields).evaluate({"a": knowing["a"], "blip": blip}, {"a": pairs}, pairs, Run())
    assert [row["target"] for row in report.rows] == ["a", "blip"]


def test_what_resampling_alone_does_is_a_column(pairs, knowing):
    """The attack changes nothing, but gives images back at 3 x 3 pixels."""
    small = [Image.fromarray(pixels_from_pil(image, 3).transpose(1, 2, 0)) for image in pairs["image"]]
    warned = []
    report = Transfer(top=(1,)).evaluate(
        knowing, {"x": _with(pairs, image=small)}, pairs, Run(on_warning=warned.append)
    )
    rows = [row for row in report.rows if row["target"] in knowing]
    assert len(rows) == 2
    for row in rows:
        assert row["resampling alone"] == row["ASR"]
    worst = max(row["ASR"] for row in rows)
    assert worst > 0
    assert len(warned) == 1
    assert f"an ASR of {worst:.2f}" in warned[0]
    assert any("only brought to the size of the attacked ones" in note for note in report.notes)
    assert "resampling alone" not in report.better


def test_exact_pixels_of_another_size_are_compared_with_clean_ones_of_that_size(pairs, knowing):
    floats = np.stack([pixels_from_pil(image, 3) for image in pairs["image"]]).astype(np.float32) / 255
    report = Transfer(top=(1,)).evaluate(knowing["a"], _with(pairs, pixels=floats), pairs, Run())
    assert report.rows[0]["resampling alone"] == report.rows[0]["ASR"] > 0


def test_no_column_of_resampling_where_sizes_agree(pairs, knowing):
    warned = []
    report = Transfer(top=(1,)).evaluate(knowing, {"a": shifted(pairs, 0)}, pairs, Run(on_warning=warned.append))
    assert all("resampling alone" not in row for row in report.rows)
    assert len(report.notes) == 1
    assert not warned


@pytest.mark.parametrize("cut", ["crop", "squash"])
def test_pictures_show_images_as_they_were_attacked(cut, pairs, knowing):
    """Wide images, made square as the attacked model does it, are compared with clean ones made square alike."""
    wide = [image.resize((16, 8)) for image in pairs["image"]]
    draw = np.random.default_rng(0)
    for image in wide:  # sides that a crop cuts off
        image.paste(Image.fromarray(draw.integers(0, 255, (8, 4, 3), np.uint8)), (0, 0))
    clean = _with(pairs, image=wide)
    attacked = _with(
        pairs, image=[Image.fromarray(pixels_from_pil(image, 8, cut).transpose(1, 2, 0)) for image in wide]
    )
    report = Transfer(top=(10,), candidates=10, num_panels=2).evaluate(knowing["a"], attacked, clean, Run())
    for row in report.panels[0].images:
        before, after, difference = (
            np.asarray(Image.open(io.BytesIO(cell.data)).convert("RGB")).astype(int) for cell in row
        )
        assert (before == after).all()
        assert (np.abs(difference - 127.5) <= 1).all()


def test_what_does_not_fit_is_refused(pairs, knowing):
    model = knowing["a"]

    def refused(match, model=model, data=pairs, reference=pairs, **fields):
        with pytest.raises(ValueError, match=match):
            Transfer(**fields).evaluate(model, data, reference, Run())

    refused("data x: it has 9 rows, the reference 10", data={"x": pairs.select(range(9))})
    fewer = [texts[: 1 + (i != 6)] for i, texts in enumerate(pairs["captions"])]
    refused("row 6 has 1 captions, and 2 in the reference", data=_with(pairs, captions=fewer))
    refused("data y: .*no column 'captions'", data={"x": pairs, "y": pairs.remove_columns("captions")})
    refused("reference: .*no column 'image'", reference=pairs.remove_columns("image"))
    refused("reference: .*dict", reference={"test": pairs})
    refused("data: .*no rows", data=pairs.select([]))
    refused("model a is a Linear", model={"a": torch.nn.Linear(2, 2)})
    refused("model is empty", model={})
    refused("source is 'a', but data names", data={"a": pairs}, source="a")
    wrong = shifted(pairs, 1)
    refused("model a: no query is right without the attack at k = 1", model=knowing, data=wrong, reference=wrong)
    named = _with(pairs, image=_named(pairs, [f"folder/{i}.jpg" for i in range(10)]))
    turned = _with(pairs, image=_named(pairs, [f"{9 - i}.png" for i in range(10)]))
    refused("data: row 0 is image 9, and 0 in the reference; give both in one order", data=turned, reference=named)
    assert Transfer(top=(1,)).evaluate(model, _with(named), named, Run()).value("ASR") == 0
    backwards = range(9, -1, -1)
    refused("data: row 0 has label 9, and 0 in the reference; give both in one order", data=pairs.select(backwards))
    bare = pairs.remove_columns("label")
    folders = bare.add_column("file_name", [f"{i % 2}/{i // 2}.jpg" for i in range(10)])
    swapped = folders.remove_columns("file_name").add_column(
        "file_name", [f"{1 - i % 2}/{i // 2}.png" for i in range(10)]
    )
    refused("data: row 0 is image 1/0, and 0/0 in the reference", data=swapped, reference=folders)
    for pixels in (np.zeros((10, 1, 8, 8)), np.zeros((10, 8, 8, 3))):
        refused(r"data: the column 'pixels' holds .*; give floats \[3, H, W\]", data=_with(pairs, pixels=pixels))
    refused("top is empty", top=())
    refused("candidates is 5, which is less than the rank 10", candidates=5)


def test_photographs_reach_a_transformers_model_through_its_own_processor(photo_clip, photographs, tmp_path):
    processor = photo_clip.image_input.processor
    with torch.no_grad():
        seen = processor(images=photographs["image"][:], do_rescale=False, do_normalize=False, return_tensors="pt")
        expected = F.normalize(photo_clip.encode_image(seen["pixel_values"].float() / 255), dim=-1)
    found = retrieve(photo_clip, Gallery.of(photographs), tmp_path)
    torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-5)


def test_what_was_attacked_through_a_processor_is_compared_with_clean_images_through_it(photo_clip, photographs):
    """An attack that changes nothing shows no difference, and what another target sees of it is resampling alone."""
    unmoved = PgdCos(epsilon=0, num_steps=1).attack(photo_clip, photographs, Run())
    report = Transfer(top=(4,), candidates=4).evaluate({"a": photo_clip}, {"a": unmoved}, photographs, Run())
    assert "resampling alone" not in report.rows[0]
    for row in report.panels[0].images:
        before, after, difference = (
            np.asarray(Image.open(io.BytesIO(cell.data)).convert("RGB")).astype(int) for cell in row
        )
        assert (before == after).all()
        assert (np.abs(difference - 127.5) <= 1).all()
    clean, target = Gallery.of(photographs), tiny_model()
    resampled = ResampledGallery(clean.rows, clean.captions, clean.owner, through=photo_clip.image_input)
    (ours,), (theirs,) = (list(gallery.image_batches(target, 4)) for gallery in (resampled, Gallery.of(unmoved)))
    assert torch.equal(ours, theirs)
    assert geometry(photo_clip.image_input) != geometry(ImageInput(10, [0.4] * 3, [0.3] * 3))
