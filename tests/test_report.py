"""The report page and the summary's figures, from a run with every kind of outcome and hostile names."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from swarmchain.errors import ConfigError
from swarmchain.progress import Progress
from swarmchain.protocol import Outcome
from swarmchain.report import Predictions, draw_figures, format_metrics_table, write_report
from swarmchain.summary import summarize_timing, to_json

HOSTILE = "<script>document.title='owned'</script>"
LABELS = ("B cell", 'T "cell" & <b>')
PREDICTIONS = Predictions(
    labels=LABELS, truth=np.array([0, 0, 1, 1]), predicted=np.array([0, 1, 1, 1]),
    umap=np.array([[0, 0], [1, 1], [2, 0], [2, 0]], np.float32), sites=np.array(["A"] * 4),
    own_umap=np.array([[0, 2], [3, 1]], np.float32), own_sites=np.array(["A", HOSTILE]),
)


def make_summary() -> dict[str, Any]:
    arm = {"macro_f1": 0.5, "per_class": {LABELS[0]: 0.5}}
    empty: dict[str, Any] = {"checkpoint": None, "manifest": None, "included": [], "excluded": [], "scores": {},
                             "test_macro_f1": None, "voted": []}
    timing = {"train": 0.5, "chain": 0.25, "store": 0.0, "merge": 0.0, "wait": 0.25}
    return {
        "title": f"Trial {HOSTILE}", "dataset": "made up",
        "sites": [{"site": i, "name": name, "address": "0x" + "1" * 40, "cells_train": 2, "cells_validation": 0,
                   "features_present": 2, "features_total": 3, "label_counts": {LABELS[0]: i}}
                  for i, name in enumerate(("A", HOSTILE))],
        "run": {"run_id": 2, "spec": "a" * 64, "contract": "0x" + "2" * 40, "chain_id": 1, "client": "anvil",
                "head": "b" * 64, "statistics_run_id": 1},
        "rounds": [
            {**empty, "round_id": 1, "outcome": "expired", "committed": ["A"]},
            {**empty, "round_id": 2, "outcome": "rejected", "committed": ["A", HOSTILE], "voted": ["A"]},
            {**empty, "round_id": 3, "outcome": "finalized", "committed": ["A", HOSTILE], "checkpoint": "c" * 64,
             "manifest": "d" * 64, "voted": ["A"], "scores": {"A": 0.25}, "test_macro_f1": 0.5,
             "included": [{"site": "A", "samples": 2, "norm": 1.0, "clip_factor": 1.0, "weight": 1.0}],
             "excluded": [{"site": HOSTILE, "reason": "withheld"}]},
        ],
        "final": {"checkpoint": "c" * 64, "round_id": 3, "same_at_all_sites": False, "by_site": {"A": "c" * 64}},
        "metrics": {"central": arm, "swarm": arm, "local_mean": arm, "local_worst": {**arm, "site": HOSTILE},
                    "linear": arm, "local": {"A": arm}},
        "support": {LABELS[0]: 2, LABELS[1]: 2},
        "gas": {"commit": {"median": 55_000, "max": 88_000, "count": 3}, "per_site_round": {"A": 100.0}},
        "bytes": {"A": {"up": 2_000_000, "down": 3_000}}, "seed": 0, "versions": {"python": "3.11"},
        "timing_s": {"total": 3.0, "setup": 1.0, "rounds": [{"round_id": 3, **timing, "sites": {"A": timing}}]},
    }


def render(folder: Path, summary: dict[str, Any] | None = None) -> str:
    write_report(folder / "report.html", summary=summary or make_summary(), predictions=PREDICTIONS)
    return (folder / "report.html").read_text()


class Tags(HTMLParser):
    """Names and attributes of all tags, and whether every one is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_the_same_bytes_for_the_same_summary(tmp_path: Path) -> None:
    assert render(tmp_path) == render(tmp_path)


