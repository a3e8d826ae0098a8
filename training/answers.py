"""Single answers as tokens: the best of each prompt, or those that were liked and disliked.

They come from a dataset in any of three forms, told apart by their columns:

* preferences, as builds write them: `prompt`, `chosen`, `rejected`, `prompt_id`, `chosen_id`,
  `rejected_id`, and `margin` if there is one;
* ranked answers, as `pairwright export --format ranking` writes them: `prompt`, `completions`,
  `scores`, `prompt_id`;
* one answer a row, as TRL has it and `pairwright export --format kto` writes it: `prompt`,
  `completion` (or `response`) and, where answers were liked or not, `label`. Prompt and answer are
  messages or plain texts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preferences.conversations import parse_messages
from preferences.errors import InputError
from preferences.export import as_dicts, kto_rows
from preferences.records import Dropped, Message, Messages, Triplet, messages_from, prompt_identity
from training.data import HeldOutPrompt, SplitCounts, held_out_prompt, tokenize_answer

PREFERENCES = ("prompt", "chosen", "rejected", "prompt_id", "chosen_id", "rejected_id")
RANKED = ("prompt", "completions", "scores", "prompt_id")
ANSWER_NAMES = ("completion", "response")
FORMS = (
    f"preferences ({', '.join(PREFERENCES)}), ranked answers ({', '.join(RANKED)}) or one answer a "
    "row (prompt, completion, label)"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a prompt."""

    prompt_id: str
    answer_id: str
    prompt: Messages
    answer: Messages
    liked: bool = True


@dataclass(frozen=True, slots=True)
class Answers:
    """One split, tokenized."""

    rows: Any
    """A `datasets.Dataset` with `prompt_ids`, `answer_ids`, `label` and `prompt_id`. An answer's
    tokens include the one that ends it; `label` says whether it is liked."""
    prompts: tuple[HeldOutPrompt, ...]
    """Its distinct prompts in the order of their ids, which is random and stable."""
    counts: SplitCounts
    dropped: tuple[Dropped, ...]


def best_answers(dataset: Path, split: str) -> tuple[list[Answer], list[Dropped]] | None:
    """The answers of a split that are worth imitating, and those that are not; None where the
    dataset has no such split.

    Of preferences it is each prompt's best, once: the one that fewest pairs reject and, of several,
    the one whose margin over some other is largest. Of ranked answers it is the one with the
    highest score. Of single answers it is every one that is not disliked.
    """
    table = _table(dataset, split)
    if table is None:
        return None
    if _has(table, PREFERENCES):
        return [_best_of_pairs(pairs) for pairs in _by_prompt(table)], []
    if _has(table, RANKED):
        return [_best_of_ranked(row) for row in table], []
    answers = [_single(row, f"{split} row {n}") for n, row in enumerate(table, 1)]
    disliked = [a for a in answers if not a.liked]
    return [a for a in answers if a.liked], [_dropped(a, "disliked") for a in disliked]


def liked_and_disliked(dataset: Path, split: str) -> tuple[list[Answer], list[Dropped]] | None:
    """The answers of a split with what was thought of them; None where there is no such split.

    A chosen answer of a preference dataset counts as liked and a rejected one as disliked, each
    once; what won one pair and lost another is neither, and is dropped.
    """
    table = _table(dataset, split)
    if table is None:
        return None
    if not _has(table, PREFERENCES):
        if not _has(table, ("label",)):
            raise InputError(
                f"{dataset}: no likes in the {split} split (its columns are "
                f"{', '.join(table[0])}); give preferences, or rows of prompt, completion, label"
            )
        answers = [_single(row, f"{split} row {n}") for n, row in enumerate(table, 1)]
        return answers, []
    pairs = [_triplet(row) for of_prompt in _by_prompt(table) for row in of_prompt]
    answers = [
        Answer(
            row["prompt_id"],
            row["candidate_id"],
            messages_from(row["prompt"]),
            messages_from(row["completion"]),
            row["label"],
        )
        for row in kto_rows(pairs)
    ]
    kept = {answer.answer_id for answer in answers}
    both = {
        identity: pair.prompt_id
        for pair in pairs
        for identity in (pair.chosen_id, pair.rejected_id)
        if identity not in kept
    }
    return answers, [
        Dropped("training", identity, prompt_id, "liked_and_disliked")
        for identity, prompt_id in both.items()
    ]


