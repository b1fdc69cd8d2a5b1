"""Feature sets: whatever is written comes back, lazily, in bounded memory; what differs is never mixed."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plait import Run, codecs
from plait.fields import field
from plait_diffusion import (
    FeatureSet,
    FeatureWriter,
    Origin,
    append,
    image_tensors,
    join,
    open_features,
    save_features,
    write_features,
)

ORIGIN = Origin(model="toy", timestep=50, scheduler={"beta_start": 0.00085}, prompt="a photo", seed=0)


def rows(count: int, first: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"name": [f"n{first + i}" for i in range(count)], "label": [(first + i) % 3 for i in range(count)]}
    )


def tensors(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "late": torch.randn(count, 3, 4, 4, generator=generator),
        "early": torch.randn(count, 5, 2, 2, generator=generator).half(),
    }


def written(folder: Path, count: int = 10, batch: int = 3, **options: object) -> FeatureSet:
    values = tensors(count)
    writer = FeatureWriter(folder, rows(count), ORIGIN, **options)  # type: ignore[arg-type]
    for start in range(0, count, batch):
        writer.add({name: value[start : start + batch] for name, value in values.items()})
    return writer.finish()


@attrs.frozen(kw_only=True)
class Doubling:
    """A method that has one field."""

    factor: float = field(2.0, "what rows are multiplied by")


def row_numbers(start: int, batch: datasets.Dataset) -> dict[str, torch.Tensor]:
    numbers = torch.arange(start, start + len(batch)).float()
    return {"map": numbers[:, None, None, None].expand(-1, 2, 3, 3).contiguous()}


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 12),
    batch=st.integers(1, 5),
    shard=st.integers(1, 2000),
    wanted=st.lists(st.integers(0, 11), min_size=1, max_size=8),
)
def test_what_is_written_is_read_whatever_the_shards(tmp_path_factory, count, batch, shard, wanted):
    features = written(tmp_path_factory.mktemp("set"), count, batch, shard_bytes=shard)
    expected = tensors(count)
    wanted = [row % count for row in wanted]
    read = features.read(rows=wanted)
    assert list(read) == ["late", "early"] == list(features.names)
    for name, value in expected.items():
        assert torch.equal(read[name], value[wanted])
        assert torch.equal(torch.cat([part[name] for part in features.batches(4)]), value)


def test_a_saved_set_equals_the_set_and_links_to_its_shards(tmp_path):
    features = written(tmp_path / "a", shard_bytes=500)
    codecs.save(features, tmp_path / "b")
    again = codecs.load(tmp_path / "b")
    assert again == features
    assert again.fingerprint() != features.select([0, 1]).fingerprint()
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_nlink == 2 for file in files), "a copy was made"
    assert json.loads((tmp_path / "b" / "content" / "features.json").read_text())["origins"][0]["timestep"] == 50


def test_opening_reads_no_values(tmp_path):
    save_features(written(tmp_path / "a"), tmp_path / "b")
    again = open_features(tmp_path / "b")
    for file in (tmp_path / "b").glob("*.safetensors"):
        file.unlink()
    assert [activation.shape for activation in again.activations] == [(3, 4, 4), (5, 2, 2)]
    assert again.at(4).concat().activations[0].shape == (8, 4, 4)
    with pytest.raises(FileNotFoundError):
        again.read(rows=[0])


def test_views(tmp_path):
    features, values = written(tmp_path / "a"), tensors(10)
    both = features.at(4).concat()
    resized = torch.nn.functional.interpolate(values["early"].float(), (4, 4), mode="bilinear", align_corners=False)
    assert torch.equal(both.read()["concat"], torch.cat([values["late"], resized], 1))
    assert torch.equal(
        features.only("early").at((2, 4), "nearest").read()["early"][..., 0], values["early"].float()[..., 0]
    )
    halved = features.only("late").at(2, "area").read()["late"]
    assert torch.allclose(halved[:, :, 0, 0], values["late"][:, :, :2, :2].mean((2, 3)))
    pooled = features.pooled().concat("all")
    assert pooled.activations[0].shape == (8,)
    assert torch.allclose(pooled.read()["all"][:, :3], values["late"].mean((2, 3)), atol=1e-6)
    assert torch.equal(features.select([7, 2]).read()["late"], values["late"][[7, 2]])
    assert features.select(slice(8, None)).rows["name"] == ["n8", "n9"]
    with pytest.raises(ValueError, match=r"different sides .*bring them to one with at"):
        features.concat()
    with pytest.raises(ValueError, match="pooled and has no side"):
        features.pooled().at(2)
    with pytest.raises(ValueError, match=r"no activation 'erly' .did you mean 'early'"):
        features.only("erly")


def test_a_view_can_be_saved(tmp_path):
    view = written(tmp_path / "a").select([3, 1]).at(4).concat()
    save_features(view, tmp_path / "b")
    assert open_features(tmp_path / "b") == view


def test_token_for_token_hand_example():
    features = FeatureSet.of_tensors(rows(1), {"v": torch.arange(16.0).reshape(1, 1, 4, 4)}, ORIGIN)
    assert features.at(2, "area").read()["v"].tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"timestep": 100}, "timestep is 50 in one and 100 in the other"),
        ({"prompt": None}, "prompt is 'a photo' in one and None in the other"),
        ({"scheduler": {"beta_start": 0.1}}, "beta_start of scheduler is 0.00085 in one and 0.1 in the other"),
        ({"more": {"image_size": 64}}, "image_size is None in one and 64 in the other"),
        ({"dtype": "float16"}, "dtype is 'float32' in one and 'float16'"),
        ({"revision": "abc"}, "revision is None in one and 'abc'"),
        ({"seed": 1}, "seed is 0 in one and 1"),
    ],
)
def test_what_differs_is_not_mixed(change, sentence):
    one = FeatureSet.of_tensors(rows(2), tensors(2), ORIGIN)
    other = FeatureSet.of_tensors(rows(2), tensors(2), attrs.evolve(ORIGIN, **change))
    with pytest.raises(ValueError, match=sentence):
        append(one, other)


def test_other_names_and_shapes_are_not_mixed():
    one = FeatureSet.of_tensors(rows(2), tensors(2), ORIGIN)
    with pytest.raises(ValueError, match="early is missing"):
        append(one, one.only("late"))
    with pytest.raises(ValueError, match="the order of the activations"):
        append(one, one.only("early", "late"))
    with pytest.raises(ValueError, match=r"shape \[3, 4, 4\] in one and \[3, 2, 2\]"):
        append(one.only("late"), one.only("late").at(2))


def test_rows_after_rows(tmp_path):
    one, other = (
        FeatureSet.of_tensors(rows(3), tensors(3), ORIGIN),
        FeatureSet.of_tensors(rows(2, 3), tensors(2, 1), ORIGIN),
    )
    both = append(one, other)
    assert both.rows["name"] == [f"n{i}" for i in range(5)]
    assert torch.equal(both.read(rows=[4, 0])["late"], torch.stack([tensors(2, 1)["late"][1], tensors(3)["late"][0]]))
    save_features(both, tmp_path / "b")
    assert open_features(tmp_path / "b") == both


def test_activations_beside_each_other_keep_their_origins(tmp_path):
    one = written(tmp_path / "a")
    other = FeatureSet.of_tensors(rows(10), {"out": torch.ones(10, 2, 4, 4)}, Origin(model="dino"))
    both = join({"sd": one, "dino": other})
    assert both.names == ("sd/late", "sd/early", "dino/out")
    assert [origin.model for origin in both.origins] == ["toy", "dino"]
    codecs.save(both, tmp_path / "b")
    again = codecs.load(tmp_path / "b")
    assert again == both
    twice = join({"sd": both, "sd/late": one})
    assert torch.equal(twice.read(["sd/late/late"])["sd/late/late"], tensors(10)["late"])
    with pytest.raises(ValueError, match="not of the same rows"):
        join({"a": one, "b": other.select(range(9, -1, -1))})


def test_writing_goes_on_after_a_kill(tmp_path):
    class Kill(BaseException):
        pass

    seen: list[int] = []

    def compute(start: int, batch: datasets.Dataset) -> dict[str, torch.Tensor]:
        seen.append(start)
        return {"map": row_numbers(start, batch)["map"]}

    def interrupted(start: int, batch: datasets.Dataset) -> dict[str, torch.Tensor]:
        if start >= 4:
            raise Kill
        return compute(start, batch)

    run = Run(folder=tmp_path, step="x")
    with pytest.raises(Kill):
        write_features(run, Doubling(), rows(6), ORIGIN, interrupted, batch_size=2, shard_bytes=1)
    features = write_features(run, Doubling(), rows(6), ORIGIN, compute, batch_size=2, shard_bytes=1)
    assert seen == [0, 2, 4], "rows that were on disk were computed again"
    assert features.read(rows=range(6))["map"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_other_fields_do_not_find_each_other(tmp_path):
    run = Run(folder=tmp_path)
    write_features(run, Doubling(), rows(4), ORIGIN, row_numbers, batch_size=2)
    twice = write_features(
        run, Doubling(factor=4), rows(4), ORIGIN, lambda s, b: {"map": 2 * row_numbers(s, b)["map"]}, batch_size=2
    )
    assert twice.read()["map"][:, 0, 0, 0].tolist() == [0, 2, 4, 6]


def test_bad_features_end_in_a_sentence(tmp_path):
    writer = FeatureWriter(tmp_path / "a", rows(4), ORIGIN, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"'big' has values up to 1e.05, which torch.float16 cannot hold"):
        writer.add({"big": torch.full((1, 1, 2, 2), 1e5)})
    with pytest.raises(FloatingPointError, match="'nan' has NaN or infinite values in rows 0 to 0"):
        writer.add({"nan": torch.full((1, 1, 2, 2), torch.nan)})
    with pytest.raises(ValueError, match="no activation"):
        writer.add({})
    with pytest.raises(ValueError, match=r"shape \[2, 3, 4\]"):
        writer.add({"tokens": torch.zeros(2, 3, 4)})
    with pytest.raises(ValueError, match="int64"):
        writer.add({"map": torch.zeros(2, 1, 1, 1, dtype=torch.int64)})
    writer.add({"map": torch.zeros(2, 1, 3, 3)})
    with pytest.raises(ValueError, match=r"rows from 2 on differ .* \[1, 3, 3\] in one and \[1, 2, 2\]"):
        writer.add({"map": torch.zeros(1, 1, 2, 2)})
    with pytest.raises(ValueError, match="features of 5 rows were given; the data has 4"):
        writer.add({"map": torch.zeros(3, 1, 3, 3)})
    with pytest.raises(ValueError, match="features of 2 rows were written; the data has 4"):
        writer.finish()
    with pytest.raises(ValueError, match="begun with other features: timestep is 50 in one and 100"):
        FeatureWriter(tmp_path / "a", rows(4), attrs.evolve(ORIGIN, timestep=100))
    with pytest.raises(ValueError, match="no rows"):
        write_features(Run(folder=tmp_path), Doubling(), rows(0), ORIGIN, row_numbers, batch_size=1)
    with pytest.raises(ValueError, match="not JSON"):
        Origin(model="x", more={"size": object()})


def test_a_set_that_is_not_whole_is_refused(tmp_path):
    save_features(written(tmp_path / "a", shard_bytes=500), tmp_path / "b")
    lines = (tmp_path / "b" / "shards.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "shards.jsonl").write_text("".join(lines[:-1]) + lines[-1][:10])
    with pytest.raises(ValueError, match="of 9 of 10 rows"):
        open_features(tmp_path / "b")
    (tmp_path / "b" / "features.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a feature set"):
        open_features(tmp_path / "b")


def test_images_become_tensors():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    data = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(pixels), Image.fromarray(255 - pixels)]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    images = image_tensors(data)
    assert images.shape == (2, 3, 4, 6)
    assert torch.equal(images[0], torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)
    assert image_tensors(data, (8, 12)).shape == (2, 3, 8, 12)
    with pytest.raises(ValueError, match="no images in a column 'picture'"):
        image_tensors(data, column="picture")
