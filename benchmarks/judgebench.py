"""Are the replies of real judges read right, and do JudgeBench's figures come out?

    python benchmarks/judgebench.py path/to/judgebench

The folder holds `pairs.parquet` (pair_id, label) and `judgments.parquet` (pair_id, judge, order,
reply, score_first, score_second, decision_as_shown), or the benchmark's own `*.jsonl` outputs, or
both. Every reply is read by the `arena_hard` grammar and compared with how the benchmark's own code
read it; what differs is listed with the reason. The figures are the benchmark's (Tan et al. 2024,
"JudgeBench", utils/metrics.py):

* accuracy: share of pairs with more verdicts for the right answer than for the wrong one, of the
  two orders;
* consistent: share of pairs with the same decision in both orders, a tie or none included;
* first: share of the verdicts for a side that are for the answer shown first;
* unread: share of pairs with a reply that holds no verdict.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from table import write_table

from judging.verdicts import arena_hard
from preferences.errors import InputError

KNOWN = {
    "arena_hard/o1-mini-2024-09-12": ["65.7%", "68.6%", "", ""],
    "arena_hard/claude-3-haiku-20240307": ["32%", "50%", "63%", "4.8%"],
    "reward_model": ["59–64%", "", "", ""],
}
"""Accuracy, consistent, first and unread as they are known, by judge or kind of judge."""
DECISIONS = {"first": "A>B", "second": "B>A", "tie": "A=B", None: None}
SWAPPED = {"A>B": "B>A", "B>A": "A>B"}


@dataclass(frozen=True)
class Said:
    """What a judge said of a pair in one order, and how the benchmark read it."""

    pair_id: str
    judge: str
    is_swapped: bool
    reply: str
    scores: tuple[float, float] | None
    theirs: str | None
    label: str

    @property
    def ours(self) -> str | None:
        """The decision as shown, by the project's grammar or the scores."""
        if self.scores is None:
            return DECISIONS[arena_hard(self.reply)]
        first, second = self.scores
        return "A=B" if first == second else "A>B" if first > second else "B>A"


def read_folder(folder: Path) -> list[Said]:
    """Everything that is said in a folder."""
    found = [said for path in sorted(folder.glob("*.jsonl")) for said in _outputs(path)]
    if (folder / "judgments.parquet").is_file():
        found += _tables(folder)
    if not found:
        raise InputError(f"{folder}: no judgments.parquet and no *.jsonl; name JudgeBench's folder")
    return found


def _tables(folder: Path) -> Iterator[Said]:
    labels = {r["pair_id"]: r["label"] for r in pq.read_table(folder / "pairs.parquet").to_pylist()}
    for row in pq.read_table(folder / "judgments.parquet").to_pylist():
        first, second = row["score_first"], row["score_second"]
        yield Said(
            row["pair_id"],
            row["judge"],
            row["order"] == "BA",
            row["reply"] or "",
            None if first is None or second is None else (first, second),
            row["decision_as_shown"],
            labels[row["pair_id"]],
        )


def _outputs(path: Path) -> Iterator[Said]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for number, judgment in enumerate(row["judgments"]):
            if judgment is not None:
                made = judgment["judgment"]
                scores = made.get("scores")
                yield Said(
                    row["pair_id"],
                    f"{row['judge_name']}/{made['judge_model']}",
                    number == 1,
                    made["response"],
                    (scores[0], scores[1]) if scores else None,
                    judgment["decision"],
                    row["label"],
                )


def figures(said: Sequence[Said], read: Callable[[Said], str | None]) -> list[str]:
    """Accuracy, consistent, first and unread of one judge."""
    shown: Counter[str | None] = Counter(map(read, said))
    by_pair: dict[str, list[Said]] = defaultdict(list)
    for one in said:
        by_pair[one.pair_id].append(one)
    found: Counter[str] = Counter()
    for of_pair in by_pair.values():
        decisions = [_unswapped(read(one)) if one.is_swapped else read(one) for one in of_pair]
        label = of_pair[0].label
        right = sum((d == label) - (d == SWAPPED[label]) for d in decisions)
        found["accuracy"] += right > 0
        found["consistent"] += len(decisions) == 2 and decisions[0] == decisions[1]
        found["unread"] += None in decisions
    pairs, sides = len(by_pair), shown["A>B"] + shown["B>A"]
    return [
        f"{found['accuracy'] / pairs:.1%}",
        f"{found['consistent'] / pairs:.1%}",
        f"{shown['A>B'] / sides:.1%}" if sides else "",
        f"{found['unread'] / pairs:.1%}",
    ]


def _unswapped(decision: str | None) -> str | None:
    return SWAPPED.get(decision, decision) if decision else None


def why(said: Said) -> str:
    """The reason for which the two readings of a reply differ."""
    labels = sorted(set(re.findall(r"\[\[([AB<>=]+)\]\]", said.reply)))
    if said.theirs is None and said.ours is not None and len(labels) > 1:
        return f"it says {' and '.join(labels)}: two labels, and one winner"
    return f"it says {' and '.join(labels) or 'no label'}"


def report(said: Sequence[Said]) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and a note on what is read otherwise."""
    by_judge: Mapping[str, list[Said]] = defaultdict(list)
    for one in said:
        by_judge[one.judge].append(one)
    header = ["judge", "read by", "replies", "read otherwise"]
    header += ["accuracy", "consistent", "first", "unread"]
    rows, notes = [], []
    for judge, its in sorted(by_judge.items()):
        differ = [one for one in its if one.ours != one.theirs]
        count = f"{len(its):,}"
        rows.append([judge, "Pairwright", count, str(len(differ)), *figures(its, lambda s: s.ours)])
        rows.append([judge, "JudgeBench", count, "", *figures(its, lambda s: s.theirs)])
        known = KNOWN.get(judge, KNOWN.get(judge.split("/")[0]))
        if known is not None:
            rows.append([judge, "known", "", "", *known])
        notes += [
            f"* {judge}, pair {one.pair_id}{', swapped' if one.is_swapped else ''}: JudgeBench "
            f"{one.theirs or 'nothing'}, Pairwright {one.ours or 'nothing'}; {why(one)}."
            for one in differ
        ]
    return header, rows, "Read otherwise:\n\n" + ("\n".join(notes) or "nothing.")


def main() -> None:
    """Read, compare, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="JudgeBench's replies and pairs")
    header, rows, note = report(read_folder(parser.parse_args().folder))
    write_table("judgebench", header, rows, note)


if __name__ == "__main__":
    main()
