"""``evaluate``: content-shift-guideline (Img2Img) and content-shift-score (Laplacian)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import datasets
import torch
import torch.nn.functional as F
from plait import Report, Run, hookimpl
from plait.errors import ConfigurationError
from plait.fields import field, in_range, method_list_field
from plait.report import Image, Panel, png
from plait_diffusion import Backbone, backbone_in, image_tensors
from torch import Tensor

from plait_content_shift.content_shift import Score, contours, extract, guideline, img2img
from plait_content_shift.plugin import ContentShift
from plait_content_shift.techniques import Bucket

_SHOWN_SIDE = 96  # pixels of a picture in the report


def _names(combinations: Sequence[ContentShift]) -> list[str]:
    others = [one for one in combinations if not isinstance(one, ContentShift)]
    if others or not combinations:
        raise ConfigurationError(
            f"combinations has {type(others[0]).__name__ if others else 'nothing'} in it; give methods content-shift"
        )
    names = [one.label for one in combinations]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigurationError(f"two combinations are called {twice[0]!r}; give each a name")
    return names


def _columns(combinations: Sequence[ContentShift]) -> tuple[str, ...]:
    """What all of them read of the data."""
    return tuple(dict.fromkeys(column for one in combinations for column in one.columns_needed))


def _rows(data: Any, count: int, least: int) -> datasets.Dataset:
    if not isinstance(data, datasets.Dataset) or len(data) < least:
        what = f"{len(data)} rows" if isinstance(data, datasets.Dataset) else f"a {type(data).__name__}"
        raise ValueError(f"the data is {what}; a dataset with at least {least} images is needed")
    return data.select(range(min(count, len(data))))


@attrs.frozen(kw_only=True)
class Guideline:
    """Img2Img with and without techniques: which of them draw images closer to the input (the paper's GATE guideline).

    A technique is accepted where the mean gain in squared error has a 95 % bootstrap interval above 0.
    """

    takes = {"model": "diffusion-model", "data": "dataset"}

    combinations: tuple[Any, ...] = method_list_field("extract_feature", "methods content-shift to judge")
    timesteps: tuple[int, ...] = field((400, 600, 800), "that drawing begins at: strength × 1000", in_range(1, 999))
    num_steps: int = field(20, "DDIM steps", in_range(1))
    num_images: int = field(300, "the first rows of the data", in_range(2))
    batch_size: int = field(50, "images at a time", in_range(1))
    num_panels: int = field(6, "images in the report", in_range(0))

    def __attrs_post_init__(self) -> None:
        _names(self.combinations)

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return _columns(self.combinations)

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Run) -> Report:
        backbone = backbone_in(model).on(run.device)
        rows = _rows(data, self.num_images, 2)
        buckets = {one.label: (one, one.bucket(backbone, run), one.texts(rows)) for one in self.combinations}
        table: list[dict[str, Any]] = []
        panels = []
        passes = iter(
            run.track(range(len(self.timesteps) * (len(buckets) + 1) * -(-len(rows) // self.batch_size)), "Img2Img")
        )
        for start in self.timesteps:
            reference, drawn = self._draw(backbone, rows, Bucket(), None, start, run, passes)
            pictures = {"without": drawn}
            table.append(_row(start, "reference", reference, None))
            for name, (_, bucket, texts) in buckets.items():
                scores, pictures[name] = self._draw(backbone, rows, bucket, texts, start, run, passes)
                verdict = guideline(reference["MSE"], scores["MSE"], run.generator(f"bootstrap {name} {start}"))
                table.append(_row(start, name, scores, verdict))
            if self.num_panels:
                panels.append(self._panel(start, rows, backbone, pictures))
        for _ in passes:  # the last tick
            pass
        return Report(
            rows=table,
            better={"MSE": "lower", "SSIM": "higher"},
            formats={
                "MSE": ".4f",
                "SSIM": ".3f",
                "gain": "+.4f",
                "gain, low": "+.4f",
                "gain, high": "+.4f",
                "closer, %": ".0f",
            },
            panels=panels,
            notes=[
                f"{len(rows)} images, {self.num_steps} steps, the same noise with and without; gain: the reference's squared error"
                " less the technique's, with its 95 % bootstrap interval over images; accepted: the interval is above 0"
            ],
        )

    def _draw(
        self, backbone: Backbone, rows: Any, bucket: Bucket, texts: list[str] | None, start: int, run: Run, passes: Any
    ) -> tuple[dict[str, Tensor], Tensor]:
        from torchmetrics.functional.image import structural_similarity_index_measure as similarity

        errors, likeness, shown = [], [], []
        noise = run.generator("noise")  # the same for every technique and timestep
        for first in range(0, len(rows), self.batch_size):
            next(passes, None)
            part = rows.select(range(first, min(first + self.batch_size, len(rows))))
            images = image_tensors(part, backbone.default_size).to(backbone.device)
            latents = backbone.latents(backbone.moments(images))
            eps = torch.randn(latents.shape, generator=noise).to(latents)
            prompts = texts[first : first + len(part)] if texts is not None else None
            drawn = img2img(
                backbone, images, bucket, eps, start=start, num_steps=self.num_steps, prompts=prompts, latents=latents
            )
            errors.append((drawn - images).square().mean((1, 2, 3)).cpu())
            ssim = similarity(drawn, images, data_range=1.0, reduction="none")
            assert isinstance(ssim, Tensor)
            likeness.append(ssim.reshape(-1).cpu())
            if first < self.num_panels:
                shown.append(drawn.cpu())
        return {"MSE": torch.cat(errors), "SSIM": torch.cat(likeness)}, torch.cat(shown) if shown else torch.empty(0)

    def _panel(self, start: int, rows: Any, backbone: Backbone, pictures: dict[str, Tensor]) -> Panel:
        count = min(self.num_panels, len(rows))
        images = image_tensors(rows.select(range(count)), backbone.default_size)
        lines = [
            [
                Image(caption=name, data=png(_enlarged(drawn[number])))
                for name, drawn in {"input": images, **pictures}.items()
            ]
            for number in range(count)
        ]
        return Panel(title=f"Img2Img from timestep {start}", images=lines)


def _row(start: int, name: str, scores: dict[str, Tensor], verdict: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "technique": name,
        "t": str(start),
        "MSE": float(scores["MSE"].mean()),
        "SSIM": float(scores["SSIM"].mean()),
    }
    if verdict is not None:
        row |= {"gain": verdict.improvement, "gain, low": verdict.low, "gain, high": verdict.high}
        row |= {"closer, %": 100 * verdict.closer, "accepted": float(verdict.accepted)}
    return row


def _enlarged(picture: Tensor) -> Tensor:
    side = max(_SHOWN_SIDE, picture.shape[-1])
    return F.interpolate(picture[None], (side, side))[0]


@attrs.frozen(kw_only=True)
class LaplacianScore:
    """How much of the content shift in features' contours techniques take away (the paper's eqs. 1–2).

    1: contours as without noise; 0: as bad as without technique; below 0: worse.
    """

    takes = {"model": "diffusion-model", "data": "dataset"}

    combinations: tuple[Any, ...] = method_list_field("extract_feature", "methods content-shift to score")
    timesteps: tuple[int, ...] | None = field(None, "nominal; the extractor's", in_range(1, 999))
    num_images: int = field(200, "the first rows of the data", in_range(1))
    batch_size: int = field(16, "images at a time", in_range(1))
    num_panels: int = field(2, "images whose contours are shown", in_range(0))

    def __attrs_post_init__(self) -> None:
        _names(self.combinations)

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return _columns(self.combinations)

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Run) -> Report:
        backbone = backbone_in(model).on(run.device)
        rows = _rows(data, self.num_images, 1)
        table: list[dict[str, Any]] = []
        panels: list[Panel] = []
        for one in self.combinations:
            for timestep in self.timesteps or (one.nominal(backbone),):
                found = self._scored(attrs.evolve(one, timestep=int(timestep)), backbone, rows, run, panels)
                for name, (matched, plain) in found.items():
                    if not matched.is_defined:
                        run.warn(
                            f"{one.label}, {name}: features do not depend on noise, so the score is not defined; it is set to 0"
                        )
                    table.append(
                        {
                            "technique": one.label,
                            "activation": name,
                            "t": f"{timestep:g}",
                            "score": matched.value(),
                            "score, plain reference": plain.value(),
                        }
                    )
        return Report(
            rows=table,
            formats={"score": "+.3f", "score, plain reference": "+.2f"},
            better={"score": "higher"},
            panels=panels,
            notes=[
                f"{len(rows)} images. score: reference under the same technique without noise, differences as shares of its contours;"
                " plain reference: as the paper reads, without technique, where the technique's own mark counts as content shift"
            ],
        )

    def _scored(
        self, one: ContentShift, backbone: Backbone, rows: Any, run: Run, panels: list[Panel]
    ) -> dict[str, tuple[Score, Score]]:
        bucket, texts = one.bucket(backbone, run), one.texts(rows)
        timestep, (seed, *_) = one.nominal(backbone), one.seeds(run)
        anchor_seed = attrs.evolve(one, noise=0).seeds(run)[0]
        found: dict[str, tuple[Score, Score]] = {}
        starts = range(0, len(rows), self.batch_size)
        for first in run.track(starts, f"contours, {one.label}, t = {timestep:g}"):
            part = rows.select(range(first, min(first + self.batch_size, len(rows))))
            numbers = range(first, first + len(part))
            prompts = texts[first : first + len(part)] if texts is not None else None
            images = image_tensors(
                part, one.extractor.origin(backbone, 0).more.get("image_size") or backbone.default_size
            )
            images = images.to(backbone.device)
            latents = backbone.latents(backbone.moments(images))

            def features(
                used: Bucket,
                own: list[str] | None,
                noise: bool,
                number: int,
                images: Tensor = images,
                numbers: range = numbers,
                latents: Tensor = latents,
            ) -> dict[str, Tensor]:
                (values,) = extract(
                    one.extractor,
                    backbone,
                    images,
                    used,
                    rows=numbers,
                    seeds=[number],
                    timestep=timestep,
                    prompts=own,
                    noise=noise,
                    latents=latents,
                )
                return values

            anchor = features(Bucket(), None, True, anchor_seed)
            shifted = features(bucket, prompts, True, seed)
            plain = features(Bucket(), None, False, anchor_seed)
            matched = features(bucket, prompts, False, seed)
            for name in anchor:
                scores = found.setdefault(name, (Score("matched"), Score("plain")))
                for score in scores:
                    score.add(anchor[name], shifted[name], plain[name], matched[name])
            if first == 0 and self.num_panels:
                panels.append(self._panel(one.label, timestep, images, anchor, shifted, plain, matched))
        return found

    def _panel(
        self,
        name: str,
        timestep: float,
        images: Tensor,
        anchor: dict[str, Tensor],
        shifted: dict[str, Tensor],
        plain: dict[str, Tensor],
        matched: dict[str, Tensor],
    ) -> Panel:
        kinds = {"without noise": plain, "noise": anchor, f"without noise, {name}": matched, f"noise, {name}": shifted}
        lines = []
        for number in range(min(self.num_panels, len(images))):
            for activation in anchor:
                line = [Image(caption="input", data=png(_enlarged(images[number].cpu())))]
                for caption, values in kinds.items():
                    line.append(
                        Image(
                            caption=f"{activation}: {caption}", data=png(_enlarged(_scaled(values[activation][number])))
                        )
                    )
                lines.append(line)
        return Panel(title=f"contours of features, {name}, t = {timestep:g}", images=lines)


def _scaled(features: Tensor) -> Tensor:
    lengths = contours(features[None].cpu())
    return lengths / lengths.max().clamp(min=1e-12)
