"""The command line. Heavy libraries are imported inside the commands that need them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preferences.errors import InputError, PairwrightError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

app = typer.Typer(
    name="pairwright",
    help="Build preference datasets and align models with them.\n\n"
    "Start with `pairwright init recipe.yaml`, then `pairwright run recipe.yaml`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

label = typer.Typer(
    help="Have people label in Argilla.",
    no_args_is_help=True,
)
app.add_typer(label, name="label")

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
JsonOutput = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a recipe with comments, to be filled in.

    Example: pairwright init my-recipe.yaml
    """
    from importlib import resources

    if path.exists():
        raise InputError(f"{path}: already exists; name a new file")
    template = resources.files("flows").joinpath("template.yaml").read_text(encoding="utf-8")
    path.write_text(template, encoding="utf-8")
    print(f"Wrote {path}. Fill it in, then: pairwright run {path}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, by which editors complete them.

    Example: pairwright schema > recipe.schema.json
    """
    from flows.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=1))


@app.command()
def check(recipe: RecipePath, settings: Settings = None) -> None:
    """Check a recipe, its files and its models without running anything.

    Example: pairwright check recipes/miniature/recipe.yaml
    """
    from flows.check import check_inputs
    from flows.plan import make_plan
    from flows.recipe import load_recipe

    loaded = load_recipe(recipe, _settings(settings))
    make_plan(loaded)
    check_inputs(loaded)
    print(f"{recipe}: good")


@app.command()
def run(
    recipe: RecipePath,
    settings: Settings = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
    report: Annotated[bool, typer.Option(help="Print the report at the end.")] = True,
) -> None:
    """Build the dataset, then train and evaluate if the recipe says so. Does only what is owed.

    Example: pairwright run recipes/miniature/recipe.yaml
    """
    _carry_out(recipe, settings, store, as_json, report, dataset_only=False)


@app.command()
def build(
    recipe: RecipePath,
    settings: Settings = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
    report: Annotated[bool, typer.Option(help="Print the report at the end.")] = True,
) -> None:
    """Build the dataset and stop there.

    Example: pairwright build recipes/hh_rlhf.yaml --set data=path/to/hh_rlhf
    """
    _carry_out(recipe, settings, store, as_json, report, dataset_only=True)


@app.command()
def align(
    recipe: RecipePath,
    dataset: Annotated[
        str | None, typer.Option(help="Address of a finished dataset; by default the recipe's.")
    ] = None,
    settings: Settings = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Train the recipe's model on a finished dataset, and evaluate it.

    Example: pairwright align recipes/miniature/recipe.yaml
    """
    from flows.running import align_now

    model = align_now(recipe, dataset, _settings(settings), store, as_json)
    print(json.dumps({"model": model}) if as_json else model)


@app.command()
def status(
    recipe: RecipePath,
    settings: Settings = None,
    store: StoreUrl = None,
    as_json: JsonOutput = False,
) -> None:
    """Show what of a recipe is done and what is owed.

    Example: pairwright status recipes/miniature/recipe.yaml
    """
    if as_json:
        from flows.running import status_document

        print(json.dumps(status_document(recipe, _settings(settings), store)))
        return
    from flows.report import status_table

    _show(status_table(recipe, _settings(settings), store))


@app.command()
def report(
    recipe: RecipePath,
    settings: Settings = None,
    store: StoreUrl = None,
    as_json: JsonOutput = False,
) -> None:
    """Show what came out: the dataset, its judges, the model before and after.

    Example: pairwright report recipes/miniature/recipe.yaml
    """
    if as_json:
        from flows.running import report_document

        print(json.dumps(report_document(recipe, _settings(settings), store)))
        return
    from flows.report import report_tables

    _show(*report_tables(recipe, _settings(settings), store))


@app.command()
def trace(
    record_id: Annotated[str, typer.Argument(help="The id of any record, or its beginning.")],
    recipe: RecipePath,
    settings: Settings = None,
    store: StoreUrl = None,
) -> None:
    """Print the whole life of one record: its prompt, answers, judgments, ranking and pairs.

    Example: pairwright trace 3f2a91 recipes/miniature/recipe.yaml
    """
    from flows.trace import trace_record

    _show(*trace_record(record_id, recipe, _settings(settings), store))


@app.command()
def lint(
    dataset: DatasetPath,
    max_characters: Annotated[
        int | None, typer.Option(min=1, help="Most characters of prompt and answer together.")
    ] = None,
    as_json: JsonOutput = False,
) -> None:
    """Check the pairs of a dataset before training on it. Exit code 1 if any cannot be right.

    Example: pairwright lint out --max-characters 16000
    """
    from flows.datasets import lint_json, lint_table
    from preferences.lint import lint as findings_of

    findings = findings_of(dataset, max_characters)
    if as_json:
        print(lint_json(dataset, findings))
    else:
        _show(lint_table(dataset, findings))
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


@app.command()
def diff(before: DatasetPath, after: DatasetPath, as_json: JsonOutput = False) -> None:
    """Show what changed from one dataset to another: prompts, pairs, labels, probabilities.

    Example: pairwright diff old-export new-export
    """
    from flows.datasets import diff_json, diff_table
    from preferences.diff import diff as difference_of

    difference = difference_of(before, after)
    if as_json:
        print(diff_json(before, after, difference))
    else:
        _show(diff_table(before, after, difference))


@app.command()
def export(
    recipe: RecipePath,
    output: Annotated[Path, typer.Argument(help="A new folder.")],
    form: Annotated[
        str,
        typer.Option("--format", help="conversational, plain, kto or ranking."),
    ] = "conversational",
    settings: Settings = None,
    store: StoreUrl = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Also upload it to this data set of the Hub: org/name.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Make a new data set private.")] = True,
) -> None:
    """Write a finished dataset as a folder that `datasets` and TRL load as it is.

    Example: pairwright export recipes/miniature/recipe.yaml out --format kto
    """
    from flows.exporting import export_dataset

    for line in export_dataset(
        recipe, output, form, _settings(settings), store, push_to_hub, private
    ):
        print(line)


@app.command()
def deploy(
    recipe: RecipePath,
    cron: Annotated[
        str | None, typer.Option(help='When to build, as "0 3 * * *"; by default only on demand.')
    ] = None,
    settings: Settings = None,
    store: StoreUrl = None,
) -> None:
    """Have `pairwright up` serve this recipe: build it on a schedule, align when it is finished.

    Example: pairwright deploy recipes/miniature/recipe.yaml --cron "0 3 * * *"
    """
    from flows.deploy import record_deployment

    print(record_deployment(recipe, cron, _settings(settings), store))


@app.command()
def up(
    store: StoreUrl = None,
    port: Annotated[int, typer.Option(help="Of the Prefect server and its pages.")] = 4200,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Start the Prefect server and serve all deployed recipes. Ctrl-C stops everything.

    Example: pairwright up --port 4200
    """
    from flows.deploy import serve_all

    serve_all(store or "store", host, port)


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


def main() -> None:
    """The `pairwright` command: errors a person can mend are one line, and the exit code tells."""
    try:
        app()
    except PairwrightError as error:
        print(f"pairwright: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("pairwright: stopped; run the same again to go on", file=sys.stderr)
        sys.exit(130)


def _carry_out(
    recipe: Path,
    settings: list[str] | None,
    store: str | None,
    as_json: bool,
    report: bool,
    dataset_only: bool,
) -> None:
    from flows.report import report_tables
    from flows.running import report_document, run_now

    values = _settings(settings)
    timings = run_now(recipe, values, store, as_json, dataset_only)
    if report and as_json:
        print(json.dumps(report_document(recipe, values, store, dataset_only)))
    elif report:
        _show(*report_tables(recipe, values, store, dataset_only, timings))


def _settings(pairs: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair}: no value; write --set {pair}=VALUE")
        found[name] = value
    return found


def _show(*parts: object) -> None:
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
