"""What the site adds to the pages in this folder: pages of packages and their parts, ready-made pipelines, colours of code.

MkDocs calls the functions (``hooks`` in ``mkdocs.yml``). The texts stay where they are read first: in the packages'
READMEs and in the pipelines themselves. Pages in ``results`` belong to READMEs and link like them, by paths of the
repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/README.md"))
# Parts of packages that have a README of their own.
PARTS = {
    path: f"packages/{path.relative_to(ROOT).parts[1]}-{path.parent.name}.md"
    for path in sorted(ROOT.glob("plugins/*/src/**/README.md"))
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
TITLE = re.compile(r'^```(\w+) title="([^"]+)"$', re.MULTILINE)
LAYOUT = """
.codehilite pre,.codehilite code{white-space:pre-wrap!important;overflow-wrap:anywhere;overflow:visible!important;margin:0;padding:0;border:0;background:none}
.wy-table-responsive table td,.wy-table-responsive table th{white-space:normal}
.wy-table-responsive table td[style*=right]{white-space:nowrap}
.wy-nav-content{max-width:1000px}
.codehilite{background:#f6f8fa;padding:10px 14px;margin:0 0 16px;overflow-x:auto}
"""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the style that are made here."""
    made = {
        **{f"packages/{folder.name}.md": _package(folder) for folder in PLUGINS},
        **{
            page: _site_links(part.read_text(encoding="utf-8"), part.parent, "packages") for part, page in PARTS.items()
        },
        "packages/index.md": _packages(),
        "ready-made.md": _ready_made(),
        "code.css": HtmlFormatter(style="default").get_style_defs(".codehilite") + LAYOUT,
    }
    for place, content in made.items():
        files.append(File.generated(config, place, content=content))
    for folder in PLUGINS:
        for picture in folder.glob("*.png"):
            files.append(File.generated(config, f"packages/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Names of files above blocks of code, which Markdown itself does not know, and the links of pages of results."""
    folder = PurePosixPath(page.file.src_uri).parent
    if folder.name == "results":
        markdown = _site_links(markdown, DOCS / folder, str(folder))
    return TITLE.sub(lambda match: f"*{match[2]}*\n\n```{match[1]}", markdown)


def _package(folder: Path) -> str:
    return _site_links((folder / "README.md").read_text(encoding="utf-8"), folder, "packages")


def _site_links(text: str, folder: Path, at: str) -> str:
    """A text out of a folder of the repository, with links as its page in the folder ``at`` of the site needs them."""
    return LINK.sub(lambda match: _site_link(match, folder, at), text)


def _site_link(match: re.Match[str], folder: Path, at: str) -> str:
    """One link; where it leads out of the site, its text alone."""
    image, text, target, anchor = match.groups()
    if "://" in target or target.startswith("mailto:"):
        return match[0]
    place = Path(os.path.normpath(folder / target))
    if image:
        return f"![{text}]({place.name})" if place.parent == folder else text
    page = _page_of(place)
    if page is None:
        return text
    if place.parent == ROOT / "pipelines":
        anchor = f"#{place.stem}"
    return f"[{text}]({os.path.relpath(page, at)}{anchor or ''})"


def _page_of(place: Path) -> str | None:
    """The page on which the site shows a file or folder of the repository."""
    if place in (ROOT, ROOT / "README.md"):
        return "index.md"
    if place in PARTS:
        return PARTS[place]
    package = place.parent if place.name == "README.md" else place
    if package in PLUGINS:
        return f"packages/{package.name}.md"
    if place.parent in (DOCS, DOCS / "results") and place.suffix == ".md":
        return place.relative_to(DOCS).as_posix()
    return "ready-made.md" if place.parent == ROOT / "pipelines" else None


def _packages() -> str:
    lines = ["# Packages", "", "Each installs alone, and its page has its fields, measured results and limits.", ""]
    for folder in PLUGINS:
        _, _, rest = (folder / "README.md").read_text(encoding="utf-8").partition("\n")
        first = " ".join(rest.strip().partition("\n\n")[0].split())
        first = _site_links(first, folder, "packages")
        lines.append(f"- [**{folder.name}**]({folder.name}.md): {first}")
    return "\n".join([*lines, ""])


def _ready_made() -> str:
    """Every ready-made pipeline: what it shows, its steps as a picture, its text."""
    lines = [
        "# Ready-made pipelines",
        "",
        "All of them are in `pipelines/`; `plait run pipelines/NAME.yaml` runs one.",
        "",
    ]
    for path in sorted(ROOT.glob("pipelines/*.yaml")):
        text = path.read_text(encoding="utf-8")
        comment, body = _split(text)
        lines += [f"## {path.stem}", "", comment, "", "```yaml", body.strip(), "```", ""]
    return "\n".join(lines)


def _split(text: str) -> tuple[str, str]:
    """The comment that a pipeline begins with, and the rest."""
    lines = text.splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:end]), "\n".join(lines[end:])
