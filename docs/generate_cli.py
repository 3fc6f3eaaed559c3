"""Write docs/cli.md from the commands' own help; `--check` only compares."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from swarmchain.cli import cli

TARGET = Path(__file__).with_name("cli.md")
HEAD = """# Command line

Written by `make docs` from the commands' own help. Commands that report take `--json`. Exit codes: 0 done, 1 something
to mend, 2 wrong usage, 3 chain or store unreachable (a supervisor may try again). A site's settings are in its
`site.toml` ([annotated example](../deploy/site.toml)); the environment's `SWARMCHAIN_PASSWORD`,
`SWARMCHAIN_RPC_URL` and `SWARMCHAIN_METRICS` win over it, and an option over both
([what wins where](roles/it.md#what-wins-where)).
A command may be repeated: what is done already is said, and not done again.
Passwords and keys are never arguments.
"""


def walk(command: click.Command, words: tuple[str, ...], parent: click.Context | None) -> Iterator[str]:
    """Sections of `command` and of all below it."""
    context = click.Context(command, info_name=words[-1], parent=parent, max_content_width=100, terminal_width=100)
    yield f"## {' '.join(words)}\n\n```text\n{context.get_help()}\n```\n"
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from walk(command.commands[name], (*words, name), context)


def main() -> int:
    """Write or compare."""
    text = HEAD + "\n" + "\n".join(walk(cli, ("swarmchain",), None))
    if "--check" not in sys.argv:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        print(f"{TARGET.name} is not what the commands say: run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
