"""Options that commands share, the model they name, and errors as sentences."""

from __future__ import annotations

import codecs
import functools
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape

from foveate.cli import completion
from foveate.disk.text import parse_yaml, quoted, read_lines
from foveate.errors import FoveateError, printable

if TYPE_CHECKING:
    from foveate.models.classifier import Classifier

T = TypeVar("T")
err = Console(stderr=True, highlight=False)
DONE, FAILURES, WRONG_CALL, INTERRUPTED = 0, 1, 2, 130
ASCII = {"█": "#", "→": "->", "±": "+-", "•": "*", "–": "-", "…": "...", "·": ".", "×": "x"}  # for terminals that have no more
NET = True  # what nobody thought of ends in a sentence too; tests take it away, so that it hides nothing

# Groups of options in --help.
MODEL, METHOD, DATA, RESULTS = "Model", "Methods and metrics", "Images", "What is written"

HeadKind = Annotated[
    str | None,
    typer.Option("--head", help="softmax, binary (one logit) or multilabel; by the number of outputs.", rich_help_panel=MODEL),
]
Layer = Annotated[
    str,
    typer.Option(help="Dotted path of the layer to look at; several, separated by commas, are fused.", rich_help_panel=METHOD),
]
PrecisionOption = Annotated[
    str, typer.Option("--precision", help="Of changed images, in methods that run many: fp32, bf16.", rich_help_panel=METHOD)
]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A method's own setting, METHOD.SETTING=VALUE, as opti_cam.steps=50. Repeat.", rich_help_panel=METHOD
    ),
]
Out = Annotated[str, typer.Option("--out", "-o", help="Folder for what is written.", rich_help_panel=RESULTS)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that the folder holds.", rich_help_panel=RESULTS)]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.", rich_help_panel=RESULTS)
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Run the Python file that a recipe, or a run's folder, names as its model.",
        rich_help_panel=MODEL,
    ),
]
Encoding = Annotated[
    str | None,
    typer.Option(
        help="Of labels.csv and --classes, where they are not UTF-8: cp1252 (Excel on Windows), latin-1.", rich_help_panel=DATA
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def kinds() -> list[str]:
    """What ``foveate list`` lists, for completion."""
    return ["methods", "metrics", "losses", "models", "recipes"]


@contextmanager
def sentences(debug: bool) -> Iterator[None]:
    """Errors as one sentence and an exit status; warnings as notes; no character that stops a terminal."""
    _print_anything()

    def note(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        print_note(str(message))

    _said.clear()
    _first.clear()
    shown, warnings.showwarning = warnings.showwarning, note
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"foveate(\.|$)")
        warnings.showwarning = note
        try:
            yield
        except KeyboardInterrupt as error:
            _say(str(error) or "interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (FoveateError, OSError) as error:
            if debug:
                raise
            _say(str(error))
            raise typer.Exit(WRONG_CALL) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if debug or not NET:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            _say(
                f"{quoted(reason, 300)[1:-1]}: foveate did not expect this; run it again with --debug, and report what it shows"
            )
            raise typer.Exit(WRONG_CALL) from None
        finally:
            warnings.showwarning = shown


def _say(sentence: str) -> None:
    err.print(f"[bold red]foveate:[/] {escape(printable(sentence))}", soft_wrap=True)


def _print_anything() -> None:
    """A character that a terminal's encoding has not, and a byte of a file's name that is none, are written in ASCII."""
    codecs.register_error("foveate", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.errors != "foveate":
            stream.reconfigure(errors="foveate")


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)  # it is for streams that are written to
    character = error.object[error.start]
    if character in ASCII:
        return ASCII[character], error.start + 1
    return codecs.backslashreplace_errors(
        UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    )


def refuse_empty(option: str, text: str | None) -> None:
    """Refuse an option that is given and empty: a script's variable that was not set.

    Raises:
        FoveateError: it is.
    """
    if text is not None and not text.strip(" ,"):
        raise FoveateError(f"{option} {text!r} names nothing: leave it out, or say which")


@dataclass(frozen=True)
class Chosen:
    """The model that a command is about: :func:`choosing` makes each field an option of it."""

    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="timm:NAME, torchvision:NAME, foveate:small_cnn or file.py:factory.",
            rich_help_panel=MODEL,
            autocompletion=completion.models,
        ),
    ]
    weights: Annotated[
        str | None, typer.Option(help="State dict: .safetensors, .pt or .pth. Code in it is never run.", rich_help_panel=MODEL)
    ] = None
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Download the library's own weights.", rich_help_panel=MODEL)
    ] = False
    output: Annotated[
        str | None,
        typer.Option(
            help="Of a model with several outputs, the one that is explained: a name, an index, heads.breed.",
            rich_help_panel=MODEL,
        ),
    ] = None
    num_classes: Annotated[
        int | None, typer.Option(help="Outputs of the head, where it is not the library's own.", rich_help_panel=MODEL)
    ] = None
    size: Annotated[int | None, typer.Option(help="Input size, where it is not the model's own.", rich_help_panel=MODEL)] = None
    mean: Annotated[
        str | None,
        typer.Option(help="Normalisation, one number, or one per channel: 0.485,0.456,0.406.", rich_help_panel=MODEL),
    ] = None
    std: Annotated[str | None, typer.Option(help="Likewise: 0.229,0.224,0.225.", rich_help_panel=MODEL)] = None
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, mps: auto is a GPU where there is one.", rich_help_panel=MODEL)
    ] = "auto"
    classes: Annotated[
        str | None,
        typer.Option(help="File with one class name per line, in the order of the model's outputs.", rich_help_panel=MODEL),
    ] = None
    trust_code: TrustCode = False

    def open(self, encoding: str | None = None) -> Classifier:
        """Load it; ``encoding`` is of its file of class names.

        Raises:
            FoveateError: as :func:`foveate.load`, or an option that names nothing.
        """
        from foveate.models.load import load

        for option, text in (
            ("--model", self.model),
            ("--weights", self.weights),
            ("--classes", self.classes),
            ("--device", self.device),
            ("--output", self.output),
        ):
            refuse_empty(option, text)
        names = None
        if self.classes is not None:
            try:
                names = read_lines(self.classes, encoding)
            except FoveateError as error:
                raise FoveateError(f"class file {self.classes!r} cannot be read: {error}") from None
        loaded = load(
            self.model,
            weights=self.weights,
            pretrained=self.pretrained,
            num_classes=self.num_classes,
            size=self.size,
            mean=_numbers("mean", self.mean),
            std=_numbers("std", self.std),
            class_names=names,
            output=self.output,
            trust_code=self.trust_code,
        )
        _first.extend(note for note in loaded.notes if "random" in note)
        return _moved(loaded, self.device)


