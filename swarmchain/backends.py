"""From a store's URL to what it is made of: a folder, S3, or a file system of fsspec."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from swarmchain.errors import ConfigError, StoreError, StoreUnreachable
from swarmchain.objects import FolderObjects, FsspecObjects, Link, Objects, first_line
from swarmchain.protocol import first_problem


def open_objects(url: str, options: dict[str, Any], *, profile: str | None, link: Link) -> Objects:
    """What a URL names. Raises `StoreError`, or `ConfigError` for options that its kind does not know."""
    kind = url.partition("://")[0] if "://" in url else "file"
    if "://" in url and urlsplit(url).password is not None:
        raise StoreError(f"the URL of the store {kind}://… holds a password",
                         hint="take it out: [store] options_file is the place for it; docs/store.md")
    if kind == "s3":
        from swarmchain.s3 import S3Objects, S3Options  # botocore takes its time

        try:
            found = S3Options.model_validate(options)
        except ValidationError as exc:
            raise ConfigError(f"[store] options_file: {first_problem(exc)}", hint="docs/store.md lists the keys"
                              ) from exc
        return S3Objects(url.removeprefix("s3://").strip("/"), found, profile=profile, link=link)
    return _open_fsspec(url, kind, options, link)


def _open_fsspec(url: str, kind: str, options: dict[str, Any], link: Link) -> Objects:
    if kind in ("file", "local"):
        root = str(Path(url.removeprefix(f"{kind}://")).absolute())
        if not Path(root).is_dir():
            raise StoreError(f"store {url} is no folder", hint="create it, or mount it, and make it writable")
        return FolderObjects(root.rstrip("/"))
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except (ImportError, ValueError) as exc:
        raise StoreError(
            f"store {url}: {first_line(exc)}", hint="check the URL, or install the fsspec package for it"
        ) from exc
    except Exception as exc:
        raise StoreUnreachable(f"store {url}: {first_line(exc)}", hint="is it up, and are its options right?"
                               ) from exc
    return FsspecObjects(fs, root.rstrip("/"), link=link)


def read_options(path: Path) -> dict[str, Any]:
    """The file that `[store] options_file` names. Raises `ConfigError` without quoting it: it holds secrets."""
    try:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} is readable by others", hint=f"chmod 600 {path}")
        options = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"cannot read [store] options_file {path}: {exc.strerror}", hint="docs/store.md shows one"
                          ) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        # without its text: that is where the secrets are
        raise ConfigError(f"{path} is not TOML", hint="docs/store.md shows one") from exc
    return options
