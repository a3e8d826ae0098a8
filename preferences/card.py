"""The dataset card: what is in it, where it came from, what was dropped, how to make it again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from preferences.judge_tables import judge_costs, judge_tables
from preferences.reliability import reliability_table, reliability_words
from preferences.store import Manifest


@dataclass(frozen=True)
class DatasetFacts:
    """What can be said of the triplets of a dataset."""

    rows: int
    prompts: int
    mean_probability: float
    chosen_longer: float
    """Share of the pairs in which the chosen answer has more characters; well above one half, a
    model can learn length instead of quality."""
    chosen_characters: float
    """Mean length of the chosen answers."""
    rejected_characters: float


def dataset_facts(tables: Iterable[pa.Table]) -> DatasetFacts | None:
    """Facts of triplets in Arrow tables, read one table at a time; None where there are none."""
    rows = prompts = longer = 0
    probability = chosen_length = rejected_length = 0.0
    last = None
    for table in tables:
        if not table.num_rows:
            continue
        rows += table.num_rows
        ids = table["prompt_id"].to_pylist()
        # Sorted by prompt: a prompt's rows stand together, at most split between two tables.
        prompts += sum(a != b for a, b in zip([last, *ids], ids, strict=False))
        last = ids[-1]
        probability += pc.sum(table["probability"]).as_py()
        chosen, rejected = _lengths(table["chosen"]), _lengths(table["rejected"])
        chosen_length += pc.sum(chosen).as_py()
        rejected_length += pc.sum(rejected).as_py()
        longer += pc.sum(pc.greater(chosen, rejected)).as_py()
    if not rows:
        return None
    return DatasetFacts(
        rows,
        prompts,
        probability / rows,
        longer / rows,
        chosen_length / rows,
        rejected_length / rows,
    )


def _lengths(column: pa.ChunkedArray) -> pa.Array:
    # One assistant message in each row, so the flat list has a message per row.
    messages = pc.list_flatten(column.combine_chunks())
    return pc.utf8_length(pc.struct_field(messages, "content"))


def dataset_card(
    name: str,
    description: str,
    license: str | None,
    sides: Mapping[str, DatasetFacts | None],
    stages: Sequence[Manifest],
    recipe: str,
) -> str:
    """A README.md for people and for the Hub. `recipe` is the YAML that makes the dataset."""
    blocks = [
        _front_matter(license, sides),
        f"# {name}",
        description or "Preference pairs: a prompt, an answer to prefer, and one to prefer it to.",
        "## Contents",
        _contents(sides),
        "## How it was made",
        _stages(stages),
        *_judges(stages),
        "## What was dropped",
        _dropped(stages),
        "## Fields",
        _FIELDS,
        "## Make it again",
        f"{_fenced(recipe)}\n\n"
        "`pairwright build recipe.yaml` makes the same rows from the same inputs.",
    ]
    return "\n\n".join(blocks) + "\n"


_FIELDS = """\
| field | meaning |
|---|---|
| `prompt` | the conversation up to the answer, as messages |
| `chosen`, `rejected` | the answer to prefer, and the other, as one assistant message each |
| `probability` | P(chosen beats rejected) by the ranking of all judgments, 0.5 to 1 |
| `margin` | difference of the two posterior means, in logits |
| `prompt_id`, `chosen_id`, `rejected_id`, `preference_id` | identities, for `pairwright trace` |
| `chosen_model`, `rejected_model` | who wrote the answers |"""


def _fenced(text: str) -> str:
    """As a block of YAML, whatever backticks are in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}yaml\n{text.strip()}\n{fence}"


def _front_matter(license: str | None, sides: Mapping[str, DatasetFacts | None]) -> str:
    lines = ["---"]
    if license:
        lines.append(f"license: {json.dumps(license)}")
    lines += ["tags:", "- preference", "- dpo", "- pairwright"]
    lines += ["configs:", "- config_name: default", "  data_files:"]
    for split, facts in sides.items():
        if facts is not None:
            lines += [f"  - split: {split}", f"    path: data/{split}-*.parquet"]
    return "\n".join([*lines, "---"])


def _contents(sides: Mapping[str, DatasetFacts | None]) -> str:
    rows = [
        [
            split,
            f"{facts.rows:,}",
            f"{facts.prompts:,}",
            f"{facts.mean_probability:.3f}",
            f"{facts.chosen_longer:.1%}",
            f"{facts.chosen_characters:,.0f} / {facts.rejected_characters:,.0f}",
        ]
        for split, facts in sides.items()
        if facts is not None
    ]
    header = ["split", "pairs", "prompts", "mean probability", "chosen longer", "mean characters"]
    return markdown_table(header, rows)


def _stages(stages: Sequence[Manifest]) -> str:
    rows = [
        [m.name, f"{m.rows:,}", f"{m.dropped:,}", f"`{m.stage}/{m.fingerprint}`"] for m in stages
    ]
    return markdown_table(["stage", "rows", "dropped", "artifact"], rows)


def _judges(stages: Sequence[Manifest]) -> list[str]:
    rankings = next((m for m in stages if "agreement" in m.summary), None)
    if rankings is None:
        return []
    blocks = []
    for table in judge_tables(rankings.summary["agreement"], judge_costs(stages)):
        blocks += [f"## {table.title}", markdown_table(table.header, table.rows)]
        blocks += [table.note] if table.note else []
    blocks += [f"**Missing judgments.** {a}" for m in stages for a in m.summary.get("alarms", ())]
    blocks += ["## Probabilities", reliability_words(rankings.summary)]
    if (bins := reliability_table(rankings.summary)) is not None:
        blocks += ["![Reliability diagram](reliability.svg)"]
        blocks += [markdown_table(bins.header, bins.rows)]
    return blocks


def _dropped(stages: Sequence[Manifest]) -> str:
    rows = [
        [m.name, reason.replace("_", " "), f"{count:,}"]
        for m in stages
        for reason, count in m.summary.get("dropped", {}).items()
    ]
    return markdown_table(["stage", "reason", "rows"], rows) if rows else "Nothing."


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; bars in cells are escaped, and line breaks are spaces."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).splitlines()).replace("|", "\\|")
