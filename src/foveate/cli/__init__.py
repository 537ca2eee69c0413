"""The command line: explain, evaluate, compare, train, demo, list."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate.cli.compare import compare
from foveate.cli.confidence import confidence
from foveate.cli.evaluate import evaluate
from foveate.cli.explain import explain
from foveate.cli.listing import list_
from foveate.cli.train import demo, train
from foveate.runtime.memory import keep_memory

app = typer.Typer(
    help="Where an image classifier looks, whether that picture is true, and how to make it look at the right thing.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from foveate import __version__

        print(f"foveate {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


app.command()(explain)
app.command()(evaluate)
app.command()(compare)
app.command()(confidence)
app.command()(train)
app.command()(demo)
app.command("list")(list_)


def main() -> None:
    """Entry point of the command ``foveate``."""
    keep_memory()
    app(prog_name="foveate")
