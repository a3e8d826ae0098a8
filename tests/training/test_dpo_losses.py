"""Every loss is its paper's: values and gradients against formulas written here anew, in float64.

The policy is a table of logits (`tests.training.tabular`), so its log-probabilities are computed
apart from the trainer too. TRL's kernel computes them in float32; for these comparisons it is
exchanged, and everything else is what trains.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from trl.trainer.utils import FusedCausalLMOutput

from preferences.errors import InputError
from tests.training.tabular import (
    Table,
    log_probs,
    random_table,
    read_table,
    some_pairs,
    write_pairs,
    write_table,
)
from training.dpo import DPOConfig, build_trainer, load_data
from training.models import load_tokenizer
from training.run import TrainingRuntime

Array = NDArray[np.float64]
BETA = 0.3
PAIRS = some_pairs(1)[:9]
CHOSEN, REJECTED = zip(*PAIRS, strict=True)


@dataclass(frozen=True)
class Batch:
    """What a loss is made of; arrays of shape (pairs,)."""

    chosen: Array
    """log π − log π_ref of the chosen answers, summed."""
    rejected: Array
    chosen_length: Array
    """Tokens, the end with them."""
    rejected_length: Array
    policy: Array
    """log π(chosen) − log π(rejected)."""
    reference: Array
    """The same of the reference."""


def log_sigmoid(x: Array) -> Array:
    return -np.logaddexp(0, -x)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def dpo(b: Batch) -> Array:
    """Rafailov et al. 2023, equation 7."""
    return -log_sigmoid(BETA * (b.chosen - b.rejected))


def dpo_of_mean_tokens(b: Batch) -> Array:
    """The same with log-probabilities a token."""
    return -log_sigmoid(BETA * (b.chosen / b.chosen_length - b.rejected / b.rejected_length))


def conservative(b: Batch) -> Array:
    """Mitchell 2023, with a tenth of the labels wrong."""
    z = BETA * (b.chosen - b.rejected)
    return -0.9 * log_sigmoid(z) - 0.1 * log_sigmoid(-z)


def slic(b: Batch) -> Array:
    """SLiC (Zhao et al. 2023), against a reference as in Liu et al. 2024."""
    return np.maximum(0, 1 - BETA * (b.chosen - b.rejected))


def ipo(b: Batch) -> Array:
    """Azar et al. 2024, equation 17, of mean tokens."""
    h = b.chosen / b.chosen_length - b.rejected / b.rejected_length
    return (h - 1 / (2 * BETA)) ** 2


def robust(b: Batch) -> Array:
    """Chowdhury et al. 2024, with a tenth of the labels wrong."""
    z = BETA * (b.chosen - b.rejected)
    return (-0.9 * log_sigmoid(z) + 0.1 * log_sigmoid(-z)) / 0.8


def exo(b: Batch) -> Array:
    """Ji et al. 2024, equation 16: KL(σ(z), 1 − σ(z) ‖ 0.9, 0.1)."""
    q = sigmoid(BETA * (b.chosen - b.rejected))
    return q * np.log(q / 0.9) + (1 - q) * np.log((1 - q) / 0.1)


def nca(b: Batch) -> Array:
    """Chen et al. 2024, for two answers."""
    won, lost = BETA * b.chosen, BETA * b.rejected
    return -log_sigmoid(won) - (log_sigmoid(-won) + log_sigmoid(-lost)) / 2


def bco(b: Batch) -> Array:
    """Jung et al. 2024, without their shift δ."""
    return -log_sigmoid(BETA * b.chosen) - log_sigmoid(-BETA * b.rejected)


def sppo(b: Batch) -> Array:
    """Wu et al. 2024, equation 4.7, with P = 1 and 0 and η = 1/β."""
    return (b.chosen - (1 - 0.5) / BETA) ** 2 + (b.rejected - (0 - 0.5) / BETA) ** 2


def aot(b: Batch) -> Array:
    """Melnyk et al. 2024, paired: the k-th smallest of the policy's differences against the
    k-th smallest of the reference's."""
    return -log_sigmoid(BETA * (np.sort(b.policy) - np.sort(b.reference)))


def aot_unpaired(b: Batch) -> Array:
    """Melnyk et al. 2024, unpaired: the k-th smallest gains against each other."""
    return -log_sigmoid(BETA * (np.sort(b.chosen) - np.sort(b.rejected)))


def apo_zero(b: Batch) -> Array:
    """D'Oosterlinck et al. 2024, equation 7, plus 1."""
    return 1 - sigmoid(BETA * b.chosen) + sigmoid(BETA * b.rejected)


def apo_down(b: Batch) -> Array:
    """D'Oosterlinck et al. 2024, equation 8, plus 1."""
    return 1 + sigmoid(BETA * b.chosen) - sigmoid(BETA * (b.chosen - b.rejected))


def discopop(b: Batch) -> Array:
    """Lu et al. 2024, equation 5: logistic and exponential, mixed by σ(z/0.05)."""
    z = BETA * (b.chosen - b.rejected)
    mix = sigmoid(z / 0.05)
    return (1 - mix) * -log_sigmoid(z) + mix * np.exp(-z)


