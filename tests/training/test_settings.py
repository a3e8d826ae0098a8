"""Settings do what they say: optimizers, schedules, clipping, decay, early stopping, and what is
told before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from preferences.errors import InputError, MissingExtra
from preferences.records import Messages
from tests.training.conftest import (
    THINGS,
    build_tokenizer,
    equal,
    pairs_preferring,
    saved_weights,
    silent,
    write_split,
)
from training.dpo import DPOConfig, build_trainer, load_data
from training.loop import train
from training.models import load_tokenizer
from training.run import RunFolder, TrainingRuntime
from training.settings import EarlyStopping
from training.stopper import no_better

MakeConfig = Callable[..., DPOConfig]
EVERY = TrainingRuntime(log_steps=1, save_steps=1)


def watched(config: DPOConfig, dataset: Path, output: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The trainer after training, and what there was before each update."""
    import torch
    from transformers import TrainerCallback

    seen: list[dict[str, Any]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            named = dict(found["model"].named_parameters())
            gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
            norm = torch.nn.utils.get_total_norm(gradients.values())
            weights = {n: p.detach().clone() for n, p in named.items()}
            rate = found["optimizer"].param_groups[0]["lr"]
            seen.append(
                {"rate": rate, "norm": float(norm), "gradients": gradients, "weights": weights}
            )

    pairs, _ = load_data(config, dataset, load_tokenizer(config.model, None))
    assert pairs is not None
    trainer = build_trainer(config, EVERY, output, pairs, None)
    trainer.add_callback(Watch())
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # Ten updates, two of warm-up: 0 and 1/2 of the peak, and then over eight updates …
        ("constant", [0, 0.5, *([1.0] * 8)]),
        ("linear", [0, 0.5, *(1 - n / 8 for n in range(8))]),
        ("cosine", [0, 0.5, *((1 + math.cos(math.pi * n / 8)) / 2 for n in range(8))]),
    ],
)
def test_the_rate_of_every_update_is_that_of_its_schedule(
    schedule: str, rates: list[float], make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_config(
        schedule=schedule, warmup_share=0.2, max_steps=10, learning_rate=2e-3, probe=None
    )
    _, seen = watched(config, red_pairs, tmp_path)
    assert [step["rate"] for step in seen] == pytest.approx([2e-3 * rate for rate in rates])


def test_a_long_gradient_is_cut_to_the_length_that_is_asked_for(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    free, cut = (
        watched(
            make_config(gradient_clipping=length, max_steps=1, probe=None),
            red_pairs,
            tmp_path / str(length),
        )[1][0]["norm"]
        for length in (None, 0.01)
    )
    assert free > 0.1
    assert cut == pytest.approx(0.01, rel=1e-3)


def test_the_first_step_of_adamw_is_the_rate_and_weights_decay_by_theirs(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_config(
        weights="full", learning_rate=1e-3, weight_decay=0.5, max_steps=1, probe=None
    )
    trainer, (before,) = watched(config, red_pairs, tmp_path)
    for name, after in trainer.model.named_parameters():
        if name not in before["gradients"]:
            continue
        g, w = before["gradients"][name], before["weights"][name]
        # Kingma and Ba 2015: m/√v = g/|g| at first, with ε = 1e-8. Loshchilov and Hutter 2019:
        # the weight loses rate·decay of itself besides; norms lose nothing.
        decay = 0.0 if "norm" in name else 0.5
        expected = w * (1 - 1e-3 * decay) - 1e-3 * g / (g.abs() + 1e-8)
        assert (after - expected).abs().max() < 1e-6, name
    assert any("norm" in name for name in before["gradients"])


@pytest.mark.parametrize(
    ("optimizer", "kind", "state"),
    [
        ("adamw", "torch.optim.adamw.AdamW", {"exp_avg": "float32", "exp_avg_sq": "float32"}),
        ("adamw_8bit", "bitsandbytes.optim.adamw.AdamW", {"state1": "uint8", "state2": "uint8"}),
        ("adafactor", "transformers.optimization.Adafactor", {"exp_avg_sq_row": "float32"}),
    ],
)
def test_each_optimizer_is_the_one_it_is_called_and_learns(
    optimizer: str,
    kind: str,
    state: dict[str, str],
    make_config: MakeConfig,
    red_pairs: Path,
    tmp_path: Path,
) -> None:
    # bitsandbytes holds tensors of fewer than 4,096 numbers in 32 bits: rank 64 on 64 makes 4,096.
    config = make_config(
        optimizer=optimizer, lora={"rank": 64}, max_steps=12, learning_rate=2e-3, probe=None
    )
    trainer, _ = watched(config, red_pairs, tmp_path)
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert f"{type(inner).__module__}.{type(inner).__name__}" == kind
    largest = max(inner.state.values(), key=lambda held: sum(t.numel() for t in _tensors(held)))
    for name, dtype in state.items():
        assert str(largest[name].dtype) == f"torch.{dtype}"
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.5


def _tensors(state: dict[str, Any]) -> list[Any]:
    return [value for value in state.values() if hasattr(value, "numel")]


def test_an_optimizer_that_cannot_run_here_is_refused_before_anything_is_loaded(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"paged_adamw_8bit needs a GPU; say adamw_8bit"):
        train(make_config(optimizer="paged_adamw_8bit"), red_pairs, tmp_path / "run")
    real = importlib.util.find_spec
    absent = lambda name: None if name == "bitsandbytes" else real(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(MissingExtra, match=r"adamw_8bit needs bitsandbytes: pip install"):
        train(make_config(optimizer="adamw_8bit"), red_pairs, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def misleading(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that teach red and held-out ones that ask for anything but: the more is learnt, the
    worse it gets."""
    folder = tmp_path_factory.mktemp("misleading")
    write_split(folder, "train", pairs_preferring("red red", 48, THINGS[:24]))
    others = [(p, worse, red) for p, red, worse in pairs_preferring("red red", 24, THINGS[24:])]
    write_split(folder, "test", others)
    return folder


def test_a_run_that_only_gets_worse_ends_early_with_its_best_weights(
    make_config: MakeConfig, misleading: Path, tmp_path: Path
) -> None:
    stopping = EarlyStopping(metric="loss", patience=2)
    config = make_config(early_stopping=stopping, eval_steps=2, max_steps=40, probe=None)
    result = train(config, misleading, tmp_path / "run", EVERY, progress=silent)
    # Evaluated after 2, 4 and 6 steps: two looks in a row brought nothing better than the first.
    assert (result.steps, result.saved_step, result.stopped_early) == (6, 2, True)
    assert result.reason == (
        "Stopped after step 6 of 40; the saved weights are those of step 2, with the best "
        "held-out loss."
    )
    short = train(
        make_config(eval_steps=2, max_steps=2, probe=None),
        misleading,
        tmp_path / "short",
        EVERY,
        progress=silent,
    )
    assert equal(saved_weights(tmp_path / "run", result), saved_weights(tmp_path / "short", short))


def test_the_accuracy_on_held_out_pairs_can_end_a_run_as_well(
    make_config: MakeConfig, misleading: Path, tmp_path: Path
) -> None:
    stopping = EarlyStopping(metric="accuracy", patience=2)
    config = make_config(early_stopping=stopping, eval_steps=2, max_steps=40, probe=None)
    result = train(config, misleading, tmp_path / "run", EVERY, progress=silent)
    seen = {
        line["step"]: line["eval_rewards/accuracies"]
        for line in RunFolder(tmp_path / "run").metrics()
        if "eval_loss" in line
    }
    assert max(seen) == result.steps == result.saved_step + 4 < 40
    assert seen[result.saved_step] == max(seen.values())
    assert min(seen.values()) < max(seen.values())


def test_a_run_that_gets_better_goes_to_its_end(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_config(
        early_stopping=EarlyStopping(patience=1), eval_steps=4, max_steps=12, probe=None
    )
    result = train(config, red_pairs, tmp_path / "run", EVERY, progress=silent)
    assert (result.steps, result.saved_step, result.reason) == (12, 12, None)


def test_probes_that_never_beat_the_reference_end_the_run_with_the_reference(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    def nearly(
        prompts: Sequence[Messages], responses: Sequence[str], references: Sequence[str]
    ) -> list[float | None]:
        return [0.4] * len(prompts)

    probe = {"every": 2, "prompts": 4, "max_tokens": 12, "max_malformed": 1, "max_length_rate": 1}
    stopping = EarlyStopping(metric="win_rate", patience=2)
    config = make_config(early_stopping=stopping, probe=probe, max_steps=40)
    result = train(config, red_pairs, tmp_path / "run", EVERY, nearly, progress=silent)
    # At step 0 it is a half by itself; steps 2 and 4 bring less.
    assert (result.steps, result.saved_step) == (4, 0)
    assert result.reason == (
        "Stopped after step 4 of 40; the saved weights are those of the reference itself, with "
        "the best win rate."
    )
    with pytest.raises(InputError, match=r"win_rate needs a judge that can be asked"):
        train(config, red_pairs, tmp_path / "unjudged", EVERY, progress=silent)
    with pytest.raises(ValueError, match="win_rate comes from probes, and probe is null"):
        make_config(early_stopping=stopping, probe=None)


def test_patience_counts_looks_without_a_better_value() -> None:
    assert not no_better({2: 0.7, 4: 0.6, 6: 0.65}, patience=2)  # one look since the best
    assert no_better({2: 0.7, 4: 0.6, 6: 0.65, 8: 0.61}, patience=2)
    assert no_better({2: 0.6, 4: 0.6, 6: 0.6}, patience=2)  # equal is not better
    assert not no_better({2: 0.7, 4: 0.8, 6: 0.6}, patience=2)
    assert no_better({2: 0.7, 4: math.inf}, patience=1)  # a loss that is no number is none better
    assert not no_better({2: 0.7}, patience=1)


def test_early_stopping_needs_something_held_out(make_config: MakeConfig, tmp_path: Path) -> None:
    write_split(tmp_path / "d", "train", pairs_preferring("red red", 4, THINGS))
    config = make_config(early_stopping=EarlyStopping(), probe=None)
    with pytest.raises(InputError, match=r"looks at held-out pairs and there is no data/test"):
        train(config, tmp_path / "d", tmp_path / "run", progress=silent)


def test_what_is_trained_on_is_told_before_training(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = [*pairs_preferring("red red", 5, THINGS), ("paint thing0", "red", "red")]
    write_split(tmp_path / "d", "train", [*pairs, ("paint " * 60, "red", "blue")])
    config = make_config(batch_size=4, accumulation=2, max_steps=1, probe=None)
    result = train(config, tmp_path / "d", tmp_path / "run")
    assert result.update == 8
    told = capfd.readouterr().err.splitlines()
    assert told.pop(1).startswith("tokens: about ")
    assert told[:3] == [
        "data: 5 pairs to train on; 8 pairs an update (2 batches of 4)",
        "warning: 5 pairs are fewer than an update's 8",
        "train: of 7 pairs, 1 identical_answers, 1 prompt_too_long",
    ]


def test_one_pair_is_trained_on_with_a_warning(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path / "d", "train", [("paint thing1", "red red", "blue")])
    config = make_config(max_steps=20, probe=None)
    result = train(config, tmp_path / "d", tmp_path / "run", EVERY)
    assert "warning: 1 pairs are fewer than an update's 4" in capfd.readouterr().err
    assert (result.steps, result.train.kept) == (20, 1)
    assert result.metrics["rewards/margins"] > 0.5


def test_padding_with_the_end_token_trains_exactly_the_same(
    model: str, make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(model, tmp_path / "model")
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    assert load_tokenizer(str(tmp_path / "model"), None).pad_token_id == tokenizer.eos_token_id
    config = make_config(max_steps=4, probe=None)
    # Answers of two to five words, so most batches are padded.
    distinct = train(config, red_pairs, tmp_path / "distinct", EVERY, progress=silent)
    same = config.model_copy(update={"model": str(tmp_path / "model")})
    result = train(same, red_pairs, tmp_path / "same", EVERY, progress=silent)
    assert equal(
        saved_weights(tmp_path / "distinct", distinct), saved_weights(tmp_path / "same", result)
    )


def test_a_finished_run_has_a_learning_curve(
    make_config: MakeConfig, red_pairs: Path, runtime: TrainingRuntime, tmp_path: Path
) -> None:
    from xml.etree import ElementTree

    train(make_config(), red_pairs, tmp_path / "run", runtime, progress=silent)
    picture = ElementTree.parse(tmp_path / "run" / "curve.svg")
    words = "".join(picture.getroot().itertext())
    for name in ("training loss", "held-out loss", "malformed answers"):
        assert name in words
    assert "win rate" not in words  # nobody judged
    drawn = [line for line in picture.iter() if line.tag.endswith("polyline")]
    lines = RunFolder(tmp_path / "run").metrics()
    logged = sum("loss" in line for line in lines)
    assert len(drawn[0].attrib["points"].split()) == logged == 4


def test_the_curve_goes_through_its_points() -> None:
    from xml.etree import ElementTree

    from training.curve import HEIGHT, MARGIN, WIDTH, learning_curve

    lines = [{"step": 5, "loss": 1.0}, {"step": 10, "loss": 0.0}]
    picture = ElementTree.fromstring(learning_curve(lines))
    (line,) = [part for part in picture.iter() if part.tag.endswith("polyline")]
    places = [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
    # The axis has a twentieth of the range more on both sides: from -0.05 to 1.05.
    top, bottom = MARGIN + HEIGHT * 0.05 / 1.1, MARGIN + HEIGHT * 1.05 / 1.1
    expected = [(MARGIN + WIDTH / 2, top), (MARGIN + WIDTH, bottom)]
    for place, wanted in zip(places, expected, strict=True):
        assert place == pytest.approx(wanted, abs=0.06)
    # Nothing logged is no error either.
    assert ElementTree.fromstring(learning_curve([])) is not None
