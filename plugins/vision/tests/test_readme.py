"""The pipeline on the first screen does what it says, on a folder of images."""

import re
from pathlib import Path

import numpy as np
import plait
import pytest
from PIL import Image

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_pgd_on_my_resnet_with_my_images(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    text = re.search(r"```yaml\n(plait: 1\nname: robustness\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len(text.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLAIT_STORE", str(tmp_path / "store"))
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for name, level in (("cat", 100), ("dog", 150)):
            for number in range(count):
                file = tmp_path / "photos" / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                levels = np.clip(generator.normal(level, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(levels).save(file)
    (tmp_path / "robustness.yaml").write_text(text)
    run = plait.run("robustness.yaml")
    assert not run.failed
    before, after = (run[step].value("accuracy") for step in ("before", "after"))
    assert after <= before
    clean, moved = run["photos"], run["moved"]
    assert moved.features == clean["test"].features
    for one, other in zip(clean["test"]["image"], moved["image"], strict=True):
        change = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
        assert 0 < change.max() <= 8
