"""Lets the pages of docs/ link to the rest of the repository, on the site as in the repository itself.

A file outside docs/ that some page links to is taken into the site as it is, under `repository/`: Markdown as a page,
anything else as a file. Links are rewritten while the site is built; no content is kept twice.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = "repository/"
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def find_links(text: str, folder: PurePosixPath) -> set[str]:
    """Files of the repository that a page in `folder` links to, as paths from its root."""
    targets = (posixpath.normpath(str(folder / found[2])) for found in LINK.finditer(text))
    return {target for target in targets if not target.startswith("..") and (ROOT / target).is_file()}


def to_site(path: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    return path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path


def from_site(path: str) -> str:
    """The file of the repository that lies at a place in the site's sources."""
    return path.removeprefix(OUTSIDE) if path.startswith(OUTSIDE) else "docs/" + path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in what the pages link to, and what those files link to."""
    queue = [from_site(file.src_uri) for file in files.documentation_pages()]
    seen = set(queue)
    while queue:
        page = queue.pop()
        for path in sorted(find_links((ROOT / page).read_text(encoding="utf-8"), PurePosixPath(page).parent) - seen):
            seen.add(path)
            if path.startswith("docs/"):
                continue
            files.append(File.generated(config, to_site(path), abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                queue.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links where the files lie on the site."""
    here = PurePosixPath(from_site(page.file.src_uri)).parent
    site_here = PurePosixPath(page.file.src_uri).parent

    def rewrite(found: re.Match[str]) -> str:
        target = posixpath.normpath(str(here / found[2]))
        if target.startswith("..") or not (ROOT / target).is_file():
            return found[0]
        return f"{found[1]}{posixpath.relpath(to_site(target), str(site_here))}{found[3] or ''}{found[4]}"

    return LINK.sub(rewrite, markdown)
