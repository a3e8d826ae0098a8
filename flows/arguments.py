"""What commands have in common: their arguments, and how they show what they found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preferences.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Fill a ${name} of the recipe: --set name=value.", metavar="N=V"),
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="PAIRWRIGHT_STORE",
        help="Folder or bucket URL for all results; by default the recipe's, or ./store.",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print JSON, and write progress to stderr as JSON lines."),
]
DatasetPath = Annotated[
    str, typer.Argument(help="A folder with data/*.parquet, or a table with a row a pair.")
]
ArgillaUrl = Annotated[
    str | None,
    typer.Option(
        "--argilla-url",
        envvar="ARGILLA_API_URL",
        help="An Argilla of your own, whose key is in ARGILLA_API_KEY; by default the store's.",
        show_envvar=False,
    ),
]
JsonOutput = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def use_argilla(url: str | None) -> None:
    """The flows look for it in the environment."""
    if url is not None:
        os.environ["ARGILLA_API_URL"] = url


def settings_of(pairs: list[str] | None) -> dict[str, str]:
    """What `--set` says, by name; InputError where one has no value."""
    found = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair}: no value; write --set {pair}=VALUE")
        found[name] = value
    return found


def show(*parts: object) -> None:
    """Print tables and texts to the terminal."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False, markup=False, emoji=False)
    for part in parts:
        console.print(_Literal(part), markup=False, emoji=False)


class _Literal:
    """A part as text that moves no cursor: what a model wrote can hold control characters."""

    def __init__(self, part: object) -> None:
        self._part = part

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        for text, style, control in console.render(self._part, options):  # type: ignore[arg-type]
            shown = "".join(c if c.isprintable() or c == "\n" else "·" for c in text)
            yield Segment(text if control else shown, style, control)