def tokenize(
    answers: Iterable[Answer],
    left_out: Sequence[Dropped],
    tokenizer: Any,
    *,
    ends: Collection[int],
    max_length: int,
    where: str,
) -> Answers:
    """Answers as tokens; `left_out` are those that were no longer among them.

    What is longer than `max_length`, prompt and answer together, is dropped and not cut: a cut
    answer has no end token and teaches the model not to stop. Raises InputError where nothing is
    left.
    """
    import datasets

    columns: dict[str, list[Any]] = {n: [] for n in ("prompt_ids", "answer_ids")}
    labels: list[bool] = []
    prompt_ids: list[str] = []
    prompts: dict[str, HeldOutPrompt] = {}
    dropped = list(left_out)
    shifted = unended = 0
    for answer in answers:
        asked, answered = as_dicts(answer.prompt), as_dicts(answer.answer)
        tokens, reason, detail = tokenize_answer(
            asked, answered, tokenizer, ends=ends, max_length=max_length
        )
        if tokens is None:
            dropped.append(_dropped(answer, reason, detail))
            continue
        shifted += tokens.boundary_shifted
        unended += tokens.without_end
        columns["prompt_ids"].append(tokens.prompt)
        columns["answer_ids"].append(tokens.answer)
        labels.append(answer.liked)
        prompt_ids.append(answer.prompt_id)
        if answer.prompt_id not in prompts:
            prompts[answer.prompt_id] = held_out_prompt(answer.prompt_id, asked, tokenizer)
    reasons = [drop.reason for drop in dropped]
    counts = SplitCounts(
        rows=len(labels) + len(dropped),
        kept=len(labels),
        dropped={reason: reasons.count(reason) for reason in sorted(set(reasons))},
        boundary_shifted=shifted,
        without_end=unended,
    )
    if not labels:
        why = ", ".join(f"{reason} {number}" for reason, number in counts.dropped.items())
        raise InputError(
            f"{where}: none of its {counts.rows} answers can be trained on ({why or 'it is empty'})"
            f"; raise max_length, now {max_length}, or mend the dataset"
        )
    rows = datasets.Dataset.from_dict({**columns, "label": labels, "prompt_id": prompt_ids})
    return Answers(rows, tuple(prompts[p] for p in sorted(prompts)), counts, tuple(dropped))


def _table(dataset: Path, split: str) -> list[dict[str, Any]] | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted((dataset / "data").glob(f"{split}-*.parquet"))
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            rows += pq.read_table(file).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: not a readable Parquet file ({error})") from None
    if not files:
        return None
    if not rows:
        raise InputError(f"{dataset}: the {split} split has no rows")
    single = _has(rows, ("prompt",)) and any(name in rows[0] for name in ANSWER_NAMES)
    if not (single or _has(rows, PREFERENCES) or _has(rows, RANKED)):
        raise InputError(
            f"{files[0]}: its columns are {', '.join(rows[0])}; a dataset to train on has {FORMS}"
        )
    return rows


def _has(table: Sequence[Mapping[str, Any]], names: Iterable[str]) -> bool:
    return all(name in table[0] for name in names)


def _by_prompt(table: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """The rows of each prompt, in the order in which prompts first come."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in table:
        groups.setdefault(row["prompt_id"], []).append(row)
    yield from groups.values()


def _best_of_pairs(pairs: Sequence[Mapping[str, Any]]) -> Answer:
    lost = [pair["rejected_id"] for pair in pairs]

    def worth(pair: Mapping[str, Any]) -> tuple[int, float, str]:
        return lost.count(pair["chosen_id"]), -(pair.get("margin") or 0.0), pair["chosen_id"]

    best = min(pairs, key=worth)
    prompt, answer = messages_from(best["prompt"]), messages_from(best["chosen"])
    return Answer(best["prompt_id"], best["chosen_id"], prompt, answer)


def _best_of_ranked(row: Mapping[str, Any]) -> Answer:
    best = max(range(len(row["scores"])), key=lambda n: (row["scores"][n], -n))
    ids = row.get("candidate_ids") or [f"{row['prompt_id']}/{n}" for n in range(len(row["scores"]))]
    answer = (Message("assistant", row["completions"][best]),)
    return Answer(row["prompt_id"], ids[best], messages_from(row["prompt"]), answer)


def _single(row: Mapping[str, Any], place: str) -> Answer:
    said = next(row[name] for name in ANSWER_NAMES if name in row)
    prompt, answer = (_messages(row["prompt"], "user", place), _messages(said, "assistant", place))
    label = row.get("label", True)
    if not isinstance(label, bool) and label not in (0, 1):
        raise InputError(f"{place}: the label is {label!r}; it has to be true or false")
    prompt_id = row.get("prompt_id") or prompt_identity(prompt)
    answer_id = row.get("candidate_id") or f"{prompt_id}@{place}"
    return Answer(str(prompt_id), str(answer_id), prompt, answer, bool(label))


def _messages(value: Any, role: str, place: str) -> Messages:
    return (Message(role, value),) if isinstance(value, str) else parse_messages(value, place)


def _triplet(row: Mapping[str, Any]) -> Triplet:
    return Triplet(
        preference_id=f"{row['chosen_id']}>{row['rejected_id']}",
        prompt_id=row["prompt_id"],
        prompt=messages_from(row["prompt"]),
        chosen=messages_from(row["chosen"]),
        rejected=messages_from(row["rejected"]),
        chosen_id=row["chosen_id"],
        rejected_id=row["rejected_id"],
        chosen_model="",
        rejected_model="",
        probability=1.0,
        margin=0.0,
    )


def _dropped(answer: Answer, reason: str, detail: str = "") -> Dropped:
    return Dropped("training", answer.answer_id, answer.prompt_id, reason, detail)
