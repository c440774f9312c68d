"""A hook of mkdocs: pages of the repository that lie outside docs/ become pages of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Where a page lies in the repository -> where it lies on the site.
PAGES = {
    "README.md": "index.md",
    "README.zh.md": "index.zh.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(\]\()([^)#:\s]+)")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=with_links_of_the_site(text, source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri in PAGES.values():
        return markdown
    return with_links_of_the_site(markdown, f"docs/{page.file.src_uri}")


def with_links_of_the_site(text: str, source: str) -> str:
    """Links lead from file to file of the repository; on the site they lead from page to page."""
    page = PAGES.get(source) or source.removeprefix("docs/")

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        on_site = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        return match[1] + (posixpath.relpath(on_site, posixpath.dirname(page) or ".") if on_site else match[2])

    return LINK.sub(link, text)
