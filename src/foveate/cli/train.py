"""foveate train and foveate demo, with a progress bar for epochs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.cli import completion
from foveate.cli.options import (
    Debug,
    Encoding,
    Json,
    Out,
    Overwrite,
    TrustCode,
    err,
    out_folder,
    refuse_empty,
    sentences,
    set_value,
)
from foveate.errors import FoveateError, printable, required

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback


def _epoch_bar(name: str) -> Callback:
    """A Lightning callback with one line per run: epochs done, time left, and the figures of the last epoch."""
    from lightning.pytorch.callbacks import Callback
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class EpochBar(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            columns = (TextColumn("  {task.description:<10}"), BarColumn(28), MofNCompleteColumn(), TextColumn("epochs"))
            self.bar = Progress(*columns, TimeRemainingColumn(), TextColumn("[dim]{task.fields[figures]}"), console=err)
            self.bar.start()
            self.steps = trainer.num_training_batches
            self.task = self.bar.add_task(name, total=trainer.max_epochs, completed=trainer.current_epoch, figures="")

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.bar.update(self.task, completed=round(trainer.current_epoch + (batch_idx + 1) / self.steps, 2))

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            line = pl_module.history[-1]
            figures = f"loss {line['train_loss']:.3f}  val accuracy {line['val_accuracy']:.3f}"
            self.bar.update(self.task, completed=trainer.current_epoch + 1, figures=figures)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.bar.stop()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.bar.stop()

    return EpochBar()


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A YAML file, or one of foveate's own: see 'foveate list recipes'.", autocompletion=completion.recipes
        ),
    ],
    change: Annotated[list[str] | None, typer.Option("--set", help="key=value, such as epochs=5 or augment.flip=true.")] = None,
    data: Annotated[str | None, typer.Option(help="Train on this: what the recipe calls data.train.")] = None,
    encoding: Encoding = None,
    small: Annotated[bool, typer.Option("--small", help="The recipe's variant for a machine without a GPU.")] = False,
    out: Out = "run",
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last finished epoch in the folder.")] = False,
    devices: Annotated[int, typer.Option(min=1, help="GPUs, or processes on CPUs: a batch is divided among them.")] = 1,
    logger: Annotated[
        list[str] | None, typer.Option(help="csv, tensorboard or wandb, into OUT/logs; the last two show the film. Repeat.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile where no loss looks inside.")] = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a classifier with cross-entropy and any sum of losses on its maps."""
    with sentences(debug):
        import os

        from foveate.training.lightning import ready

        ready()
        required("train", "matplotlib", "jinja2")
        from foveate.report import training
        from foveate.training.checkpoints import finished
        from foveate.training.outcome import OUTCOME
        from foveate.training.recipe import read_recipe
        from foveate.training.train import train as run

        changes: dict[str, Any] = {}
        for item in change or []:
            key, equals, value = item.partition("=")
            if not equals or not key:
                raise FoveateError(f"--set {item!r} is not of the form key=value")
            changes[key] = set_value(item, value)
        if data is not None:
            refuse_empty("--data", data)
            changes = {"data.train" if data != "scenes" else "data": data, **changes}
        if encoding is not None:
            changes["data.encoding"] = encoding
        settings = read_recipe(recipe, changes, small=small, trust_code=trust_code)
        out_folder(out)
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0  # of several processes, which all run this
        bars = [] if as_json or not first else [_epoch_bar(settings.name)]
        options: dict[str, Any] = {"devices": devices, "loggers": logger or [], "workers": workers, "compiled": compiled}
        options["trust_code"] = trust_code
        page = Path(out) / "report.html"
        if resume and (done := finished(Path(out), settings)) is not None:
            there = escape(printable(out))
            err.print(f"[yellow]note:[/] the run in {there} is finished: nothing is left to train", soft_wrap=True)
            found, seconds = done, done["seconds"]
            if first and not page.exists():
                training.write(out)
        else:
            result = run(settings, out, overwrite=overwrite, callbacks=bars, resume=resume, **options)
            found, seconds = result.outcome, result.seconds
            if first:
                training.write(out)
        if not first:
            return
        if as_json:
            shown = {key: found[key] for key in OUTCOME if key in found}
            print(json.dumps({"name": settings.name, **shown, "seconds": seconds, "out": printable(out)}, indent=2))
            return
        console = Console(highlight=False, soft_wrap=True)
        console.print("accuracy: " + ", ".join(f"{split} [bold]{value:.3f}[/]" for split, value in found["accuracy"].items()))
        if worst := found.get("worst_group"):
            console.print(f"worst group: {escape(worst['name'])} [bold]{worst['accuracy']:.3f}[/] ({worst['count']} images)")
        inside = {split: values["mass_inside"]["mean"] for split, values in found["maps"].items() if "mass_inside" in values}
        if inside:
            console.print("map on the object: " + ", ".join(f"{split} [bold]{value:.3f}[/]" for split, value in inside.items()))
        if "maps_error" in found:
            err.print(f"[yellow]note:[/] the maps could not be measured: {escape(found['maps_error'])}")
        console.print(
            f"weights, recipe, curves and film in [bold]{escape(printable(out))}[/]; "
            f"the page: [bold]{escape(printable(page))}[/]"
        )
        if settings.data == "scenes" and settings.model == "foveate:small_cnn":
            weights = escape(printable(Path(out) / "model.safetensors"))
            console.print(f"look at it: foveate evaluate scenes --model {settings.model} --weights {weights}")


def demo(
    out: Out = "demo",
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes, the weights and the order of the images.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The whole loop in a minute: train with and without the CAM loss, explain both, measure both, one page."""
    with sentences(debug):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        from foveate.training.lightning import ready

        ready("demo")
        required("demo", "pandas", "scipy", "matplotlib", "jinja2")
        from foveate.report.demo import PICTURES, RUNS
        from foveate.report.demo import demo as run

        def say(text: str) -> None:
            if not as_json:
                err.print(f"[dim]{text}[/]")

        bars: Callable[[str], list[Callback]] = lambda name: [] if as_json else [_epoch_bar(name)]  # noqa: E731
        with Progress(
            TextColumn("  {task.description:<10}"),
            BarColumn(28),
            MofNCompleteColumn(),
            TextColumn("pictures"),
            console=err,
            disable=as_json,
        ) as drawing:
            task = drawing.add_task("scenes", total=PICTURES)

            def tick() -> None:
                drawing.advance(task)
                if drawing.finished:
                    drawing.stop()  # the bars of the training runs come below it

            document = run(out, seed, say, bars, tick)
        if as_json:
            print(json.dumps(document, indent=2))
            return
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for column in ("", "train", "validation", "swapped", "on animal"):
            table.add_column(column, justify="right" if column else "left")
        for key, values in document["runs"].items():
            accuracy = values["accuracy"]
            cells = [f"{accuracy[split]:.3f}" for split in ("train", "val", "test")]
            table.add_row(RUNS[key][1], *cells, f"{values['mass_inside']:.3f}")
        console = Console(highlight=False)
        console.print(table)
        console.print("[dim]accuracy; share of the map's mass on the animal in validation[/]")
        console.print(f"the page: [bold]{escape(printable(Path(document['report']).resolve()))}[/]", soft_wrap=True)