PROBABILITY = np.linspace(0.02, 0.98, len(PAIRS))
MARGIN = np.linspace(-2.0, 2.0, len(PAIRS))


def soft(b: Batch) -> Array:
    """−p·log σ(z) − (1 − p)·log σ(−z)."""
    z = BETA * (b.chosen - b.rejected)
    return -PROBABILITY * log_sigmoid(z) - (1 - PROBABILITY) * log_sigmoid(-z)


def soft_ipo(b: Batch) -> Array:
    """Azar et al. 2024 with labels drawn with probability p, both outcomes weighed."""
    h = b.chosen / b.chosen_length - b.rejected / b.rejected_length
    aim = 1 / (2 * BETA)
    return PROBABILITY * (h - aim) ** 2 + (1 - PROBABILITY) * (-h - aim) ** 2


def offset(b: Batch) -> Array:
    """Amini et al. 2024, with half of each pair's margin."""
    return -log_sigmoid(BETA * (b.chosen - b.rejected) - MARGIN / 2)


def slic_with_offset(b: Batch) -> Array:
    return np.maximum(0, 1 - (BETA * (b.chosen - b.rejected) - MARGIN / 2))


def soft_with_offset(b: Batch) -> Array:
    z = BETA * (b.chosen / b.chosen_length - b.rejected / b.rejected_length) - MARGIN / 2
    return -PROBABILITY * log_sigmoid(z) - (1 - PROBABILITY) * log_sigmoid(-z)


LOSSES: dict[str, tuple[dict[str, Any], Callable[[Batch], Array]]] = {
    "sigmoid": ({}, dpo),
    "sigmoid_norm": ({"loss": "sigmoid_norm"}, dpo_of_mean_tokens),
    "cDPO": ({"label_smoothing": 0.1}, conservative),
    "hinge": ({"loss": "hinge"}, slic),
    "ipo": ({"loss": "ipo"}, ipo),
    "robust": ({"loss": "robust", "label_smoothing": 0.1}, robust),
    "exo_pair": ({"loss": "exo_pair", "label_smoothing": 0.1}, exo),
    "nca_pair": ({"loss": "nca_pair"}, nca),
    "bco_pair": ({"loss": "bco_pair"}, bco),
    "sppo_hard": ({"loss": "sppo_hard"}, sppo),
    "aot": ({"loss": "aot"}, aot),
    "aot_unpaired": ({"loss": "aot_unpaired"}, aot_unpaired),
    "apo_zero": ({"loss": "apo_zero"}, apo_zero),
    "apo_down": ({"loss": "apo_down"}, apo_down),
    "discopop": ({"loss": "discopop"}, discopop),
    "soft": ({"labels": "soft"}, soft),
    "soft ipo": ({"labels": "soft", "loss": "ipo"}, soft_ipo),
    "margin": ({"margin": 0.5}, offset),
    "hinge with margin": ({"loss": "hinge", "margin": 0.5}, slic_with_offset),
    "soft, margin, a token": (
        {"labels": "soft", "loss": "sigmoid_norm", "margin": 0.5},
        soft_with_offset,
    ),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Table]:
    table = random_table(0)
    return write_table(tmp_path_factory.mktemp("table"), table), table.astype(np.float32).astype(
        np.float64
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "d"
    return write_pairs(folder, PAIRS, probability=list(PROBABILITY), margin=list(MARGIN))


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Log-probabilities, and what the collator makes of numbers, in float64."""
    monkeypatch.setattr("trl.trainer.dpo_trainer.add_fused_lm_head", exact_lm_head)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def exact_lm_head(model: Any, outputs: tuple[str, ...] = ()) -> None:
    """What TRL's kernel gives, by log-softmax in float64."""
    plain = model.forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **values: Any) -> Any:
        if not fused_lm_head:
            return plain(*args, **values)
        labels = values.pop("labels")[:, 1:]
        hidden = self.base_model(*args, **values).last_hidden_state[:, :-1].double()
        choices = (hidden @ self.lm_head.weight.double().T).log_softmax(-1)
        told = choices.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        told = told.masked_fill(labels == -100, 0)
        nothing = torch.zeros_like(told)
        return FusedCausalLMOutput(
            log_probs=told, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

    model.forward = types.MethodType(forward, model)


def trainer_for(changes: dict[str, Any], model: str, pairs: Path, output: Path) -> Any:
    settings = {
        "model": model,
        "weights": "full",
        "dtype": "float32",
        "beta": BETA,
        "max_length": 32,
        "max_steps": 1,
        "batch_size": len(PAIRS),
        "gradient_checkpointing": False,
        "probe": None,
    }
    config = DPOConfig(**{**settings, **changes})
    train, _ = load_data(config, pairs, load_tokenizer(model, None))
    assert train is not None
    return build_trainer(config, TrainingRuntime(), output, train, None)


def batch_of(policy: Table, reference: Table) -> Batch:
    ours, theirs = log_probs(policy), log_probs(reference)

    def gains(answers: tuple[str, ...]) -> Array:
        return np.array([ours[a] - theirs[a] for a in answers])

    def lengths(answers: tuple[str, ...]) -> Array:
        return np.array([len(a.split()) + 1.0 for a in answers])

    def differences(table: dict[str, float]) -> Array:
        return np.array([table[c] - table[r] for c, r in PAIRS])

    return Batch(
        gains(CHOSEN),
        gains(REJECTED),
        lengths(CHOSEN),
        lengths(REJECTED),
        differences(ours),
        differences(theirs),
    )


def numeric_gradient(loss: Callable[[Batch], Array], policy: Table, reference: Table) -> Table:
    """By central differences, over the logits that any of the answers uses."""
    found = np.zeros_like(policy)
    for at in np.argwhere(policy > -1e8):
        moved = []
        for step in (1e-5, -1e-5):
            table = policy.copy()
            table[tuple(at)] += step
            moved.append(loss(batch_of(table, reference)).mean())
        found[tuple(at)] = (moved[0] - moved[1]) / 2e-5
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_its_papers_and_so_is_its_gradient(
    name: str, float64: None, reference: tuple[str, Table], pairs: Path, tmp_path: Path
) -> None:
    changes, loss = LOSSES[name]
    folder, table = reference
    trainer = trainer_for(changes, folder, pairs, tmp_path)
    trainer.model.double()
    policy = random_table(1)
    trainer.model.lm_head.weight.data = torch.tensor(policy.T)
    rows = [trainer.train_dataset[n] for n in range(len(PAIRS))]
    ours = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows))
    ours.backward()
    expected = loss(batch_of(policy, table))
    assert expected.std() > 1e-3  # the pairs do differ
    assert float(ours.detach()) == pytest.approx(expected.mean(), rel=1e-6)
    gradient = read_table(trainer.model.lm_head.weight.grad)
    numeric = numeric_gradient(loss, policy, table)
    assert np.abs(numeric).max() > 1e-3
    assert np.abs(gradient - numeric).max() < 1e-6 * np.abs(numeric).max()


