"""The model card: what a model was made of, on which data, how well it did, on which terms."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from preferences.card import markdown_table
from preferences.estimate import Estimate
from preferences.store import Manifest
from training.models import Dtype
from training.run import TrainingResult

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    name: str,
    result: TrainingResult,
    stages: Sequence[Manifest],
    recipe: str,
    *,
    evaluation: Mapping[str, Estimate] | None = None,
    license: str | None = None,
    description: str = "",
    dataset: str | None = None,
    merged: Dtype | None = None,
) -> str:
    """A README.md for people and for the Hub.

    `stages` are the manifests that led to the model, from the prompts on; `recipe` is the YAML that
    makes it again; `evaluation` has what was measured on held-out prompts, by name; `dataset` is a
    repository of the Hub; `merged` the numbers of a merged model, or None for an adapter or for
    full weights as they are.
    """
    whole = merged is not None or result.saved == "model"
    blocks = [
        _front_matter(result, license, dataset, whole),
        f"# {_line(name)}",
        description.strip() or f"{_base(result)} aligned by {result.method}.",
        "## Training",
        _training(result, merged),
        "## Measures",
        _measures(result, evaluation or {}),
        "## Lineage",
        _lineage(stages),
        "## Use",
        _use(result, whole),
        "## Make it again",
        f"{_fenced(recipe)}\n\n`pairwright run recipe.yaml` makes the dataset and the model.",
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter(
    result: TrainingResult, license: str | None, dataset: str | None, whole: bool
) -> str:
    lines = ["---"]
    if license:
        lines.append(f"license: {json.dumps(license)}")
    if HUB_ID.fullmatch(result.model):  # a folder's name means nothing to the Hub
        relation = "finetune" if whole else "adapter"
        lines += [f"base_model: {result.model}", f"base_model_relation: {relation}"]
    if dataset:
        lines += ["datasets:", f"- {json.dumps(dataset)}"]
    lines += [f"library_name: {'transformers' if whole else 'peft'}"]
    task = "text-classification" if result.method == "reward" else "text-generation"
    lines += [f"pipeline_tag: {task}", "tags:", "- preference"]
    lines += [f"- {result.method}", "- pairwright", "---"]
    return "\n".join(lines)


def _base(result: TrainingResult) -> str:
    """The base model's name; of a folder only the last part, for the rest is a machine's."""
    if HUB_ID.fullmatch(result.model):
        return f"[{result.model}](https://huggingface.co/{result.model})"
    return f"`{result.model.rstrip('/').rsplit('/', 1)[-1]}`"


def _training(result: TrainingResult, merged: Dtype | None) -> str:
    dropped = sum(result.train.dropped.values())
    rows = [
        ["base model", _base(result)],
        ["method", result.method],
        ["weights", result.weights + (f", merged in {merged}" if merged else "")],
        ["trained parameters", f"{result.trainable_parameters:,}"],
        ["trained on", f"{result.train.kept:,} rows, {dropped:,} more dropped"],
        ["saved", f"step {result.saved_step:,} of {result.planned_steps:,}"],
        ["run", f"`{result.fingerprint}`"],
    ]
    table = markdown_table(["", ""], rows)
    return f"{table}\n\n{result.reason}" if result.reason else table


def _measures(result: TrainingResult, evaluation: Mapping[str, Estimate]) -> str:
    tables = []
    if evaluation:
        measured = [
            [what, f"{e.mean:.3f}", f"{e.low:.3f} to {e.high:.3f}", f"{e.clusters:,}"]
            for what, e in evaluation.items()
        ]
        header = ["on held-out prompts", "mean", "95 % interval", "prompts"]
        tables.append(markdown_table(header, measured))
    logged = {**result.metrics, **result.evaluation}
    rows = [[what, f"{value:.4g}"] for what, value in logged.items()]
    if rows:
        tables.append(markdown_table(["at the end of training", ""], rows))
    return "\n\n".join(tables) or "None were taken."


def _lineage(stages: Sequence[Manifest]) -> str:
    rows = [
        [m.name, f"{m.rows:,}", f"{m.dropped:,}", f"`{m.stage}/{m.fingerprint}`"] for m in stages
    ]
    return markdown_table(["stage", "rows", "dropped", "artifact"], rows) if rows else "Unknown."


def _use(result: TrainingResult, whole: bool) -> str:
    if whole:
        return "```\nvllm serve FOLDER\n```\n\nor `AutoModelForCausalLM.from_pretrained(FOLDER)`."
    if result.weights in ("bottleneck", "bitfit"):
        return (
            "```python\nfrom training.saved_adapters import load_trained\n\n"
            "model = load_trained(AutoModelForCausalLM.from_pretrained(BASE), Path(FOLDER))\n```"
        )
    code = (
        "```python\nfrom peft import PeftModel\n\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)\n"
        "```"
    )
    if result.weights in ("qlora", "qdora"):
        code += "\n\nIt fits the base in 4 bits alone (NF4, double quantisation): load that so."
    return code


def _line(text: str) -> str:
    return " ".join(text.split())


def _fenced(text: str) -> str:
    """As a block of YAML, whatever backticks are in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}yaml\n{text.strip()}\n{fence}"
