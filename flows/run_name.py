"""What a flow's run is called on Prefect's pages."""

from __future__ import annotations

from pathlib import Path


def run_name() -> str:
    """`build household`: the flow, and the recipe by its own name, or by its file's."""
    import yaml
    from prefect.runtime import flow_run

    path = Path(flow_run.parameters["recipe"])
    try:
        name = yaml.safe_load(path.read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        name = path.stem  # The flow says what is wrong with the recipe.
    return f"{flow_run.flow_name} {name}"
