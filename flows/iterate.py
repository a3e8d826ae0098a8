"""The iterate flow: build, align, evaluate, and again with the new policy in place of the old."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.align import align
from flows.build import build
from flows.progress import current
from flows.recipe import load_recipe
from flows.rounds import go_round, policy_of, rounds_of, rounds_table
from flows.run_name import run_name
from preferences.card import markdown_table
from preferences.store import Store


@flow(name="iterate", flow_run_name=run_name, validate_parameters=False)
def iterate(
    recipe: str,
    rounds: int | None = None,
    settings: dict[str, str] | None = None,
    store: str | None = None,
) -> str | None:
    """Go round until that is no gain; returns the model that is kept, or None while a round waits
    for people.

    `rounds` is the most there may be, in place of the recipe's. What is done is not done again.
    """
    progress = current()
    loaded = load_recipe(recipe, settings)
    place = Store(store or loaded.runtime.store)

    def carry_out(path: Path) -> bool:
        progress.say(f"{path.stem}: {path}")
        dataset = build(str(path), None, place.url)
        if dataset is None:
            return False
        align(str(path), dataset, None, place.url)
        return True

    done, found = go_round(loaded, place, rounds_of(loaded, rounds), carry_out)
    table = rounds_table(done, found)
    text = f"{markdown_table(table.header, table.rows)}\n\n{table.note}"
    create_markdown_artifact(markdown=text, key="rounds")
    if not found.over:
        return None
    if found.kept == 0:
        return loaded.model_before()[0]
    return str(policy_of(Path(done[found.kept - 1].recipe), place))
