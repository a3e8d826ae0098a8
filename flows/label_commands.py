"""The `pairwright label` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.arguments import (
    ArgillaUrl,
    JsonOutput,
    RecipePath,
    Settings,
    StoreUrl,
    settings_of,
    show,
    use_argilla,
)

label = typer.Typer(
    help="Have people label, in Argilla or by a table.",
    no_args_is_help=True,
)


@label.command("serve")
def label_serve(
    home: Annotated[
        Path, typer.Option(help="Folder of the server: its database, index, secret and log.")
    ] = Path("store/argilla"),
    port: Annotated[int, typer.Option(help="Of the server and its pages.")] = 6900,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Start Argilla, where people label. Ctrl-C stops it; the next start goes on with everything.

    Example: pairwright label serve --port 6900
    """
    from judging.argilla.server import serve

    serve(home, host, port)


@label.command("push")
def label_push(
    recipe: RecipePath,
    settings: Settings = None,
    store: StoreUrl = None,
    argilla_url: ArgillaUrl = None,
) -> None:
    """Put what is worth asking to people.

    A build does this by itself; nothing is asked twice.

    Example: pairwright label push recipe.yaml
    """
    from flows import labelling

    use_argilla(argilla_url)
    labelling.push(recipe, settings_of(settings), store)


@label.command("status")
def label_status(
    recipe: RecipePath,
    settings: Settings = None,
    store: StoreUrl = None,
    argilla_url: ArgillaUrl = None,
    as_json: JsonOutput = False,
) -> None:
    """Show answers by annotator, how well they do, and how far they agree.

    Example: pairwright label status recipe.yaml
    """
    from flows import labelling

    use_argilla(argilla_url)
    found = labelling.status(recipe, settings_of(settings), store)
    if as_json:
        print(labelling.status_json(found))
    else:
        show(*labelling.status_parts(found))


@label.command("pull")
def label_pull(
    recipe: RecipePath,
    settings: Settings = None,
    store: StoreUrl = None,
    argilla_url: ArgillaUrl = None,
) -> None:
    """Take people's answers into the store.

    A build does this by itself.

    Example: pairwright label pull recipe.yaml
    """
    from flows import labelling

    use_argilla(argilla_url)
    new = labelling.pull(recipe, settings_of(settings), store)
    print(f"{new:,} new or changed answers")


@label.command("export")
def label_export(
    recipe: RecipePath,
    table: Annotated[Path, typer.Argument(help="The table, .csv or .jsonl.")],
    settings: Settings = None,
    store: StoreUrl = None,
) -> None:
    """Write the questions into a table for people to fill in.

    What they filled in already stays.

    Example: pairwright label export recipe.yaml ann.csv
    """
    from flows import labelling

    asked = labelling.export(recipe, settings_of(settings), store, table)
    print(f"{asked:,} questions in {table}; `pairwright label import` takes the answers")


@label.command("import")
def label_import(
    recipe: RecipePath,
    table: Annotated[Path, typer.Argument(help="The table, .csv or .jsonl.")],
    settings: Settings = None,
    store: StoreUrl = None,
) -> None:
    """Take a table's answers into the store.

    The next build finds them there. The same table can come again.

    Example: pairwright label import recipe.yaml ann.csv
    """
    from flows import labelling

    new = labelling.take_in(recipe, settings_of(settings), store, table)
    print(f"{new:,} new or changed answers")
