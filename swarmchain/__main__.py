"""`python -m swarmchain` is the `swarmchain` command."""

from swarmchain.cli import main

if __name__ == "__main__":
    main()
