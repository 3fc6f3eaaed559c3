"""Tools that are no tests of ours: coverage by forge, static analysis by slither, proofs by halmos.

    python tests/proofs.py TOOLS        where TOOLS is the folder of the slither and halmos commands

Fails when a line or branch of the contract is not covered, when slither finds what docs/verification.md does not
judge (or no longer finds what it does), or when a property that halmos proved before is not proved.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mutation

VERIFICATION = mutation.ROOT / "docs" / "verification.md"


def run(command: list[str]) -> str:
    path = f"{Path(mutation.find_forge()).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=mutation.copy_project(), env={**os.environ, "PATH": path}, capture_output=True,
                          text=True, check=False)
    return done.stdout + done.stderr


def check_coverage() -> list[str]:
    """Files of the contract with less than 100 % of lines, statements, branches or functions."""
    text = run([mutation.find_forge(), "coverage", "--ir-minimum", "--report", "summary", "--no-match-contract",
                "InvariantsTest"])
    rows = re.findall(r"^\| contracts/(\w+\.sol) +\|(.+)\|$", text, re.MULTILINE)
    problems = [f"coverage of {name}: {row}" for name, row in rows if row.count("100.00%") != 4]
    print(f"coverage: {len(rows) - len(problems)} of {len(rows)} sources at 100 %")
    return problems if len(rows) >= 5 else [f"coverage did not run:\n{text[-1000:]}"]


def check_slither(tools: Path) -> list[str]:
    """Findings that the page does not judge, and judgements of what is no longer found."""
    text = run([str(tools / "slither"), ".", "--json", "-", "--filter-paths", "contracts/test"])
    answer = json.loads(text[text.index('{"success"'):text.rindex("}") + 1])
    found = set()
    for finding in answer["results"].get("detectors", []):
        functions = [e["name"] for e in finding["elements"] if e["type"] in ("function", "contract", "variable")]
        found.add((finding["check"], functions[0]))
    judged = set(re.findall(r"^\| ([\w-]+) \| `(\w+)` \|", VERIFICATION.read_text(), re.MULTILINE))
    print(f"slither: {len(found)} findings, {len(found & judged)} of them judged")
    return [f"slither: {item} is not judged" for item in sorted(found - judged)] + [
        f"slither: {item} is judged and not found" for item in sorted(judged - found)]


def check_halmos(tools: Path) -> list[str]:
    """Properties that are not proved though the page says so, or the other way round."""
    text = run([str(tools / "halmos"), "--contract", "PhasesTest", "--solver-timeout-assertion", "60000"])
    found = {name: verdict == "PASS" for verdict, name in re.findall(r"\[(\w+)\]\S* (check_\w+)\(", text)}
    said = {name: verdict == "proved" for name, verdict in re.findall(
        r"^\| `(check_\w+)` \| (proved|not proved)", VERIFICATION.read_text(), re.MULTILINE)}
    print(f"halmos: {sum(found.values())} of {len(found)} properties proved")
    return [f"halmos: {name} is {'proved' if found.get(name) else 'not proved'}, the page says otherwise"
            for name in sorted({*found, *said}) if found.get(name) != said.get(name)]


def main() -> int:
    tools = Path(sys.argv[1]).resolve()
    problems = check_coverage() + check_slither(tools) + check_halmos(tools)
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
