"""The command line: parse, call one function, print. Heavy imports wait for their command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from swarmchain import __version__
from swarmchain.cli.agent import agent
from swarmchain.cli.benchmark import benchmark
from swarmchain.cli.chain import deploy, devchain
from swarmchain.cli.consortium import consortium
from swarmchain.cli.data import data
from swarmchain.cli.demo import demo
from swarmchain.cli.predict import predict
from swarmchain.cli.run import run
from swarmchain.cli.site import site
from swarmchain.cli.status import status
from swarmchain.cli.store import store
from swarmchain.errors import SwarmError

EPILOG = ("Exit codes: 0 done, 1 something to mend, 2 wrong usage, 3 chain or store unreachable (try again), "
          "4 a run ended without reaching its goal, 5 a merge does not recompute (do not go on).")


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="swarmchain")
def cli() -> None:
    """Hospitals train one single-cell model together: no data shared, no one in charge, every merge verifiable."""


for command in (demo, benchmark, devchain, deploy, site, consortium, data, run, predict, agent, status, store):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; an expected failure is one line and a hint, anything else keeps its traceback."""
    try:
        code = cli.main(arguments, prog_name="swarmchain", standalone_mode=False)
    except SwarmError as exc:
        click.echo(f"Error: {exc.message}", err=True)
        if exc.hint:
            click.echo(f"  hint: {exc.hint}", err=True)
        sys.exit(exc.exit_code)
    except click.exceptions.Abort:
        click.echo("stopped", err=True)
        sys.exit(130)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # whoever read our output has left; nothing more can be said, also not by the interpreter at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
