"""DPO on real text: a step with every token computed once, against TRL's.

    OMP_NUM_THREADS=1 python benchmarks/real_text_speed.py FOLDER

The folder holds AlpacaEval's `responses.parquet` and `judgments.parquet`. Of each instruction, the
answer that GPT-4 likes best is chosen and the one that it likes least rejected; nothing is cut or
left out. No language model's tokenizer comes with this project, so one of `SHAPE`'s 8,192 pieces is
learnt from these texts, with a chat template: a model's own has more pieces, and somewhat fewer
tokens in each text.

Three tables are written. `real_text_speed` has the steps of `dpo_speed.py`, on the same model, on
batches drawn at random; `real_text_lengths` the lengths of all pairs, and the tokens that each
forward pass computes on them; `real_text_batches` the batches of an epoch by number and by tokens.
The latter two are counted, not timed.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from dpo_speed import SHAPE, Contender, Measured, Workload, contenders, measure, rows_of
from table import write_table

from training.batches import Size, evenly, padded, sizes_of
from training.data import load_pairs

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ '\\n' }}{{ m['content'] }}<|end|>{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}"
)
UPDATE = 64
"""Pairs of an update, where batches are compared."""
NUMBER = 8
"""Pairs of a batch there, where batches are made by number."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LONGEST = 8192
"""More tokens than any pair's answer has with its prompt."""


def best_and_worst(folder: Path) -> Iterator[dict[str, Any]]:
    """A row of a preference dataset for each instruction."""
    answers = {
        (row["instruction"], row["generator"]): row["output"]
        for row in pq.read_table(folder / "responses.parquet").to_pylist()
    }
    liked: dict[str, dict[str, float]] = {}
    for row in pq.read_table(folder / "judgments.parquet").to_pylist():
        # From 1 to 2: that the second of two answers is better; the first is the baseline's.
        if row["preference"] is not None and (row["instruction"], row["generator"]) in answers:
            liked.setdefault(row["instruction"], {})[row["generator"]] = row["preference"]
    for instruction, scores in liked.items():
        ranked = sorted(scores, key=lambda model: (scores[model], model))
        texts = {name: answers[instruction, name] for name in (ranked[-1], ranked[0])}
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in texts.values())
        yield {
            "prompt": [{"role": "user", "content": instruction}],
            "chosen": chosen,
            "rejected": rejected,
            "prompt_id": instruction,
            "chosen_id": ranked[-1],
            "rejected_id": ranked[0],
            "probability": 1.0,
        }


def tokenizer_of(texts: Sequence[str]) -> Any:
    """Byte-pair encoding learnt from the texts, with the model's number of pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=SHAPE["vocab_size"],
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=made, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def pairs_of(folder: Path) -> Any:
    """All pairs as tokens, as training reads them."""
    rows = list(best_and_worst(folder))
    texts = [row[part][0]["content"] for row in rows for part in ("prompt", "chosen", "rejected")]
    tokenizer = tokenizer_of(texts)
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "data").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), Path(made) / "data" / "train-0.parquet")
        pairs = load_pairs(
            Path(made), "train", tokenizer, ends=[tokenizer.eos_token_id], max_length=LONGEST
        )
    if pairs is None or pairs.dropped:
        raise SystemExit(f"some pairs are not trained on: {pairs and pairs.counts}")
    return pairs.rows


@dataclass(frozen=True)
class Drawn(Workload):
    """Batches of pairs drawn at random, without any twice."""

    rows_at_hand: Any = field(default=None, compare=False)

    def rows(self, seed: int) -> list[dict[str, Any]]:
        """A batch."""
        order = random.Random(0).sample(range(len(self.rows_at_hand)), len(self.rows_at_hand))
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        drawn = order[seed * self.pairs : (seed + 1) * self.pairs]
        return [{name: self.rows_at_hand[i][name] for name in names} for i in drawn]


def tell_speed(rows: Any, found: list[Measured], running: list[Contender], pairs: int) -> None:
    """The table of what is measured so far."""
    batches = len(found[0].alone)
    note = (
        f"{len(rows):,} pairs of AlpacaEval; medians of {batches} batches of {pairs} pairs drawn "
        "at random, with the least and the most; ratios are a batch's own. Tokens are those of "
        f"8,192 pieces learnt from the texts; their lengths are in real_text_lengths.md."
    )
    header = ["", *(one.name for one in running), *(f"{one.name} / ours" for one in running[1:])]
    workload = Drawn(0, 0, pairs, rows)
    told = [[name.partition(": ")[2], *rest] for name, *rest in rows_of(workload, found)]
    write_table("real_text_speed", header, told, note)


def tell_lengths(rows: Any, pairs: int) -> None:
    """Quantiles, and tokens of all pairs in batches of so many."""
    columns = {name: sorted(map(len, rows[f"{name}_ids"])) for name in PARTS}
    sizes = sizes_of(rows)
    columns["pair"] = sorted(size.tokens for size in sizes)
    header = ["tokens", *(f"{q:.0%}" for q in QUANTILES), "mean"]
    told = [
        [
            name,
            *(f"{lengths[round(q * (len(lengths) - 1))]:,}" for q in QUANTILES),
            f"{sum(lengths) / len(lengths):,.0f}",
        ]
        for name, lengths in columns.items()
    ]
    order = random.Random(0).sample(range(len(sizes)), len(sizes))
    batches = [
        [sizes[i] for i in order[start : start + pairs]] for start in range(0, len(order), pairs)
    ]
    once = sum(columns["pair"])
    rowwise = sum(2 * p + a for p, a in _parts(rows))
    filled = sum(_filled(batch) for batch in batches)
    answers = sum(a for _, a in _parts(rows))
    note = (
        f"{len(rows):,} pairs; a pair is its prompt and both answers. In batches of {pairs} in "
        f"random order, ours computes {once:,} tokens, a row for each answer {rowwise:,} "
        f"({rowwise / once:.2f}×), and TRL with its padding {filled:,} ({filled / once:.2f}×). "
        f"Logits are made of {answers:,} tokens by ours and on a CPU of {filled:,} by TRL "
        f"({filled / answers:.2f}×)."
    )
    write_table("real_text_lengths", header, told, note)


PARTS = ("prompt", "chosen", "rejected")


def _parts(rows: Any) -> Iterator[tuple[int, int]]:
    """Tokens of each pair's prompt, and of both answers."""
    for prompt, *answers in zip(*(rows[f"{name}_ids"] for name in PARTS), strict=True):
        yield len(prompt), sum(map(len, answers))