def choosing(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of :class:`Chosen`, in place of its parameter of that kind."""
    hints, options = get_type_hints(command, include_extras=True), get_type_hints(Chosen, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for given in inspect.signature(command).parameters.values():
        if hints[given.name] is not Chosen:
            parameters.append(given.replace(annotation=hints[given.name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        place = given.name
        for one in fields(Chosen):
            default = inspect.Parameter.empty if one.default is MISSING else one.default
            parameters.append(
                inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=options[one.name])
            )

    @functools.wraps(command)
    def expanded(**given: Any) -> None:
        chosen = Chosen(**{one.name: given.pop(one.name) for one in fields(Chosen)})
        command(**given, **{place: chosen})

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {one.name: one.annotation for one in parameters}
    return expanded


def _moved(classifier: Classifier, device: str) -> Classifier:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise RuntimeError("it computes nothing")
        return classifier.to(place)
    except (RuntimeError, AssertionError, ValueError, TypeError, OverflowError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        known = re.fullmatch(r"(cpu|cuda|mps|xpu|meta)(:-?\d+)?", device)  # of others PyTorch lists all there are
        why = f" ({reason})" if known else ""
        raise FoveateError(
            f"--device {device!r} cannot be used here{why}: use auto, cpu, or a GPU: cuda, cuda:1, mps"
        ) from None


_said: set[str] = set()  # notes of this call
_first: list[str] = []  # what is to be said before any other note: whoever reads on would be misled without it


def print_note(sentence: str) -> None:
    """A note, once; in front of the first, that the weights are random where they are."""
    for text in (*_first, sentence):
        if text not in _said:
            _said.add(text)
            err.print(f"[yellow]note:[/] {escape(printable(text))}", soft_wrap=True)


def print_notes(classifier: Classifier) -> None:
    """What was assumed while the model was loaded; before the first result, and not before an error, which stands alone."""
    for sentence in classifier.notes:
        print_note(sentence)


def out_folder(out: str) -> Path:
    """The folder for what is written, made now: an error after an hour's work would come too late.

    Raises:
        FoveateError: something else has that name.
    """
    refuse_empty("--out", out)
    folder = Path(out)
    if any(part.exists() and not part.is_dir() for part in (folder, *folder.parents)):
        raise FoveateError(f"--out {out!r} is a file, or in one: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FoveateError(
            f"--out {out!r} cannot be made ({(error.strerror or str(error)).lower()}): name another folder"
        ) from None
    return folder


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(math.isfinite, values)):
        raise FoveateError(f"--{option} {text!r} is not one number, or one per channel, such as 0.485,0.456,0.406")
    return values


def class_index(text: str, classifier: Classifier) -> str | int:
    """What ``--target`` and ``--against`` take: ``pred``, ``label``, ``second``, an index, or a name.

    Raises:
        FoveateError: no class, or several, of that name.
    """
    if text in ("pred", "label", "second", "strongest"):
        return text
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    return classifier.class_index(text)


def listed(text: str) -> list[str]:
    """The names that commas separate; empty ones are passed over."""
    return [name.strip() for name in text.split(",") if name.strip()]


def several(layer: str) -> str | list[str]:
    """One layer, or a list of those that commas separate."""
    refuse_empty("--layer", layer)
    names = [name.strip() for name in layer.split(",")]
    return names if len(names) > 1 else layer


def reason_of(name: str, reason: str) -> str:
    """Why a method has no answer, with its name once: ``for pred-second: finer_cam compares ...``."""
    method, _, question = name.partition(" for ")
    text = reason if reason.startswith(method) else f"{method}: {reason}"
    return f"for {question}: {text}" if question else text


def own_settings(given: list[str] | None) -> dict[str, dict[str, Any]]:
    """Settings of methods from ``METHOD.SETTING=VALUE``, values as YAML: ``50``, ``true``, ``[0.1, 0.2]``.

    Raises:
        FoveateError: not of that form.
    """
    settings: dict[str, dict[str, Any]] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        method, dot, key = name.rpartition(".")
        if not (equals and dot and method and key):
            raise FoveateError(f"--set {text!r} is not METHOD.SETTING=VALUE, such as opti_cam.steps=50")
        settings.setdefault(method, {})[key] = None if value.lower() == "none" else set_value(text, value)
    return settings


def set_value(given: str, value: str) -> Any:
    """The value of ``--set NAME=VALUE``, which is YAML.

    Raises:
        FoveateError: it is none; the message quotes what was given.
    """
    return parse_yaml(value, f"--set {quoted(given)}")


def progress(steps: Iterable[T], label: str, quiet: bool, total: int) -> Iterator[T]:
    """The steps, with a bar on standard error; what is printed meanwhile goes where it went."""
    from rich.progress import Progress

    with Progress(console=err, disable=quiet, redirect_stdout=False) as bar:
        yield from bar.track(steps, total, description=label)