def test_page_is_well_formed_and_self_contained(tmp_path: Path) -> None:
    tags = Tags()
    tags.feed(render(tmp_path))
    assert tags.open == []
    names = {name for name, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe", "object"}
    assert not [value for _, attrs in tags.seen for key, value in attrs.items() if key in ("src", "href")]


def test_page_shows_cells_by_site_and_what_is_wrong(tmp_path: Path) -> None:
    page = render(tmp_path)
    assert "(red), 1 of 4." in page and "2 of the sites’ own cells" in page
    assert page.count('r="2"') == 2 and page.count('r="2.6" fill="var(--bad)"') == 1
    assert ">.50</text>" in page  # of the row, not a number of cells


def test_figures_lie_beside_the_page(tmp_path: Path) -> None:
    made = draw_figures(tmp_path, summary=make_summary(), predictions=PREDICTIONS)
    names = ("curves", "confusion", "f1", "umap-label", "umap-call", "umap-right", "umap-site")
    assert {path.name for path in made} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert all(path.stat().st_size > 1000 for path in made)


def test_page_shows_every_outcome_and_reason(tmp_path: Path) -> None:
    page = render(tmp_path)
    for words in ("expired", "rejected", "finalized", "round 3: withheld, did not vote", "The sites do not hold"):
        assert words in page
    assert page.count('class="cell in"') == 1
    assert page.count('class="cell out"') == 1
    assert page.count('class="cell absent"') == 4


def test_page_of_a_run_without_timings_or_failures(tmp_path: Path) -> None:
    summary = make_summary()
    summary["timing_s"]["rounds"] = []
    summary["final"]["same_at_all_sites"] = True
    assert "All 2 sites hold the same model" in render(tmp_path, summary)


def test_invalid_report_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        render(tmp_path / "file")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_browser(tmp_path: Path, width: int) -> None:
    """Hostile names stay text, and nothing but its own scroll boxes is wider than the window."""
    page = render(tmp_path)
    probe = "<script>document.body.dataset.wide = document.documentElement.scrollWidth - innerWidth</script></body>"
    (tmp_path / "probed.html").write_text(page.replace("</body>", probe))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom",
               (tmp_path / "probed.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    assert "owned</title>" not in dom
    found = re.search(r'data-wide="(-?\d+)"', dom)
    assert found is not None
    assert int(found[1]) <= 0


def test_metrics_table_fits_eighty_columns() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123 - closed with the test
    console.print(format_metrics_table(make_summary()))
    text = console.export_text()
    console.file.close()
    assert LABELS[1] + " (2)" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_timing_keeps_every_site_of_a_round() -> None:
    events = [(site, {"event": "voted", "run": run, "round": 1, "timing_s": {"train": seconds}})
              for site, seconds in (("B", 1.0), ("A", 2.0)) for run in (1, 2)]
    timing = summarize_timing(events, 2, total=3.14159, setup=1.0)
    assert timing == {"total": 3.14, "setup": 1.0,
                      "rounds": [{"round_id": 1, "train": 1.5, "sites": {"A": {"train": 2.0}, "B": {"train": 1.0}}}]}


def test_invalid_summary_with_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"macro_f1": float("nan")})


def test_progress_tells_rounds_in_order_and_failed_ones_too(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = {1: Outcome.EXPIRED, 2: Outcome.FINALIZED, 3: Outcome.REJECTED}
    progress = Progress(Console(width=200), run=2, rounds=3, sites=2, get_outcome=outcomes.__getitem__)

    def say(site: str, event: str, number: int, **values: Any) -> None:
        progress.show(site, {"event": event, "run": 2, "round": number, **values})

    say("A", "committed", 1)
    say("A", "opened", 2)
    for site in ("A", "B"):
        say(site, "committed", 2)
        say(site, "voted", 2, score=0.5, checkpoint="c" * 64)
    say("A", "opened", 3)
    say("A", "committed", 3)
    say("A", "voted", 3, score=None, checkpoint="e" * 64)
    for site in ("A", "B"):
        say(site, "ended", 2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[1], line[2]) for line in lines] == [("1/3", "expired"), ("2/3", "finalized"), ("3/3", "rejected")]
    assert "1/2 committed, 0/2 voted" in " ".join(lines[0])
