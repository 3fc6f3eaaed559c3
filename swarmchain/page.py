"""An audit as a page to hand to an ethics board, and as a file for tools."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2

from swarmchain.audit import Audit
from swarmchain.config import write_file


def write_audit(folder: Path, audit: Audit) -> tuple[Path, Path]:
    """Write audit.json and audit.html. Raises `ConfigError` if the folder cannot be written."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("swarmchain"), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("audit.html").render(a=audit)
    files = folder / "audit.json", folder / "audit.html"
    write_file(files[0], json.dumps(audit.to_dict(), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    write_file(files[1], page.encode())
    return files