def _filled(batch: Sequence[Size]) -> int:
    return sum(size.rows for size in batch) * max(size.longest for size in batch)


def _summed(batch: Sequence[Size]) -> int:
    return sum(size.tokens for size in batch)


Cost = Callable[[Sequence[Size]], int]


def tell_batches(rows: Any) -> None:
    """An epoch's batches by number and, with as many tokens as the fullest of these, by tokens."""
    sizes = sizes_of(rows)
    order = random.Random(0).sample(range(len(sizes)), len(sizes))
    updates = [
        [sizes[i] for i in order[start : start + UPDATE]] for start in range(0, len(order), UPDATE)
    ]
    told = []
    forwards: list[tuple[str, Cost, Callable[[Sequence[Size], int], list[list[int]]]]] = [
        ("each token once", _summed, evenly),
        ("with padding", _filled, padded),
    ]
    for name, cost, by_tokens in forwards:
        fixed = [
            update[start : start + NUMBER]
            for update in updates
            for start in range(0, len(update), NUMBER)
        ]
        fullest = max(map(cost, fixed))
        formed = [
            [update[i] for i in batch] for update in updates for batch in by_tokens(update, fullest)
        ]
        for way, batches in ((f"{NUMBER} pairs", fixed), (f"{fullest:,} tokens", formed)):
            computed = list(map(cost, batches))
            pairs = sorted(map(len, batches))
            told.append(
                [
                    name,
                    way,
                    f"{len(batches):,}",
                    f"{pairs[0]}-{pairs[-1]}",
                    f"{sum(computed):,}",
                    f"{sum(computed) / len(computed):,.0f}",
                    f"{max(computed):,}",
                ]
            )
    header = ["forward pass", "batches of", "batches", "pairs in one"]
    header += ["tokens computed", "in the mean batch", "in the fullest"]
    note = (
        f"An epoch of {len(rows):,} pairs in random order, in updates of {UPDATE}. By tokens, a "
        f"batch may have as many as the fullest one of {NUMBER} pairs, for the same memory."
    )
    write_table("real_text_batches", header, told, note)


def main() -> None:
    """Measure; the table of speeds is written after each batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with responses.parquet and judgments.parquet")
    parser.add_argument("--batches", type=int, default=6, help="how many are drawn")
    parser.add_argument("--pairs", type=int, default=4, help="of a batch")
    given = parser.parse_args()
    for name in ("responses.parquet", "judgments.parquet"):
        if not (given.folder / name).exists():
            raise SystemExit(f"{given.folder}: no {name} in it; give the folder of AlpacaEval's")
    torch.set_num_threads(1)
    rows = pairs_of(given.folder)
    tell_lengths(rows, given.pairs)
    tell_batches(rows)
    drawn = Drawn(0, 0, given.pairs, rows)
    with tempfile.TemporaryDirectory() as folder:
        running = contenders(folder)
        for one in running:
            one.step(running[0].trainer.data_collator(Workload(16, 8, 1).rows(0)))
        found = [Measured() for _ in running]
        for _ in range(given.batches):
            measure(drawn, running, found)
            tell_speed(rows, found, running, given.pairs)


if __name__ == "__main__":
    main()
