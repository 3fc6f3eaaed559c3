"""What features are called: a site's names → the run's. Genes by a pinned table, markers by aliases. Pure.

Genes go by symbol or by ENSEMBL id; one table (ensembl, symbol), pinned by its SHA-256, translates either way, and
version suffixes (ENSG00000167286.9) are cut. Markers go by aliases: the site's, the run's, and a few synonyms that
everyone uses (CD3e, HLADR), compared without regard to case, hyphens, fluorochromes and isotopes.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from swarmchain.errors import DataError
from swarmchain.protocol import compute_digest

NAMES_BYTES_MAX = 16 << 20
MARKERS_MAX = 100  # a file of no more features is taken for a marker panel, if they are not ENSEMBL ids

_ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{6,})(\.\d+)?$")
_ISOTOPE = re.compile(r"^(\d{2,3}[A-Z][a-z]?(Di)?|[A-Z][a-z]?\d{2,3}Di)[_\-\s]+", re.ASCII)
_DYE = re.compile(
    r"[\s_\-:]+(FITC|PE|APC|ECD|PerCP|PC5|PC5\.5|PC7|PB|KO|A\d{3}|AF\d{3}|Alexa ?Fluor ?\d{3}|BV\d{3}|BUV\d{3}|BB\d{3}"
    r"|V\d{3}|Pacific ?(Blue|Orange)|Krome ?Orange|Cy\d(\.5)?|H7|R?B\d{3}|Dazzle ?594|eFluor ?\d{3})"
    r"(-[AHW])?$", re.IGNORECASE)

SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("CD3", "CD3e", "CD3 epsilon"), ("CD8", "CD8a", "CD8 alpha"), ("HLA-DR", "HLADR"), ("TCRgd", "TCR gamma delta"),
    ("CD11b", "ITGAM"), ("CD11c", "ITGAX"), ("CD20", "MS4A1"), ("CD25", "IL2RA", "IL-2Ra"), ("CD56", "NCAM", "NCAM1"),
    ("CD57", "B3GAT1"), ("CD62L", "L-Selectin", "SELL"), ("CD95", "Fas"), ("CD117", "c-Kit", "KIT"),
    ("CD123", "IL3RA", "IL-3Ra"), ("CD127", "IL7R", "IL-7Ra"), ("CD161", "KLRB1"), ("CD141", "BDCA-3"),
    ("CD1c", "BDCA-1"), ("CD303", "BDCA-2"), ("CXCR3", "CD183"), ("CXCR4", "CD184"), ("CXCR5", "CD185"),
    ("CCR4", "CD194"), ("CCR5", "CD195"), ("CCR6", "CD196"), ("CCR7", "CD197"), ("PD-1", "CD279", "PDCD1"),
    ("PD-L1", "CD274"), ("CTLA-4", "CD152"), ("ICOS", "CD278"), ("TIM-3", "CD366"), ("LAG-3", "CD223"),
    ("NKG2D", "CD314"), ("NKp46", "CD335"), ("Ki-67", "MKI67"),
)


@dataclass(frozen=True)
class NameTable:
    """One pinned table: ENSEMBL id → symbol, and back where the symbol is unique. `digest` is the table's SHA-256."""

    digest: str
    symbols: Mapping[str, str]
    ids: Mapping[str, str]


@dataclass(frozen=True)
class Naming:
    """How a site's features become the run's: `kind` wanted, the table, and aliases (site's name → run's name)."""

    kind: Literal["auto", "symbol", "ensembl"] = "auto"
    table: NameTable | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)


def parse_name_table(data: bytes, *, source: str) -> NameTable:
    """Read a table with the columns ensembl, symbol.

    Raises
    ------
    DataError
        If it is too large, has other columns, an id that is none, or an id twice.
    """
    hint = "it needs the header ensembl,symbol and each id once"
    if len(data) > NAMES_BYTES_MAX:
        raise DataError(f"{source} is longer than {NAMES_BYTES_MAX} bytes", hint=hint)
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{source} is no table of names: {exc}", hint=hint) from exc
    if not rows or rows[0] != ["ensembl", "symbol"]:
        raise DataError(f"{source}: its first line is not ensembl,symbol", hint=hint)
    symbols: dict[str, str] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != 2 or not is_ensembl(row[0]) or not row[1].strip() or strip_version(row[0]) in symbols:
            raise DataError(f"{source}: line {number} is no new ENSEMBL id with a symbol", hint=hint)
        symbols[strip_version(row[0])] = row[1].strip()
    often = Counter(symbols.values())
    ids = {symbol: name for name, symbol in symbols.items() if often[symbol] == 1}
    return NameTable(compute_digest(data), symbols, ids)


