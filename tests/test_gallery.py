"""Every entry of the gallery is whole: a pipeline, its figures on record, a table and a picture made from them."""

import hashlib
from pathlib import Path

import pytest
from PIL import Image
from plait.pipeline import load_pipeline
from plait.recording import read_record

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gallery.md"
PIPELINES = sorted(ROOT.glob("pipelines/gallery-*.yaml"))

pytestmark = pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda path: path.stem)


def record_of(pipeline):
    return ROOT / "figures" / f"{pipeline.stem}.csv"


def test_an_entry_has_a_pipeline_that_says_how_long_it_takes(pipeline):
    head = [line for line in pipeline.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("minutes" in line and "core" in line for line in head)
    load_pipeline(pipeline)


def test_its_figures_are_of_three_seeds_or_more_and_of_this_pipeline(pipeline):
    record = read_record(record_of(pipeline))
    assert record.command == [f"pipelines/{pipeline.name}"]
    assert all(len(figure.seeds) >= 3 for figure in record.figures)


def test_its_table_is_made_from_its_record(pipeline):
    assert f"<!-- figures: figures/{pipeline.stem}.csv -->\n\n|" in PAGE.read_text(encoding="utf-8")


def test_its_picture_is_drawn_from_its_record(pipeline):
    picture = ROOT / "docs" / f"{pipeline.stem}.png"
    assert f"({picture.name})" in PAGE.read_text(encoding="utf-8")
    with Image.open(picture) as image:
        assert image.text["Record"] == hashlib.sha256(record_of(pipeline).read_bytes()).hexdigest()
    assert picture.stat().st_size < 200_000
