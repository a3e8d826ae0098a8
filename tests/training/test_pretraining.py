"""Continual pre-training sees every token once, replays the share it says, follows its schedule,
and reports what was learnt and what was forgotten apart."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preferences.errors import InputError
from tests.training.conftest import (
    COLOURS,
    answer,
    assert_an_interruption_changes_nothing,
    build_tokenizer,
    silent,
)
from training.loop import train
from training.pretraining import (
    PretrainingConfig,
    PretrainingEvaluation,
    learnt_and_forgotten,
    load_data,
)
from training.run import TrainingRuntime
from training.texts import gather_texts, load_blocks, pack

MakeConfig = Callable[..., PretrainingConfig]
END = 3


def old_text(chance: random.Random) -> str:
    """As the tiny model was trained on."""
    return f"<bos><user>paint thing{chance.randrange(48)}<end>\n<assistant>{answer(chance)}"


def new_text(chance: random.Random) -> str:
    """Of the same words in an order it has never seen."""
    return "paint " + " ".join(f"thing{chance.randrange(6)} {c}" for c in COLOURS)


def write_texts(folder: Path, new: int, old: int, held_out: float = 0.2) -> Path:
    chance = random.Random(3)
    tables = {}
    for name, number, text in (("new", new, new_text), ("old", old, old_text)):
        tables[name] = folder / f"{name}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": text(chance)}) + "\n" for _ in range(number)]
        tables[name].write_text("".join(lines))
    gather_texts([str(tables["new"])], [str(tables["old"])], folder / "dataset", held_out=held_out)
    return folder / "dataset"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), new=300, old=400)


@pytest.fixture
def text_config(model: str) -> MakeConfig:
    """A configuration for the tiny model; keyword arguments change fields."""
    defaults: dict[str, Any] = {
        "model": model,
        "learning_rate": 3e-3,
        "batch_size": 4,
        "max_steps": 20,
        "max_length": 32,
        "warmup_share": 0.2,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "eval_steps": 10,
    }
    return lambda **changes: PretrainingConfig(**{**defaults, **changes})


def test_texts_are_laid_end_to_end_and_cut_only_at_block_edges() -> None:
    texts = [[1, 1, END], [2, 2, 2, 2, 2, END], [4, END], [5, 5, END]]
    packed = pack(texts, 4)
    # 3 + 6 + 2 + 3 = 14 tokens: three blocks of 4 and one of 2.
    blocks = [packed.block(i).tolist() for i in range(len(packed))]
    assert blocks == [[1, 1, END, 2], [2, 2, 2, 2], [END, 4, END, 5], [5, END]]
    # The second text lies in blocks 1 to 3 and the last in 3 and 4; the others in one.
    assert (packed.texts, packed.cut) == (4, 2)


def test_every_token_is_in_exactly_one_block(texts: Path) -> None:
    import pyarrow.parquet as pq

    tokenizer = build_tokenizer()
    table = pq.read_table(texts / "data" / "train-00000.parquet").to_pylist()
    expected = Counter(
        token for row in table for token in [*tokenizer(row["text"])["input_ids"], END]
    )
    found = load_blocks(texts, "train", tokenizer, length=32, replay=None, seed=0)
    assert found is not None
    blocks = [list(block) for block in found.rows["input_ids"]]
    assert Counter(token for block in blocks for token in block) == expected
    # All are full but the last of the new texts and the last of the old.
    assert sum(len(block) != 32 for block in blocks) <= 2
    assert found.block_counts.texts == len(table)
    assert found.block_counts.tokens == sum(expected.values())
    for origin in ("new", "old"):
        stream = [
            t for row in found.rows if row["old"] == (origin == "old") for t in row["input_ids"]
        ]
        told = [tokenizer(row["text"])["input_ids"] for row in table if row["origin"] == origin]
        assert stream == [token for text in told for token in [*text, END]]


def test_an_epoch_shows_the_trainer_every_block_once(
    texts: Path, text_config: MakeConfig, tmp_path: Path
) -> None:
    from training.pretraining import build_trainer

    config = text_config(max_steps=None, epochs=1, replay=0.1)
    blocks, _ = load_data(config, texts, build_tokenizer())
    assert blocks is not None
    trainer = build_trainer(config, TrainingRuntime(), tmp_path, blocks, None)
    seen: list[tuple[int, ...]] = []
    compute = trainer.compute_loss

    def noted(model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        rows = zip(inputs["labels"].tolist(), inputs["input_ids"].tolist(), strict=True)
        for labels, ids in rows:
            # What is scored is what is there, and what fills a shorter block is not.
            seen.append(tuple(t for t in labels if t != -100))
            assert seen[-1] == tuple(ids[: len(seen[-1])])
        return compute(model, inputs, *args, **more)

    trainer.compute_loss = noted
    trainer.train()
    assert sorted(seen) == sorted(tuple(block) for block in blocks.rows["input_ids"])
    counts = json.loads((tmp_path / "blocks.json").read_text())["train"]
    assert counts["blocks"] == len(seen)
    assert counts["tokens"] == sum(map(len, seen))


@pytest.mark.parametrize("replay", [0.0, 0.05, 0.25, 0.5])
def test_the_share_of_old_blocks_is_the_one_asked_for(
    replay: float, texts: Path, text_config: MakeConfig
) -> None:
    blocks, held_out = load_data(text_config(replay=replay), texts, build_tokenizer())
    assert blocks is not None
    assert held_out is not None
    flags = list(blocks.rows["old"])
    new, old = flags.count(False), flags.count(True)
    # The nearest there is in whole blocks: one more or one less would be further off.
    errors = [abs((old + more) / (new + old + more) - replay) for more in (-1, 0, 1)]
    assert errors[1] == min(errors)
    assert (old == 0) == (replay == 0)
    assert blocks.block_counts.old_blocks == old
    # Held-out texts are all there, of both origins.
    assert set(held_out.rows["old"]) == {True, False}


def test_which_old_texts_are_replayed_is_drawn_by_the_seed(
    texts: Path, text_config: MakeConfig
) -> None:
    drawn = []
    for seed in (0, 0, 1):
        blocks, _ = load_data(text_config(replay=0.2, seed=seed), texts, build_tokenizer())
        assert blocks is not None
        drawn.append([row["input_ids"] for row in blocks.rows if row["old"]])
    assert drawn[0] == drawn[1] != drawn[2]


def test_too_few_old_texts_are_refused_with_the_cure(
    text_config: MakeConfig, tmp_path: Path
) -> None:
    dataset = write_texts(tmp_path, new=200, old=4)
    with pytest.raises(InputError, match=r"replay: 0.3 of the blocks wants .* say replay: 0"):
        load_data(text_config(replay=0.3), dataset, build_tokenizer())


def test_tables_of_any_kind_become_one_dataset(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl").write_text('{"body": "red"}\n{"body": "blue"}\n')
    pq.write_table(pa.table({"body": ["green", " ", "red"]}), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("body\nwhite\n")
    found = gather_texts(
        [str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")],
        [str(tmp_path / "c.csv")],
        tmp_path / "d",
        column="body",
        held_out=0,
    )
    assert found == {"train": {"new": 5, "old": 1}, "test": {"new": 0, "old": 0}}
    assert not (tmp_path / "d" / "data" / "test-00000.parquet").exists()
    blocks = load_blocks(tmp_path / "d", "train", build_tokenizer(), length=8, replay=None, seed=0)
    assert blocks is not None
    assert blocks.counts.dropped == {"empty_text": 1}
    assert blocks.dropped[0].record_id == "train-00000.parquet:4"
    assert blocks.block_counts.texts == 5
    with pytest.raises(InputError, match=r"a.jsonl:1: no text in a column 'text'"):
        gather_texts([str(tmp_path / "a.jsonl")], [], tmp_path / "e")
    with pytest.raises(InputError, match="there is data in it already"):
        gather_texts([str(tmp_path / "a.jsonl")], [], tmp_path / "d", column="body")


def test_the_learning_rate_is_warmed_up_again_and_decays_again(
    texts: Path, text_config: MakeConfig, tmp_path: Path
) -> None:
    config = text_config(max_steps=20, warmup_share=0.2, final_rate=0.1)
    train(config, texts, tmp_path, TrainingRuntime(log_steps=1, save_steps=20), progress=silent)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    # 4 of 20 steps go up from 0 in a line; then a half cosine over 16, from the peak to a tenth.
    peak = 3e-3
    rising = [peak * step / 4 for step in range(4)]
    falling = [peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 16))) for step in range(16)]
    assert rates == pytest.approx([*rising, *falling], rel=1e-6)
    # The last step would reach 3e-4; the one before it is at .1 + .9·.5·(1 + cos(15π/16)) = .10865.
    assert rates[-1] == pytest.approx(peak * 0.10865, rel=1e-3)


def by_hand(model_folder: Path | str, dataset: Path, origin: str) -> float:
    """Mean −log π(token) of a held-out split, block by block, by nothing of ours but the blocks."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    blocks = load_blocks(dataset, "test", build_tokenizer(), length=32, replay=None, seed=0)
    assert blocks is not None
    total = tokens = 0.0
    for row in blocks.rows:
        if row["old"] == (origin == "old"):
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scored = log_probs.gather(-1, ids[0, 1:, None])
            total, tokens = total - float(scored.sum()), tokens + scored.numel()
    return total / tokens


