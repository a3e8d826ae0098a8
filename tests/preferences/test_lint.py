"""What is wrong with a dataset is found before anything is trained on it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, mannwhitneyu

from preferences import lint as rules
from preferences.errors import InputError
from preferences.lint import Finding, lint
from preferences.overlap import overlaps
from preferences.pair_table import PairTable, pair_table, refuses
from preferences.records import Message, Prompt, Triplet
from preferences.store import Artifact, Manifest, Shard, Store
from preferences.telling import area_under_curve, share_of
from preferences.text_pairs import TextPair, read_pairs


def pair(chosen: str, rejected: str, prompt: str = "Why?", **values: Any) -> TextPair:
    """A pair of the training split with an id of its own."""
    named = {"pair_id": f"{chosen}>{rejected}", "split": "train"} | values
    return TextPair(prompt=prompt, chosen=chosen, rejected=rejected, **named)


def table(*pairs: TextPair) -> PairTable:
    return pair_table(pairs)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def found(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.rule: finding for finding in findings}


def test_a_clean_dataset_has_figures_only() -> None:
    pairs = [pair("up we go", "down", f"prompt {n}") for n in range(3)]
    pairs += [pair("no", "certainly", f"another {n}") for n in range(3)]
    findings = [f for rule in rules.RULES if (f := rule(table(*pairs))) is not None]
    assert {f.level for f in findings} == {"info"}
    assert [f.rule for f in findings] == ["length", "refusals", "splits", "probabilities"]


def test_empty_texts_are_errors() -> None:
    finding = rules.empty_texts(
        table(pair("yes", " \n"), pair("", "no"), pair("a", "b", " "), pair("a", "b"))
    )
    assert finding is not None
    assert (finding.level, finding.count) == ("error", 3)
    assert finding.examples == ("yes> \n", ">no", "a>b")


def test_an_answer_preferred_to_itself_is_an_error() -> None:
    finding = rules.equal_answers(table(pair("so it is", " so  it\nis"), pair("so", "So")))
    assert finding is not None
    assert finding.examples == ("so it is> so  it\nis",)


def test_contradictions_are_errors_and_both_pairs_are_named() -> None:
    finding = rules.contradictory_pairs(
        table(pair("a", "b"), pair("b ", "a"), pair("b", "a", "When?"), pair("c", "c"))
    )
    assert finding is not None
    assert (finding.level, finding.count) == ("error", 2)
    assert finding.examples == ("a>b", "b >a")


def test_copies_are_counted_without_the_first() -> None:
    copies = [pair("a", "b", pair_id=f"{n}") for n in range(3)]
    finding = rules.duplicate_pairs(table(*copies, pair("a", "b", "When?"), pair("b", "a")))
    assert finding is not None
    assert (finding.level, finding.count, finding.examples) == ("warning", 2, ("1", "2"))


def test_a_circle_of_three_is_found_and_a_chain_is_none() -> None:
    chain = [pair("a", "b"), pair("b", "c"), pair("a", "c"), pair("c", "d")]
    assert rules.circular_pairs(table(*chain)) is None
    # The same answers to another prompt do not close the chain.
    assert rules.circular_pairs(table(*chain, pair("d", "b", "When?"))) is None
    finding = rules.circular_pairs(table(*chain, pair("d", "b")))
    assert finding is not None
    assert (finding.level, finding.count) == ("warning", 1)
    assert finding.examples[0] in {"b>c", "c>d", "d>b"}


@settings(max_examples=60, deadline=None)
@given(st.permutations("abcdefg"), st.randoms())
def test_pairs_that_agree_with_an_order_never_form_a_circle(order: list[str], draw: Random) -> None:
    pairs = [pair(*two) for two in itertools.combinations(order, 2)]
    draw.shuffle(pairs)
    assert rules.circular_pairs(table(*pairs)) is None
    assert rules.contradictory_pairs(table(*pairs)) is None


def test_two_answers_that_contradict_each_other_are_no_circle() -> None:
    assert rules.circular_pairs(table(pair("a", "b"), pair("b", "a"), pair("b", "c"))) is None


def test_a_prompt_on_both_sides_is_an_error() -> None:
    finding = rules.prompts_in_two_splits(
        table(
            pair("a", "b", "Why  not?"),
            pair("a", "c", "Why not?", split="test", pair_id="leak"),
            pair("a", "d", "Why not?", split="test", pair_id="again"),
            pair("a", "b", "When?", split="test"),
        )
    )
    assert finding is not None
    assert (finding.level, finding.count, finding.examples) == ("error", 1, ("leak", "again"))


@pytest.mark.parametrize("value", [0.49, -0.1, 1.01, math.inf])
def test_a_probability_that_speaks_against_its_label_is_an_error(value: float) -> None:
    good = [pair("a", "b", probability=p) for p in (0.5, 1.0, None)]
    assert rules.impossible_probabilities(table(*good)) is None
    finding = rules.impossible_probabilities(table(*good, pair("c", "d", probability=value)))
    assert finding is not None
    assert (finding.level, finding.examples) == ("error", ("c>d",))


def by_length(longer: int, shorter: int, equal: int = 0) -> PairTable:
    """So many pairs, each of a prompt of its own, whose chosen answer is longer, shorter, equal."""
    kinds = ["aaaa b"] * longer + ["b aaaa"] * shorter + ["aa bb"] * equal
    return table(*(pair(*kind.split(), f"prompt {n}") for n, kind in enumerate(kinds)))


def test_length_that_tells_the_label_is_warned_of() -> None:
    # 80 of 100: Wilson's interval is 71.1 % to 86.7 %, above 65 %.
    finding = rules.length(by_length(80, 20))
    assert finding is not None
    assert finding.level == "warning"
    assert "longer one in 80.0% (71.1% to 86.7%) of the pairs" in finding.detail
    # Chosen: 80 of length 4 and 20 of 1; rejected: 80 of 1 and 20 of 4. P(greater) = .8·.8 = .64,
    # P(equal) = .8·.2 + .2·.8 = .32, so the AUC is .64 + .16 = .80.
    assert "AUC of length for the label is 0.800" in finding.detail


def test_length_is_a_figure_while_its_interval_allows_for_chance() -> None:
    # 70 of 100 and (68 + 4/2) of 100: 60.4 % to 78.1 %, which reaches below 65 %.
    for table_of in (by_length(70, 30), by_length(68, 28, 4)):
        finding = rules.length(table_of)
        assert finding is not None
        assert finding.level == "info"
        assert "longer one in 70.0% (60.4% to 78.1%)" in finding.detail


def test_chosen_answers_that_are_always_the_shorter_are_warned_of_too() -> None:
    finding = rules.length(by_length(10, 90))
    assert finding is not None
    assert finding.level == "warning"


def test_pairs_of_one_prompt_are_no_evidence_of_many() -> None:
    finding = rules.length(table(*(pair("aaaa" + "a" * n, "b") for n in range(100))))
    assert finding is not None
    # One prompt: Wilson's interval of 1 of 1 is 20.7 % to 100 %.
    assert (finding.level, "20.7% to 100.0%" in finding.detail) == ("info", True)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40))
def test_the_interval_is_wilsons(wins: int, more: int) -> None:
    count = wins + more
    expected = binomtest(wins, count).proportion_ci(method="wilson")
    found = share_of(wins / count, count)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-6)


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=30)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, LENGTHS)
def test_the_area_under_the_curve_is_mann_and_whitneys(one: list[int], other: list[int]) -> None:
    u = mannwhitneyu(one, other).statistic
    area = area_under_curve(np.array(one), np.array(other))
    assert area == pytest.approx(u / (len(one) * len(other)))


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        ("I can’t help with that.", True),
        ("I'm sorry, but I cannot do this.", True),
        ("As an AI, I have no opinion.", True),
        ("I'm sorry to hear that. Here is what helps:", False),
        ("Sure. " + "x" * 200 + " I can't say more.", False),
        ("", False),
    ],
)
def test_refusals_are_known_by_how_they_open(answer: str, refusal: bool) -> None:
    assert refuses(answer) is refusal


def test_refusing_that_tells_the_label_is_warned_of() -> None:
    no, yes = "I cannot do that.", "Here you are."
    plain = [pair(yes, "Perhaps.", f"p{n}") for n in range(60)]
    finding = rules.refusals(table(*plain, *(pair(yes, no, f"r{n}") for n in range(40))))
    assert finding is not None
    assert (finding.level, finding.count) == ("warning", 40)
    assert "0.0% of the chosen and 40.0% of the rejected" in finding.detail
    assert "never to refuse" in finding.cure
    # As many the other way round: refusing says nothing of the label.
    balanced = [pair(*((yes, no) if n % 2 else (no, yes)), f"r{n}") for n in range(40)]
    finding = rules.refusals(table(*plain, *balanced))
    assert finding is not None
    assert finding.level == "info"
    # Eight of two hundred decide little, one-sided as they are (67.6 % to 100 %).
    many = [pair(yes, "Perhaps.", f"p{n}") for n in range(192)]
    few = rules.refusals(table(*many, *(pair(no, yes, f"r{n}") for n in range(8))))
    assert few is not None
    assert "100.0% (67.6% to 100.0%)" in few.detail
    assert few.level == "info"


def test_probabilities_are_counted_in_tenths() -> None:
    values = [0.5, 0.55, 0.6, 0.75, 0.95, 1.0, None, None]
    finding = rules.probabilities(table(*(pair("a", "b", probability=p) for p in values)))
    assert finding is not None
    # Of six: two below 0.6, one each to 0.7 and 0.8, none to 0.9, two above. Mean 4.35 / 6 = .725.
    assert finding.detail == (
        "mean 0.725; 0.5 to 0.6 33%, to 0.7 17%, to 0.8 17%, to 0.9 0%, to 1 33%"
    )
    assert finding.count == 6


def test_prompts_are_counted_by_split_and_category_once_each() -> None:
    of = table(
        pair("a", "b", "1", category="maths"),
        pair("b", "c", "1", category="maths"),
        pair("a", "b", "2", category="chat"),
        pair("a", "b", "3", category="chat", split="test"),
        pair("a", "b", "4"),
    )
    splits, categories = rules.splits(of), rules.categories(of)
    assert splits is not None
    assert splits.detail == "train 4 pairs of 3 prompts, test 1 pairs of 1 prompts"
    assert categories is not None
    assert categories.detail == "prompts: chat 2, maths 1"
    assert rules.categories(table(pair("a", "b"))) is None


def test_texts_over_the_limit_are_counted_with_their_prompt() -> None:
    of = table(pair("12345", "1", "12345"), pair("1", "123456", "12345"), pair("1", "2"))
    finding = rules.too_long(of, 10)
    assert finding is not None
    assert (finding.count, finding.examples) == (1, ("1>123456",))
    assert rules.too_long(of, 11) is None


WORDS = [f"word{n}" for n in range(14)]


def test_the_overlap_is_the_share_of_runs_of_eight_words_in_any_training_prompt() -> None:
    # Fourteen words have 7 runs of eight. The first training prompt has the runs of words 1 to 10,
    # that is 3; the second those of words 7 to 14, that is 1: 4 of 7.
    train = [pair("a", "b", " ".join(WORDS[:10])), pair("a", "b", ", ".join(WORDS[6:]).upper())]
    held_out = [pair("c", "d", " ".join(WORDS), split="test", pair_id="x")]
    assert overlaps(held_out, train) == {"x": pytest.approx(4 / 7)}


def test_a_short_prompt_overlaps_only_as_a_whole() -> None:
    train = [pair("a", "b", "Why is the sky blue"), pair("a", "b", "Sing a song of me please")]
    held_out = [
        pair("c", "d", "why is the sky blue?", pair_id="same words"),
        pair("c", "d", "Why is the sky", pair_id="fewer"),
        pair("c", "d", "?!", pair_id="no words"),
    ]
    assert overlaps(held_out, train) == {"same words": 1, "fewer": 0}


def rows_of(texts: list[tuple[str, str, str]], **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": p, "chosen": c, "rejected": r, **more} for p, c, r in texts]


def test_lint_reads_both_splits_and_puts_errors_first(tmp_path: Path) -> None:
    near = "please tell me in simple words how the engine of a car works"
    train = rows_of([(near, "It burns.", "No."), ("Hi", "Yes.", "Yes. "), ("Ho", "a", "b")])
    test = rows_of([(near + " now", "It burns.", "No."), ("Ho", "b", "c")], split="test")
    findings = lint(write(tmp_path / "pairs.jsonl", train + test), max_characters=70)
    assert [f.rule for f in findings if f.level != "info"] == [
        "equal_answers",
        "prompts_in_two_splits",
        "too_long",
        "near_duplicate_prompts",
    ]
    by_rule = found(findings)
    assert by_rule["equal_answers"].examples == ("pairs.jsonl:2",)
    assert by_rule["prompts_in_two_splits"].examples == ("pairs.jsonl:5",)
    # 60 characters of the prompt, 4 of " now" and 9 of the answer are 73.
    assert by_rule["too_long"].examples == ("pairs.jsonl:4",)
    assert by_rule["near_duplicate_prompts"].examples == ("pairs.jsonl:4",)


def test_messages_texts_and_whole_conversations_are_the_same_pair(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    yes, no = ([{"role": "assistant", "content": text}] for text in ("Yes.", "No."))
    transcripts = ("\n\nHuman: Why?\n\nAssistant: Yes.", "\n\nHuman: Why?\n\nAssistant: No.")
    path = write(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": asked, "chosen": yes, "rejected": no, "preference_id": "p1"},
            {"messages": asked, "chosen": "Yes.", "rejected": "No."},
            {"prompt": "left out", "chosen": asked + yes, "rejected": asked + no},
            {"chosen": asked + yes, "rejected": asked + no},
            {"chosen": transcripts[0], "rejected": transcripts[1]},
        ],
    )
    read = list(read_pairs(path))
    assert [p.pair_id for p in read] == ["p1", *(f"pairs.jsonl:{n}" for n in range(2, 6))]
    assert {(p.chosen, p.rejected) for p in read} == {("Yes.", "No.")}
    assert [p.prompt for p in read] == ["Be brief.\nWhy?"] * 4 + ["Why?"]


def test_a_folder_has_the_splits_its_files_name(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split, count in (("train", 2), ("test", 1)):
        rows = rows_of([(f"{split} {n}", "yes", "no") for n in range(count)], probability=0.8)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"{split}-000.parquet")
    assert [p.split for p in read_pairs(str(tmp_path))] == ["test", "train", "train"]
    assert [p.prompt for p in read_pairs(str(tmp_path), "test")] == ["test 0"]
    by_rule = found(lint(str(tmp_path)))
    assert by_rule["splits"].detail == "test 1 pairs of 1 prompts, train 2 pairs of 2 prompts"
    assert by_rule["probabilities"].detail.startswith("mean 0.800")


@pytest.mark.parametrize("bucket", [False, True])
def test_in_the_store_prompts_have_the_categories_they_came_with(
    bucket: bool, tmp_path: Path
) -> None:
    store = Store("memory://lint-categories" if bucket else tmp_path)
    prompts, dataset = Artifact("prompts", "ab12"), Artifact("dataset", "cd34")
    kinds = {"p1": "maths", "p2": None, "p3": "chat"}
    rows = [Prompt(n, (Message("user", n),), "p.jsonl:1", category=k) for n, k in kinds.items()]
    store.write_part(prompts, Shard(0, 1), Prompt, rows)
    said = {side: (Message("assistant", side),) for side in ("chosen", "rejected")}
    triplets = [
        Triplet(n, n, (Message("user", n),), *said.values(), "c", "r", "m", "m", 0.8, 1.4)
        for n in kinds
    ]
    with store.staged(f"{store.folder(dataset)}/data/train-000-of-001.parquet") as path:
        store.write_rows(path, Triplet, iter(triplets))
    inputs = ("candidates/ef56", str(prompts))
    store.finish(dataset, Manifest("dataset", "cd34", "pairs", 3, 0, (), inputs))
    read = list(read_pairs(store.address(dataset)))
    assert {p.pair_id: p.category for p in read} == kinds


def test_missing_texts_are_findings_and_malformed_rows_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": None, "chosen": None, "rejected": "no"}] * 2)
    assert found(lint(path))["empty_texts"].count == 2
    for row, message in (
        ({"prompt": "a", "chosen": "b"}, r"p.jsonl:1: no column 'rejected'"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, r"p.jsonl:1: the messages are a int"),
        ({"chosen": "a", "rejected": "b"}, r"p.jsonl:1: no column 'prompt' .*add the prompt"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "probability": "high"},
            r"p.jsonl:1: the probability is 'high'",
        ),
    ):
        write(tmp_path / "p.jsonl", [row])
        with pytest.raises(InputError, match=message):
            lint(path)


@pytest.mark.parametrize("name", ["nothing", "empty.jsonl", "x://y"])
def test_what_is_no_dataset_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    place = name if ":" in name else str(tmp_path / name)
    with pytest.raises(InputError, match=name):
        lint(place)


def test_half_a_surrogate_pair_does_not_stop_the_lint(tmp_path: Path) -> None:
    text = '{"prompt": "\\ud800", "chosen": "\\ud800 a", "rejected": "b", "category": "\\ud800"}\n'
    (tmp_path / "p.jsonl").write_text(text)
    findings = lint(str(tmp_path / "p.jsonl"))
    assert found(findings)["categories"].detail == "prompts: ? 1"
    assert json.dumps([f.detail for f in findings]).isprintable()
