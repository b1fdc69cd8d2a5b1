"""Methods of the tiny world."""

from __future__ import annotations

from typing import Any

import attrs

from plait.demo.models import Classifier, accuracy, images_of, labels_of, make_classifier, train
from plait.demo.pictures import digits
from plait.fields import field, in_range
from plait.hookspecs import hookimpl
from plait.report.model import Report


@attrs.frozen(kw_only=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits as 8×8 images, split into train and test."""

    num_train: int = field(400, "images of split train", in_range(1, 1600))
    num_test: int = field(150, "images of split test", in_range(1, 1600))
    gives = "dataset"
    columns_made = ("image", "name", "label")
    splits = ("train", "test")

    @hookimpl
    def load_data(self, run: Any) -> Any:
        """The first images, in the order in which scikit-learn has them."""
        data = digits(self.num_train + self.num_test)
        return {"train": data.select(range(self.num_train)), "test": data.select(range(self.num_train, len(data)))}


@attrs.frozen(kw_only=True)
class Noise:
    """Gaussian noise on every image."""

    sigma: float = field(0.2, "standard deviation, in [0, 1] units", in_range(0, 1))
    takes = {"data": "dataset"}
    gives = "data"
    columns_needed = ("image",)
    columns_made = ("target",)

    @hookimpl
    def transform(self, data: Any, run: Any) -> Any:
        """A noisy copy; the clean image is kept in column ``target``."""
        from plait.demo.pictures import with_images

        images = images_of(data)
        noise = self.sigma * images.new_empty(images.shape).normal_(generator=run.generator())
        return with_images(data, images + noise, keep_as="target")


@attrs.frozen(kw_only=True)
class SmallClassifier:
    """A two-layer classifier of the digits."""

    width: int = field(32, "hidden units", in_range(1, 4096))
    gives = "classifier"

    @hookimpl
    def load_model(self, run: Any) -> Classifier:
        """With seeded weights, in eval mode."""
        return make_classifier(run.derived_seed(), self.width)


@attrs.frozen(kw_only=True)
class Training:
    """Full-batch Adam on the cross-entropy."""

    num_steps: int = field(60, "updates", in_range(1))
    learning_rate: float = field(0.02, "of Adam", in_range(0, low_open=True))
    takes = {"model": "classifier", "data": "dataset"}
    columns_needed = ("image", "label")

    @hookimpl
    def optimize(self, model: Any, data: Any, run: Any) -> Classifier:
        """A trained copy."""
        steps = run.track(range(self.num_steps), "training")
        trained: Classifier = train(model, images_of(data), labels_of(data), steps, self.learning_rate, run.device)
        return trained


@attrs.frozen(kw_only=True)
class Accuracy:
    """Share of images whose class the model finds."""

    takes = {"model": "classifier", "data": "dataset"}
    columns_needed = ("image", "label")

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Any) -> Report:
        """One row per dataset (and model), where mappings are given."""
        models = model if isinstance(model, dict) else {"": model}
        sets = data if isinstance(data, dict) else {"": data}
        rows = [
            {
                **({"model": m} if m else {}),
                **({"data": d} if d else {}),
                "accuracy": accuracy(one, images_of(some), labels_of(some)),
            }
            for m, one in models.items()
            for d, some in sets.items()
        ]
        return Report(rows=rows, better={"accuracy": "higher"}, formats={"accuracy": ".3f"})


@attrs.frozen(kw_only=True)
class Error:
    """Root mean squared distance of images from their targets, in [0, 1] units."""

    takes = {"data": "dataset", "reference": "dataset"}
    columns_needed = ("image",)

    @hookimpl
    def evaluate(self, data: Any, reference: Any | None, run: Any) -> Report:
        """One row per dataset; the target is column ``target``, or the images of ``reference``."""
        sets = data if isinstance(data, dict) else {"images": data}
        rows = []
        for name, some in sets.items():
            target = images_of(some, "target") if reference is None else images_of(reference)
            rows.append({"data": name, "RMSE": float((images_of(some) - target).square().mean().sqrt())})
        return Report(rows=rows, better={"RMSE": "lower"}, formats={"RMSE": ".4f"})
