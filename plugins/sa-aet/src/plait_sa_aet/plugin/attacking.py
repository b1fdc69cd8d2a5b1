"""How an attack goes through the data: batch after batch, shard after shard, with a checkpoint for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import datasets
from plait.fingerprints import fingerprint
from plait_clip import captions_of, image_batches

from plait_sa_aet.attack_report import AttackReport, empty_record, note
from plait_sa_aet.captions import MAX_WORDS, clean_caption, num_cut
from plait_sa_aet.images import quantize
from plait_sa_aet.randomness import PerImage, ReleasedStreams
from plait_sa_aet.sa_aet import Adversarial, Batch
from plait_sa_aet.shards import Shards, changed_features, export, image_names, rows_of, with_other_columns
from plait_sa_aet.source import Source

if TYPE_CHECKING:
    from plait_sa_aet.plugin.attacks import Attack

SHARD_IMAGES = 64

OneBatch = Callable[[Source, Batch, Any], Adversarial]


def attacked(method: Attack, source: Source, data: datasets.Dataset, run: Any) -> datasets.Dataset:
    num_batches = -(-len(data) // method.batch_size)
    loop = run.loop(method, "attacking", inputs=(source.model, data, method.digest_of_files()), total=num_batches)
    # The result is memory-mapped from the loop's folder, so the loop is not left: its state stays.
    shards = Shards(loop.folder, changed_features(data, source.image_size, method.keeps_floats))
    texts = captions_of(data)[0]
    if method.reads_captions and (cut := num_cut(texts)):
        what = "returned without the rest" if method.attacks_captions else "read no further"
        run.warn(f"{cut} of {len(texts)} captions have more than {MAX_WORDS} words and are {what}")
    report = AttackReport()
    one_batch = method.prepare(source, [clean_caption(text) for text in texts], run, report)
    as_released = method.rng == "released" or (method.rng is None and method.as_released)
    streams = ReleasedStreams(run.seed) if as_released else None
    size = method.batch_size * max(1, SHARD_IMAGES // method.batch_size)
    starts = range(0, len(data), size)

    for index, start in enumerate(starts):
        rows_here = range(start, min(start + size, len(data)))
        record = shards.record(index)
        if record is None:
            rows, record = _rows(method, source, one_batch, data.select(rows_here), start, streams, run, loop)
            shards.write(index, rows, record)
        elif streams is not None:
            streams.load_state_dict(record["rng"])
        loop.done(-(-rows_here.stop // method.batch_size) - 1)
    for record in shards.records(len(starts)):
        report.add(record)
    run.add(report.made())
    if method.save_to is not None:
        made_of = {"model_sha256": fingerprint(source.model), "corpus_sha256": report.corpus_sha256}
        export(method.save_to, shards, len(starts), report.projection, made_of)
    return with_other_columns(data, shards.dataset(len(starts)), loop.folder)


def _rows(
    method: Attack,
    source: Source,
    one_batch: OneBatch,
    part: datasets.Dataset,
    start: int,
    streams: ReleasedStreams | None,
    run: Any,
    loop: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Attack the rows of ``part``, the first of which is ``start``: their new columns, and what was done."""
    names = image_names(part, start)
    captions, owners = captions_of(part)
    rows: list[dict[str, Any]] = []
    record = empty_record()
    for pixels in image_batches(part, source.model.image_input, batch_size=method.batch_size):
        here = range(len(rows), len(rows) + len(pixels))
        own = ((owners >= here.start) & (owners < here.stop)).nonzero().flatten()
        txt2img = owners[own] - here.start
        plain = [captions[m] for m in own.tolist()]
        batch = Batch(
            pixels.to(source.device).float() / 255,
            [clean_caption(text) for text in plain],
            txt2img.to(source.device),
        )
        ids = [start + row for row in here]
        rng = streams or PerImage(run.derived_seed("noise"), ids, device=source.device)
        found = one_batch(source, batch, rng)
        images = quantize(found.images, batch.images, method.reach, method.rounding) if method.reach else batch.images
        note(record, found, batch, ids, float((images - batch.images).abs().max()))
        attacked = found.captions if method.attacks_captions else plain
        texts = [text or before for text, before in zip(attacked, plain, strict=True)]
        floats = images if method.keeps_floats else None
        if floats is not None and method.reach >= 1 / 255:  # 8-bit copies keep the budget, too
            images = quantize(found.images, batch.images, method.reach, "round")
        rows += rows_of(part, images, texts, txt2img, names[here.start : here.stop], floats)
        if found.trace:
            run.log(
                step=ids[0] // method.batch_size,
                **{"loss of the last step, by batch": sum(found.trace[-1]["view_losses"])},
            )
        if here.stop < len(part):  # the last batch is done when the rows are on disk
            loop.done(ids[0] // method.batch_size)
    if streams is not None:
        record["rng"] = streams.state_dict()
    return rows, record
