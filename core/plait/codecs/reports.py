"""Reports: JSON beside PNG files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from plait.report.model import Curve, Image, Panel, Report


class ReportCodec:
    """:class:`plait.Report`."""

    name = "report"

    def handles(self, value: Any) -> bool:
        return isinstance(value, Report)

    def save(self, value: Report, folder: Path) -> None:
        count = 0
        panels = []
        for panel in value.panels:
            rows = []
            for row in panel.images:
                pictures = []
                for picture in row:
                    (folder / f"{count:05d}.png").write_bytes(picture.data)
                    pictures.append({"caption": picture.caption, "file": f"{count:05d}.png"})
                    count += 1
                rows.append(pictures)
            panels.append({"title": panel.title, "images": rows})
        data = {
            "rows": list(value.rows), "title": value.title, "better": dict(value.better), "formats": dict(value.formats),
            "spread": value.spread, "curves": [attrs.asdict(curve) for curve in value.curves], "panels": panels, "notes": list(value.notes),
        }  # fmt: skip
        (folder / "report.json").write_text(json.dumps(data))

    def load(self, folder: Path) -> Report:
        data = json.loads((folder / "report.json").read_text())
        panels = [
            Panel(
                title=panel["title"],
                images=[
                    [Image(caption=p["caption"], data=(folder / p["file"]).read_bytes()) for p in row]
                    for row in panel["images"]
                ],
            )
            for panel in data.pop("panels")
        ]
        curves = [Curve(**curve) for curve in data.pop("curves")]
        return Report(panels=panels, curves=curves, **data)
