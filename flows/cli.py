"""The command line. Heavy libraries are imported inside the commands that need them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.arguments import (
    ArgillaUrl,
    AsJson,
    DatasetPath,
    JsonOutput,
    RecipePath,
    Settings,
    StoreUrl,
    settings_of,
    show,
    use_argilla,
)
from flows.label_commands import label
from preferences.errors import InputError, PairwrightError

app = typer.Typer(
    name="pairwright",
    help="Build preference datasets and align models with them.\n\n"
    "Start with `pairwright init recipe.yaml`, then `pairwright run recipe.yaml`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(label, name="label")


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
    from flows.running import planned

    plan, _ = planned(recipe, settings_of(settings), None)
    check_inputs(plan.recipe)
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

    model = align_now(recipe, dataset, settings_of(settings), store, as_json)
    print(json.dumps({"model": model}) if as_json else model)


@app.command()
def iterate(
    recipe: RecipePath,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="At most; by default as the recipe says.")
    ] = None,
    settings: Settings = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Build, align and evaluate, then again with the new policy, until that is no gain.

    Example: pairwright iterate recipes/miniature/recipe.yaml --rounds 2
    """
    from flows.running import iterate_now

    told, table = iterate_now(recipe, rounds, settings_of(settings), store, as_json)
    if as_json:
        print(json.dumps(told))
        return
    from flows.report import shown

    show(shown(table), *(f"Round {one['number']}: {one['recipe']}" for one in told["rounds"]))
    print(f"Model: {told['model']}")


@app.command()
def estimate(
    recipe: RecipePath,
    settings: Settings = None,
    gpu: Annotated[
        str | None, typer.Option(help="What it is to run on: H100, A100, L4, 4090, 24GB, cpu.")
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Of that, in any currency.")] = None,
    as_json: JsonOutput = False,
) -> None:
    """Tell memory, time and cost of every stage from the recipe alone; no weights are loaded.

    Example: pairwright estimate recipe.yaml --gpu 24GB --price-per-hour 0.8
    """
    from flows.estimating import estimate_document, estimate_tables

    values = settings_of(settings)
    if as_json:
        print(json.dumps(estimate_document(recipe, values, gpu, price_per_hour)))
    else:
        show(*estimate_tables(recipe, values, gpu, price_per_hour))


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

        print(json.dumps(status_document(recipe, settings_of(settings), store)))
        return
    from flows.report import status_table

    show(status_table(recipe, settings_of(settings), store))


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

        print(json.dumps(report_document(recipe, settings_of(settings), store)))
        return
    from flows.report import report_tables

    show(*report_tables(recipe, settings_of(settings), store))


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

    show(*trace_record(record_id, recipe, settings_of(settings), store))


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
        show(lint_table(dataset, findings))
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
        show(diff_table(before, after, difference))


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
        recipe, output, form, settings_of(settings), store, push_to_hub, private
    ):
        print(line)


@app.command("merge")
def merge_command(
    recipe: RecipePath,
    output: Annotated[Path, typer.Argument(help="A new folder.")],
    dtype: Annotated[str, typer.Option(help="Its numbers: bfloat16 or float32.")] = "bfloat16",
    settings: Settings = None,
    store: StoreUrl = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Also upload it to this model of the Hub: org/name.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Make a new model private.")] = True,
) -> None:
    """Write the trained model as one folder that vLLM and transformers load, with its card.

    Example: pairwright merge recipes/miniature/recipe.yaml model
    """
    from flows.merging import merge_model

    for line in merge_model(
        recipe, output, settings_of(settings), store, dtype, push_to_hub, private
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

    print(record_deployment(recipe, cron, settings_of(settings), store))


@app.command()
def up(
    store: StoreUrl = None,
    port: Annotated[int, typer.Option(help="Of the Prefect server and its pages.")] = 4200,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    argilla_port: Annotated[int, typer.Option(help="Of Argilla, where recipes use it.")] = 6900,
    argilla_url: ArgillaUrl = None,
) -> None:
    """Start Prefect and, where recipes use it, Argilla; serve all deployed recipes until Ctrl-C.

    Example: pairwright up --port 4200
    """
    from flows.deploy import serve_all

    use_argilla(argilla_url)
    serve_all(store or "store", host, port, argilla_port)


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

    values = settings_of(settings)
    timings = run_now(recipe, values, store, as_json, dataset_only)
    if report and as_json:
        print(json.dumps(report_document(recipe, values, store, dataset_only)))
    elif report:
        show(*report_tables(recipe, values, store, dataset_only, timings))
