"""FCS files: channels and antigens, events as float32, compensated by the matrix that the file carries. Knows flowio.

Flow Cytometry Standard 2.0 to 3.1, list mode (Spidlen et al. 2010, https://doi.org/10.1002/cyto.a.20825). Values are on
the linear scale: amplification ($PnE) and gain ($PnG) are undone, as flowio does it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.config import DataConfig
from swarmchain.errors import DataError
from swarmchain.labels import read_table, take_keys
from swarmchain.source import Names, Source

Compensate = bool | str
SPILLOVER_KEYS = ("spillover", "spill", "comp")
SPILLOVER_HINT = "have the cytometer's software export it again, or set [data] compensate = false"
CONDITION_MAX = 1e6
_NO_MARKER = re.compile(
    r"^(fsc|ssc|fs|ss|time|width|event|events|event.?length|cell.?length|center|offset|residual|file.?num\w*)([\W_]|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FcsHeader:
    """What the text segment says. `antigens` fall back to the channel's name; `spillover` is (channels, matrix)."""

    path: Path
    channels: tuple[str, ...]
    antigens: tuple[str, ...]
    events: int
    spillover: tuple[tuple[str, ...], npt.NDArray[np.float64]] | None
    is_transformed: bool

    @property
    def unlisted(self) -> frozenset[int]:
        """Positions of scatter, time and the like, which are no markers."""
        return frozenset(i for i, name in enumerate(self.channels) if _NO_MARKER.match(name))


def read_header(path: Path, *, compensate: Compensate) -> FcsHeader:
    """The text segment, with offsets and spillover checked.

    Raises
    ------
    DataError
        If the file is no FCS file, its offsets do not fit, or its spillover matrix is missing or malformed.
    """
    data = _open(path, only_text=True)
    channels = tuple(str(name).strip() for name in data.pnn_labels)
    if len(channels) != data.channel_count or not all(channels):
        raise DataError(f"{path}: $PAR says {data.channel_count} channels, and {len([c for c in channels if c])} have "
                        "a name ($PnN)", hint="have the cytometer's software export the file again")
    antigens = tuple(str(s).strip() or n for s, n in zip(data.pns_labels, channels, strict=True))
    spillover = _read_spillover(path, data.text, channels) if compensate is not False else None
    if spillover is None and compensate is True:
        raise DataError(f"{path} has no $SPILLOVER ($SPILL, $COMP), and [data] compensate demands it",
                        hint='set [data] compensate = "auto" if these values need none or were compensated before')
    is_transformed = str(data.text.get("transformation", "")).lower() == "applied"
    return FcsHeader(path, channels, antigens, int(data.event_count), spillover, is_transformed)


def read_events(header: FcsHeader) -> npt.NDArray[np.float32]:
    """All events, float32 [events, channels], compensated if the header has a matrix. Raises `DataError`."""
    data = _open(header.path, only_text=False)
    values = data.events
    size = len(header.channels)
    if values is None or len(values) != header.events * size:
        raise DataError(
            f"{header.path}: $BEGINDATA and $ENDDATA hold {0 if values is None else len(values)} values, $TOT × $PAR "
            f"says {header.events} × {size}", hint="the file is cut short or its offsets are wrong: export it again")
    events: npt.NDArray[np.float64] = data.as_array(preprocess=True)
    if header.spillover is not None:
        names, matrix = header.spillover
        at = [header.channels.index(name) for name in names]
        # observed = true · spillover, so true = observed · spillover⁻¹
        events[:, at] = np.linalg.solve(matrix.T, events[:, at].T).T
    return events.astype(np.float32)


