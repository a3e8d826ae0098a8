"""Writing a finished dataset to a folder, and sending it to the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from flows.running import planned
from flows.train import local_folder
from preferences.card import markdown_table
from preferences.errors import InputError
from preferences.export import export, ranking_rows, require_new, write_rows
from preferences.hub import push_to_hub
from preferences.records import Candidate, Prompt, Ranking


def export_dataset(
    recipe: Path,
    output: Path,
    form: str,
    settings: Mapping[str, str],
    store: str | None,
    repository: str | None,
    private: bool,
) -> Iterator[str]:
    """Yields a line for each thing that was done."""
    plan, place = planned(recipe, settings, store, dataset_only=True)
    if place.manifest(plan.dataset) is None:
        raise InputError(f"{plan.recipe.name}: not built yet; run `pairwright build {recipe}`")
    if form == "ranking":
        require_new(output)
        candidates = {c.candidate_id: c for a in plan.candidates for c in place.read(a, Candidate)}
        prompts = {p.prompt_id: p for p in place.read(plan.prompts, Prompt)}
        rows = ranking_rows(place.read(plan.rankings, Ranking), prompts, candidates)
        (output / "data").mkdir(parents=True)
        counts = {"train": write_rows(output / "data" / "train-000-of-001.parquet", rows)}
        table = markdown_table(["split", "prompts"], [[s, str(n)] for s, n in counts.items()])
        (output / "README.md").write_text(
            f"# {plan.recipe.name}, ranked answers\n\n{table}\n", encoding="utf-8"
        )
    else:
        with local_folder(place, plan.dataset) as folder:
            counts = export(folder, output, form, plan.recipe.name)
    yield f"Wrote {output}: " + ", ".join(f"{n:,} {split} rows" for split, n in counts.items())
    if repository is not None:
        yield f"Pushed to {push_to_hub(output, repository, 'dataset', private)}"