def test_losses_on_new_and_on_old_texts_are_told_apart(
    texts: Path, text_config: MakeConfig, tmp_path: Path
) -> None:
    config = text_config()
    result = train(config, texts, tmp_path, TrainingRuntime(log_steps=10), progress=silent)
    found = learnt_and_forgotten(config, tmp_path, texts, batch_size=5)
    for origin, loss in (("new", found.new), ("old", found.old)):
        assert loss is not None
        assert loss.before == pytest.approx(by_hand(config.model, texts, origin), abs=1e-5)
        assert loss.after == pytest.approx(by_hand(tmp_path / "model", texts, origin), abs=1e-5)
        assert result.evaluation[f"eval_{origin}_loss"] == pytest.approx(loss.after, abs=1e-5)
    assert found.new is not None
    assert found.new.after < found.new.before - 0.5


def test_replayed_texts_are_forgotten_less(
    texts: Path, text_config: MakeConfig, tmp_path: Path
) -> None:
    # First it learns the old texts in blocks, as models do; then it goes on to the new ones.
    first = gather_texts([str(texts.parent / "old.jsonl")], [], tmp_path / "old", held_out=0)
    assert first["train"]["new"] == 400
    train(
        text_config(replay=0, max_steps=80), tmp_path / "old", tmp_path / "first", progress=silent
    )
    model = str(tmp_path / "first" / "model")
    forgot, learnt = {}, {}
    for replay in (0.0, 0.25):
        config = text_config(model=model, replay=replay, max_steps=40)
        run = tmp_path / str(replay)
        train(config, texts, run, progress=silent)
        found: PretrainingEvaluation = learnt_and_forgotten(config, run, texts)
        assert found.new is not None
        assert found.old is not None
        forgot[replay] = found.old.after - found.old.before
        learnt[replay] = found.new.before - found.new.after
    assert forgot[0.0] > 0.5
    assert forgot[0.25] < 0.5 * forgot[0.0]
    assert learnt[0.25] > 0.8 * learnt[0.0]


def test_without_held_out_texts_nothing_is_said_of_losses(
    text_config: MakeConfig, tmp_path: Path
) -> None:
    dataset = write_texts(tmp_path, new=40, old=40, held_out=0)
    config = text_config(max_steps=1)
    result = train(config, dataset, tmp_path / "run", progress=silent)
    assert result.test is None
    found = learnt_and_forgotten(config, tmp_path / "run", dataset)
    assert found == PretrainingEvaluation(None, None)


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    weights: str, texts: Path, text_config: MakeConfig, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"lora": {"rank": 4, "dropout": 0.2}} if weights == "lora" else {}
    config = text_config(weights=weights, max_steps=12, gradient_checkpointing=True, **more)
    assert_an_interruption_changes_nothing(config, texts, tmp_path)
    found = learnt_and_forgotten(config, tmp_path / "broken", texts)
    assert found.new is not None
    assert found.new.after < found.new.before


def test_weights_that_only_steer_are_refused(text_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="prompt_tuning steers a model and cannot hold new texts"):
        text_config(weights="prompt_tuning")