def open_fcs(path: Path, config: DataConfig) -> Source:
    """One file, or all of a folder by name; a cell is called by its file and number. Raises `DataError`."""
    headers = [read_header(p, compensate=config.compensate) for p in (list_fcs(path) if path.is_dir() else [path])]
    first = headers[0]
    for header in headers[1:]:
        absent = [name for name in first.antigens if name not in header.antigens]
        if absent or len(header.antigens) != len(first.antigens):
            raise DataError(f"{header.path} has not the channels of {first.path.name}: "
                            f"{(absent or list(header.antigens))[0]!r} ($PnS)",
                            hint="one folder holds files of one panel; move the others elsewhere")
    starts = np.cumsum([0, *(h.events for h in headers)])
    labels = None if config.labels is None else _FcsLabels(Path(config.labels), config.labels_key, headers)
    columns = ("file", *(labels.columns if labels else ()))
    return Source(
        path=path, kind="fcs", features=first.antigens,
        cells=np.concatenate([_number(h) for h in headers]), columns=columns, feature_columns=(),
        bounds=tuple(int(v) for v in starts[1:]), storage="dense", read_rows=_FcsRows(headers, starts),
        read_column=lambda name: _repeat(headers, [h.path.stem for h in headers]) if name == "file" or labels is None
        else labels.read(name),
        read_feature_column=lambda name: None, channels=first.channels, unlisted=first.unlisted,
        remarks=tuple(_list_remarks(headers)),
    )


