"""``foveate`` and ``python -m foveate``."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the command ``foveate``; without typer or rich it says so in one sentence."""
    from foveate.errors import FoveateError, required

    try:
        required("the command foveate", "typer", "rich")
    except FoveateError as error:
        print(f"foveate: {error}", file=sys.stderr)
        sys.exit(2)
    from foveate.cli import main as run

    run()


if __name__ == "__main__":
    main()