def read_name_table(path: Path, *, pinned: str | None = None) -> NameTable:
    """A table from a file, which must be the one that the run pins, if it pins one. Raises `DataError`."""
    try:
        table = parse_name_table(path.read_bytes(), source=str(path))
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror}", hint="check [data] feature_table") from exc
    if pinned is not None and table.digest != pinned:
        raise DataError(f"{path} has the SHA-256 {table.digest[:12]}…, the run pins {pinned[:12]}… for names",
                        hint="get the run's own table, and name it in [data] feature_table")
    return table


def is_ensembl(name: str) -> bool:
    """Whether a name is an ENSEMBL gene id, with or without version."""
    return _ENSEMBL.match(name) is not None


def strip_version(name: str) -> str:
    """An ENSEMBL gene id without its version; other names as they are."""
    found = _ENSEMBL.match(name)
    return found.group(1) if found else name


def find_kind(names: Sequence[str]) -> Literal["ensembl", "markers", "symbols"]:
    """What kind of names most of them are; few features that are no ids are taken for markers."""
    if names and 2 * sum(map(is_ensembl, names)) > len(names):
        return "ensembl"
    return "markers" if len(names) <= MARKERS_MAX else "symbols"


def rename_features(names: Sequence[str], naming: Naming, *, wanted: Collection[str] | None, source: str
                    ) -> tuple[str, ...]:
    """The run's names of a site's features, in the site's order.

    Parameters
    ----------
    names
        As the file has them.
    wanted
        The panel; without one, names become the usual ones.

    Raises
    ------
    DataError
        If two features of the file come to one name.
    """
    panel = frozenset(wanted or ())
    kind = find_kind(names)
    renamed = [naming.aliases.get(n, strip_version(n)) for n in names]
    if naming.table is not None and kind != "markers":
        to = _choose_kind(naming, panel)
        known = {"ensembl": naming.table.ids, "symbol": naming.table.symbols}.get(to, {})
        renamed = [known.get(n, n) if n not in panel else n for n in renamed]
    elif naming.kind != "auto" and kind in ("ensembl", "symbols") and kind[:6] != naming.kind:
        raise DataError(f"{source}: its features are {kind}, [data] features asks for {naming.kind}",
                        hint="name a table in [data] feature_table, or a column in [data] feature_column")
    if kind == "markers":
        renamed = _rename_markers(renamed, panel, set(naming.aliases.values()), source)
    _check_unique(names, renamed, source)
    return tuple(renamed)


def _choose_kind(naming: Naming, panel: Collection[str]) -> str:
    if naming.kind != "auto" or not panel:
        return naming.kind
    return "ensembl" if 2 * sum(map(is_ensembl, panel)) > len(panel) else "symbol"


def _rename_markers(names: list[str], panel: frozenset[str], fixed: Collection[str], source: str) -> list[str]:
    """Markers by their synonyms. Exact names stay, and nothing takes a name that is there already."""
    by_key: dict[str, str] = {_key(name): name for name in sorted(panel, reverse=True)}
    for group in () if panel else SYNONYMS:
        by_key.setdefault(_key(group[0]), group[0])
    taken = {n for n in names if n in panel or n in fixed}
    renamed = []
    for name in names:
        usual = name if name in taken else by_key.get(_key(name)) or ("" if panel else _strip(name)) or name
        renamed.append(name if usual in taken else usual)
    if panel:
        return renamed
    # two antibodies against one antigen keep their full names on a card
    often = Counter(renamed)
    return [new if often[new] == 1 else old for old, new in zip(names, renamed, strict=True)]


def _strip(name: str) -> str:
    """A marker's name without isotope and fluorochrome."""
    name = _ISOTOPE.sub("", name.strip())
    while (shorter := _DYE.sub("", name)) != name:
        name = shorter
    return name


def _key(name: str) -> str:
    plain = re.sub(r"[\s_\-.]+", "", _strip(name)).casefold()
    plain = plain.replace("α", "a").replace("ε", "e").replace("γ", "g").replace("δ", "d")
    return _SYNONYM.get(plain, plain)


def _check_unique(names: Sequence[str], renamed: Sequence[str], source: str) -> None:
    first: dict[str, str] = {}
    for old, new in zip(names, renamed, strict=True):
        if new in first:
            both = f"{first[new]!r} and {old!r}" if first[new] != old else f"{old!r} twice"
            raise DataError(f"{source}: features {both} come to one name, {new!r}",
                            hint="make the names unique, or give them different ones in [data.aliases]")
        first[new] = old


_SYNONYM: dict[str, str] = {}
_SYNONYM.update({_key(other): _key(group[0]) for group in SYNONYMS for other in group[1:]})