def list_fcs(folder: Path) -> list[Path]:
    """FCS files of a folder, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in (".fcs", ".lmd") and p.is_file())


def _open(path: Path, *, only_text: bool) -> Any:
    import flowio

    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on byte order and bit widths; the values are checked by us
            data = flowio.FlowData(file, only_text=only_text)
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror or exc}", hint="check [data] path") from exc
    except flowio.exceptions.DataOffsetDiscrepancyError as exc:
        raise DataError(f"{path}: $BEGINDATA or $ENDDATA is not what the header says: {_reason(exc)}",
                        hint="one of the two is wrong: have the cytometer's software export the file again") from exc
    except flowio.exceptions.MultipleDataSetsError as exc:
        raise DataError(f"{path}: $NEXTDATA: the file holds several data sets",
                        hint="write each of them into a file of its own") from exc
    except Exception as exc:  # flowio raises whatever parsing a damaged file leads to
        words = "$BEGINDATA or $ENDDATA is wrong" if "offset" in str(exc) or "data section" in str(exc) else "no FCS"
        raise DataError(f"cannot read {path}: {words}: {_reason(exc)}",
                        hint="the file is damaged or cut short: export it again") from exc
    _check_offsets(path, data)
    return data


def _check_offsets(path: Path, data: Any) -> None:
    """Flowio does not see offsets that are wrong alike in both places."""
    header, text = data.header, data.text
    start, stop = (header["data_start"], header["data_stop"])
    if data.version != "2.0" and start == 0:
        start, stop = int(text["begindata"]), int(text["enddata"])
    widths = sum(int(text.get(f"p{i + 1}b", "0") or 0) if text.get(f"p{i + 1}b", "").strip().isdigit() else 0
                 for i in range(data.channel_count))
    expected = data.event_count * widths // 8
    if start <= header["text_stop"] < stop or (expected and stop - start + 1 != expected):
        raise DataError(
            f"{path}: $BEGINDATA {start} and $ENDDATA {stop} do not hold the {expected} bytes that $TOT, $PAR and $PnB "
            "say", hint="the file is cut short or its offsets are wrong: export it again")


def _read_spillover(
    path: Path, text: Mapping[str, str], channels: tuple[str, ...]
) -> tuple[tuple[str, ...], npt.NDArray[np.float64]] | None:
    key = next((k for k in SPILLOVER_KEYS if str(text.get(k, "")).strip()), None)
    if key is None:
        return None
    name = f"{path}: ${key.upper()}"
    parts = [part.strip() for part in str(text[key]).split(",")]
    try:
        size = int(parts[0])
        names, numbers = tuple(parts[1 : 1 + size]), [float(v) for v in parts[1 + size :]]
    except ValueError as exc:
        raise DataError(f"{name} is not n, n channels, n × n numbers", hint=SPILLOVER_HINT) from exc
    if size < 1 or len(names) != size or len(numbers) != size * size:
        raise DataError(f"{name} announces {size} channels and holds {len(numbers)} numbers", hint=SPILLOVER_HINT)
    missing = [n for n in names if n not in channels]
    if missing or len(set(names)) != size:
        raise DataError(f"{name} names channel {(missing or list(names))[0]!r}, "
                        f"which is {'no $PnN' if missing else 'not unique'}", hint=SPILLOVER_HINT)
    matrix = np.array(numbers, dtype=np.float64).reshape(size, size)
    if not np.isfinite(matrix).all() or np.linalg.cond(matrix) > CONDITION_MAX:
        raise DataError(f"{name} cannot be inverted", hint=SPILLOVER_HINT)
    return names, matrix


def _reason(exc: Exception) -> str:
    return (str(exc) or type(exc).__name__).splitlines()[0]


class _FcsRows:
    """Rows over several files; the file that was read last is kept."""

    def __init__(self, headers: Sequence[FcsHeader], starts: npt.NDArray[Any]) -> None:
        self._headers, self._starts = headers, starts
        self._kept: tuple[int, Any] = (-1, None)

    def __call__(self, start: int, stop: int) -> Any:
        pieces = []
        for i, header in enumerate(self._headers):
            low, high = int(self._starts[i]), int(self._starts[i + 1])
            if low < stop and start < high:
                pieces.append(self._read(i, header)[max(start, low) - low : min(stop, high) - low])
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def _read(self, at: int, header: FcsHeader) -> Any:
        if self._kept[0] != at:
            events = read_events(header)
            order = [header.antigens.index(name) for name in self._headers[0].antigens]
            self._kept = (at, events if order == sorted(order) else events[:, order])
        return self._kept[1]


class _FcsLabels:
    """A table of labels, one row for each file; with a column `event`, for each of its events, counted from 0."""

    def __init__(self, path: Path, key: str | None, headers: Sequence[FcsHeader]) -> None:
        self._path, self._headers = path, headers
        self._table = read_table(path, key="labels")
        keys = take_keys(self._table, path, key)
        self.columns = tuple(str(c) for c in self._table.columns if c != "event")
        self._table.index = keys.str.replace(r"(?i)\.(fcs|lmd)$", "", regex=True)
        known = {h.path.stem for h in headers}
        if not known & set(self._table.index):
            raise DataError(f"{path} names none of the {len(headers)} FCS files of [data] path",
                            hint="name the column of the files' names in [data] labels_key")

    def read(self, name: str) -> Any:
        per_event = "event" in self._table
        pieces = []
        for header in self._headers:
            rows = self._table[self._table.index == header.path.stem]
            if not per_event and len(rows) > 1:
                raise DataError(f"{self._path} names {header.path.name} twice",
                                hint="one row a file, or a column event")
            values = np.full(header.events, "", dtype=object)
            if per_event:
                values[self._read_events(header, rows)] = rows[name].to_numpy()
            elif len(rows):
                values[:] = rows[name].iloc[0]
            pieces.append(values)
        return np.concatenate(pieces)

    def _read_events(self, header: FcsHeader, rows: Any) -> npt.NDArray[np.int64]:
        text = rows["event"].str.strip()
        valid = text.str.fullmatch(r"\d{1,10}")
        numbers: npt.NDArray[np.int64] = text[valid].astype(np.int64).to_numpy()
        if not valid.all() or (numbers >= header.events).any() or len(np.unique(numbers)) != len(numbers):
            raise DataError(f"{self._path}: column event is not each of 0 to {header.events - 1} once at most for "
                            f"{header.path.name}", hint="count the events of each file from 0")
        return numbers


def _list_remarks(headers: Sequence[FcsHeader]) -> Iterator[str]:
    bare = [h.path.name for h in headers if h.spillover is None]
    if bare:
        yield (f"{len(bare)} of {len(headers)} FCS files have no $SPILLOVER in use (first: {bare[0]}): their values "
               "are taken as they are")
    written = [h.path.name for h in headers if h.is_transformed]
    if written:
        yield f"{len(written)} FCS files say that their values were transformed before ({written[0]}: transformation)"


def _number(header: FcsHeader) -> Names:
    return np.char.add(f"{header.path.stem}:", np.arange(header.events).astype(np.str_))


def _repeat(headers: Sequence[FcsHeader], values: Sequence[str]) -> Any:
    import pandas as pd

    return pd.Categorical.from_codes(np.repeat(np.arange(len(headers)), [h.events for h in headers]), list(values))
