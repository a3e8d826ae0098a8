"""A reward model that can say anything recovers the rewards that made its labels, through the real
data, collator, loss and trainer."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast

from preferences.errors import InputError
from tests.training.conftest import build_tokenizer
from training import reward_head
from training.reward import RewardConfig, build_trainer, load_data, reward_evaluation
from training.reward_trainer import collator
from training.run import TrainingRuntime

ANSWERS = [
    " ".join(words)
    for length in range(4)
    for words in itertools.product(("red", "blue", "green", "white"), repeat=length)
]
"""All of up to three words of four: 1 + 4 + 16 + 64 = 85."""

_CHANCE = random.Random(5)
REWARD = {answer: _CHANCE.gauss(0, 1) for answer in ANSWERS}

STATES = 49_999
"""Places in the table; a prime, so that different beginnings have different places."""


class TableConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    model_type = "table"
    hidden_size = 1


class TableModel(PreTrainedModel):
    """One number for every beginning of a text: it sees all that is before, and nothing across."""

    config_class = TableConfig
    base_model_prefix = "model"

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(STATES, 1)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        state = torch.zeros_like(input_ids[:, 0])
        states = []
        for t in range(input_ids.shape[1]):
            if position_ids is not None:
                state = state * (position_ids[:, t] != 0)
            moved = (state * 61 + input_ids[:, t] + 1) % STATES
            here = torch.ones_like(state) if attention_mask is None else attention_mask[:, t]
            state = torch.where(here.bool(), moved, state)
            states.append(state)
        return BaseModelOutputWithPast(last_hidden_state=self.table(torch.stack(states, dim=1)))


class TableForSequenceClassification(  # type: ignore[no-untyped-call]
    GenericForSequenceClassification, TableModel
):
    def __init__(self, config: TableConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = 1
        self.model = TableModel(config)
        self.score = nn.Linear(1, 1, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    forward = GenericForSequenceClassification.forward


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    AutoConfig.register("table", TableConfig, exist_ok=True)
    AutoModel.register(TableConfig, TableModel, exist_ok=True)
    AutoModelForSequenceClassification.register(
        TableConfig, TableForSequenceClassification, exist_ok=True
    )
    folder = tmp_path_factory.mktemp("table")
    torch.manual_seed(0)
    shape: Any = {"num_labels": 1, "pad_token_id": 0}
    TableForSequenceClassification(TableConfig(**shape)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def probability(chosen: str, rejected: str) -> float:
    return 1 / (1 + math.exp(REWARD[rejected] - REWARD[chosen]))


def some_pairs(number: int) -> list[tuple[str, str]]:
    """Every answer beside its neighbour, so that all hang together, and others by chance."""
    chance = random.Random(2)
    neighbours = list(itertools.pairwise(ANSWERS))
    others = [tuple(chance.sample(ANSWERS, 2)) for _ in range(number - len(neighbours))]
    return [*neighbours, *others]  # type: ignore[list-item]


@pytest.fixture(scope="module")
def exact_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose probability is Bradley and Terry's, exactly."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("exact")
    (folder / "data").mkdir()
    for split in ("train", "test"):
        rows = [
            {
                "prompt": [{"role": "user", "content": "paint thing0"}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "prompt_id": f"p{i}",
                "chosen_id": f"c{i}",
                "rejected_id": f"r{i}",
                "probability": probability(chosen, rejected),
            }
            for i, (chosen, rejected) in enumerate(some_pairs(168))
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000.parquet")
    return folder


def config_for(table: str, **changes: Any) -> RewardConfig:
    defaults: dict[str, Any] = {
        "model": table,
        "weights": "full",
        "dtype": "float32",
        "labels": "soft",
        "centring": 0.0,
        "learning_rate": 0.1,
        "schedule": "cosine",
        "warmup_share": 0.0,
        "gradient_clipping": None,
        "gradient_checkpointing": False,
        "batch_size": 28,
        "max_steps": 800,
        "eval_steps": 10_000,
        "max_length": 48,
    }
    return RewardConfig(**{**defaults, **changes})


def double_trainer(config: RewardConfig, dataset: Path, output: Path) -> Any:
    """The real one, computing in float64."""
    from training.models import load_tokenizer

    tokenizer = load_tokenizer(config.model, None)
    pairs, _ = load_data(config, dataset, tokenizer)
    assert pairs is not None
    runtime = TrainingRuntime(log_steps=10_000, save_steps=10_000)
    trainer = build_trainer(config, runtime, output, pairs, None)
    trainer.model.double()
    return trainer


def tokens(tokenizer: Any, answer: str) -> list[int]:
    turns = [("user", "paint thing0"), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    ids: list[int] = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    return ids


@pytest.fixture(scope="module")
def learnt(
    table: str, exact_labels: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    """The reward of every answer after training."""
    trainer = double_trainer(config_for(table), exact_labels, tmp_path_factory.mktemp("run"))
    trainer.train()
    sequences = [tokens(trainer.processing_class, answer) for answer in ANSWERS]
    found = reward_head.rewards(trainer.model.eval(), sequences, 16)
    return dict(zip(ANSWERS, found, strict=True))


def furthest(found: Mapping[str, float]) -> float:
    """Largest distance from the true rewards, of which only differences are known."""
    errors = [found[answer] - REWARD[answer] for answer in ANSWERS]
    constant = math.fsum(errors) / len(errors)
    return max(abs(error - constant) for error in errors)


def test_rewards_are_recovered_up_to_a_constant(learnt: dict[str, float]) -> None:
    assert furthest(learnt) < 1e-6


def test_held_out_accuracy_is_the_best_there_is_and_probabilities_are_calibrated(
    learnt: dict[str, float],
) -> None:
    held_out = list(itertools.combinations(ANSWERS, 2))
    labels = [probability(*pair) for pair in held_out]
    found = reward_evaluation(
        [learnt[answer] for pair in held_out for answer in pair],
        labels,
        [f"p{i}" for i in range(len(held_out))],
        [1.0] * 2 * len(held_out),
    )
    # Whoever knows the odds is right as often as the likelier outcome comes.
    bayes = sum(max(p, 1 - p) for p in labels) / len(labels)
    entropy = -sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in labels) / len(labels)
    assert 0.6 < bayes < 0.8
    assert found.accuracy.mean == pytest.approx(bayes, abs=1e-12)
    assert found.bayes == pytest.approx(bayes, abs=1e-12)
    assert found.longer_wins.mean == 0.5
    assert found.nll == pytest.approx(entropy, abs=1e-9)
    assert found.ece < 1e-6
    # Drawn outcomes, as real labels are: no more accurate than the true rewards are on them.
    chance = random.Random(0)
    drawn = [pair if chance.random() < probability(*pair) else pair[::-1] for pair in held_out]
    shares = [
        sum(rewards[chosen] > rewards[rejected] for chosen, rejected in drawn) / len(drawn)
        for rewards in (learnt, REWARD)
    ]
    assert shares[0] == shares[1]


def loss_and_gradient(trainer: Any, batches: Sequence[dict[str, Any]]) -> tuple[float, Tensor]:
    """The mean over the batches, and its gradient by the head and the whole table."""
    torch.manual_seed(1)
    for parameter in trainer.model.parameters():
        torch.nn.init.normal_(parameter)  # far from even, so that errors show
    losses = [trainer.compute_loss(trainer.model, dict(batch)) for batch in batches]
    loss = torch.stack(losses).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad.flatten() for parameter in trainer.model.parameters()]
    return float(loss.detach()), torch.cat(gradients)


def filled_from_the_left(batch: dict[str, Any]) -> dict[str, Any]:
    """The same rows with the padding before the text."""
    moved = dict(batch)
    width = batch["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "position_ids"):
        moved[name] = torch.zeros_like(batch[name])
        for row, end in enumerate(batch["ends"].tolist()):
            moved[name][row, width - end - 1 :] = batch[name][row, : end + 1]
    moved["ends"] = torch.full_like(batch["ends"], width - 1)
    return moved


def filled_with(batch: dict[str, Any], token: int) -> dict[str, Any]:
    """The same rows with another padding token."""
    absent = batch["attention_mask"] == 0
    return {**batch, "input_ids": batch["input_ids"].masked_fill(absent, token)}


@pytest.mark.parametrize(
    "arrangement", ["single", "packed", "in one row", "left", "pad is end", "left, pad is end"]
)
def test_loss_and_gradient_do_not_depend_on_how_pairs_are_laid_out(
    arrangement: str, table: str, exact_labels: Path, tmp_path: Path
) -> None:
    packing = arrangement in ("packed", "in one row")
    trainer = double_trainer(
        config_for(table, packing=packing, centring=0.1), exact_labels, tmp_path
    )
    rows = [trainer.train_dataset[i] for i in (0, 40, 90, 120, 150)]
    plain = collator(packing=False, width=None)
    end = trainer.processing_class.eos_token_id
    batches = {
        "single": lambda: [plain([row]) for row in rows],
        "packed": lambda: [collator(packing=True, width=40)(rows)],
        "in one row": lambda: [collator(packing=True, width=None)(rows)],
        "left": lambda: [filled_from_the_left(plain(rows))],
        "pad is end": lambda: [filled_with(plain(rows), end)],
        "left, pad is end": lambda: [filled_with(filled_from_the_left(plain(rows)), end)],
    }[arrangement]()
    if packing:
        assert batches[0]["input_ids"].shape[0] < 10
    loss, gradient = loss_and_gradient(trainer, batches)
    usual = double_trainer(
        config_for(table, packing=False, centring=0.1), exact_labels, tmp_path / "usual"
    )
    expected, its_gradient = loss_and_gradient(usual, [plain(rows)])
    assert loss == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(gradient, its_gradient, rtol=0, atol=1e-12)
    assert float(its_gradient.abs().max()) > 0.01


def test_reading_by_the_padding_token_is_what_goes_wrong_where_padding_is_the_end(
    table: str, exact_labels: Path, tmp_path: Path
) -> None:
    trainer = double_trainer(config_for(table), exact_labels, tmp_path)
    batch = collator(packing=False, width=None)([trainer.train_dataset[i] for i in range(4)])
    ours = trainer.model(**batch).logits
    batch = filled_with(batch, trainer.processing_class.eos_token_id)
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    trainer.model.config.pad_token_id = trainer.processing_class.eos_token_id
    assert not torch.isclose(trainer.model(**asked).logits, ours).any()
    # Without the end token as padding the library reads where we do.
    trainer.model.config.pad_token_id = trainer.processing_class.pad_token_id
    batch = filled_with(batch, trainer.processing_class.pad_token_id)
    asked["input_ids"] = batch["input_ids"]
    assert torch.equal(trainer.model(**asked).logits, ours)


def test_a_model_that_looks_at_its_neighbours_in_a_row_is_refused(
    table: str, exact_labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = TableModel.forward

    def looks_across(self: TableModel, input_ids: Tensor, **given: Any) -> BaseModelOutputWithPast:
        return blind(self, input_ids, given["attention_mask"], None)

    double_trainer(config_for(table), exact_labels, tmp_path)
    monkeypatch.setattr(TableModel, "forward", looks_across)
    double_trainer(config_for(table, packing=False), exact_labels, tmp_path)
    with pytest.raises(InputError, match=r"packing: rewards change by .*packing: false"):
        double_trainer(config_for(table), exact_labels, tmp_path)