def test_prompts_that_count_alike_weigh_every_loss_of_single_pairs(
    float64: None, reference: tuple[str, Table], tmp_path: Path
) -> None:
    folder, table = reference
    # The first prompt has six of the nine pairs, three others one each: 9/4 for each prompt.
    ids = ["p0"] * 6 + ["p1", "p2", "p3"]
    weights = np.array([9 / 4 / 6] * 6 + [9 / 4] * 3)
    dataset = write_pairs(tmp_path / "d", PAIRS, prompt_id=ids)
    for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo"):
        changes, loss = LOSSES[name]
        run = tmp_path / name
        trainer = trainer_for({**changes, "balance": "prompts"}, folder, dataset, run)
        trainer.model.double()
        policy = random_table(1)
        trainer.model.lm_head.weight.data = torch.tensor(policy.T)
        rows = [trainer.train_dataset[n] for n in range(len(PAIRS))]
        ours = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows))
        expected = (weights * loss(batch_of(policy, table))).mean()
        assert float(ours.detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "hinge", "labels": "soft"}, r"labels: soft means nothing to loss: hinge; leave"),
        ({"loss": "nca_pair", "label_smoothing": 0.1}, "label_smoothing means nothing to loss"),
        ({"loss": "ipo", "margin": 1}, r"margin means nothing .*take one of sigmoid, sigmoid_norm"),
        ({"loss": "aot", "balance": "prompts"}, "balance: prompts means nothing to loss: aot"),
        ({"labels": "soft", "label_smoothing": 0.1}, "both say how sure a label is; give one"),
        ({"loss": "robust"}, r"robust needs label_smoothing, the share of wrong labels, as 0.1"),
        ({"loss": "exo_pair"}, r"exo_pair needs label_smoothing, .* as 0.001"),
        ({"loss": "aot", "batch_size": 1}, "compares the pairs of a batch, and batch_size is 1"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"loss": "sft"}, "Input should be 'sigmoid'"),
    ],
)
def test_what_means_nothing_together_is_refused_with_a_cure(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        DPOConfig(model="m", **changes)


@pytest.mark.parametrize("margin", [None, float("nan")])
def test_margins_have_to_be_there(
    margin: float | None, reference: tuple[str, Table], tmp_path: Path
) -> None:
    margins: list[Any] = [1.0] * 8 + [margin]
    dataset = write_pairs(tmp_path / "d", PAIRS, margin=margins)
    with pytest.raises(InputError, match=r"pair c8>r8: its margin is (None|nan); .*say margin: 0"):
        trainer_for({"margin": 0.5}, reference[0], dataset, tmp_path / "run")
    trainer_for({}, reference[0], dataset, tmp_path / "run")


def test_the_losses_are_those_that_trl_has() -> None:
    # So that a new version's losses are noticed; TRL's `sft` is no loss of pairs.
    from trl.trainer.dpo_config import DPOConfig as TRLConfig

    said = TRLConfig.__dataclass_fields__["loss_type"].metadata["help"].split("combined")[0]
    theirs = {word.strip("`'. ,") for word in said.split() if word.startswith("`'")}
    ours = set(DPOConfig.model_fields["loss"].annotation.__args__)  # type: ignore[union-attr]
    assert ours | {"sft"} == theirs
