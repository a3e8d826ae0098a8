"""Probes: what they measure, when they stop a run, and that they leave no trace in training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from preferences.records import Message
from training.models import load_model, load_tokenizer
from training.probe import (
    Probe,
    ProbeConfig,
    best_probe,
    malformed_reason,
    measure,
    must_stop,
    repetition,
    step_to_save,
)
from training.sampling import Sample, sample, undisturbed

ASKED = (Message("user", "paint thing1"),)


def said(text: str, finished: bool = True) -> Sample:
    words = text.split()
    return Sample(text, tuple(hash(word) % 1000 for word in words), finished)


def probe(step: int, malformed: float, win_rate: float | None = None, bad: bool = False) -> Probe:
    breach = "bad" if bad else None
    return Probe(step, 8, malformed, 0.0, 3.0, 3.0, win_rate, None, 8, breach)


def test_repetition_is_the_share_of_four_grams_seen_before() -> None:
    # Ten tokens have seven 4-grams; too few to speak of circles.
    assert repetition([1] * 10) == 0
    # Twelve equal tokens: nine 4-grams, one distinct: 1 − 1/9.
    assert repetition([1] * 12) == pytest.approx(8 / 9)
    assert repetition(range(12)) == 0


def test_an_answer_is_malformed_for_one_of_four_reasons() -> None:
    def no_blue(messages: Any, text: str) -> bool:
        return "blue" not in text

    assert malformed_reason(ASKED, said("red", finished=False), None) == "unfinished"
    assert malformed_reason(ASKED, said("  "), None) == "empty"
    assert malformed_reason(ASKED, said("red " * 12), None) == "repetitive"
    assert malformed_reason(ASKED, said("blue"), no_blue) == "form"
    assert malformed_reason(ASKED, said("red"), no_blue) is None


def test_an_answer_without_verdict_counts_neither_for_nor_against() -> None:
    samples = [said("red"), said("red red"), said("blue", finished=False), said("red")]
    reasons = [None, None, "unfinished", None]
    measured = measure(
        ProbeConfig(max_malformed=0.5, max_length_rate=0.2, min_win_rate=0.5),
        8,
        [ASKED] * 4,
        samples,
        [said("red red")] * 4,
        reasons,
        [1.0, 0.5, None, 0.0],
    )
    assert measured.win_rate == 0.5
    assert measured.judged == 3
    # Variance of (1, .5, 0) is .25 over n − 1 = 2 … √(.25/3).
    assert measured.win_rate_error == pytest.approx((0.25 / 3) ** 0.5)
    assert (measured.malformed, measured.length_rate) == (0.25, 0.25)
    assert (measured.mean_tokens, measured.reference_mean_tokens) == (1.25, 2.0)
    assert measured.breach == "25% run into the limit of 256 tokens (at most 20%)"


def test_a_scorer_that_returns_something_else_than_probabilities_is_an_error() -> None:
    with pytest.raises(ValueError, match="one probability"):
        measure(ProbeConfig(), 1, [ASKED], [said("a")], [said("a")], [None], [1.5])


def test_the_best_probe_wins_most_and_without_a_judge_is_malformed_least() -> None:
    probes = [
        probe(0, 0.02, 0.5),
        probe(8, 0.05, 0.7),
        probe(16, 0.05, 0.7),
        probe(24, 0.0, 0.9, bad=True),
    ]
    scored, unscored = best_probe(probes, scored=True), best_probe(probes, scored=False)
    assert scored is not None
    assert scored.step == 16  # of equals the later
    assert unscored is not None
    assert unscored.step == 0


def test_one_bad_probe_is_forgiven_and_two_in_a_row_stop_the_run() -> None:
    good, bad = probe(8, 0.0), probe(16, 0.9, bad=True)
    config = ProbeConfig(patience=2)
    assert not must_stop(config, [good, bad])
    assert not must_stop(config, [bad, good, bad])
    assert must_stop(config, [good, bad, bad])


def test_a_run_that_ends_on_a_bad_probe_publishes_the_best_one() -> None:
    good, bad = probe(8, 0.0, 0.7), probe(16, 0.9, 0.1, bad=True)
    assert step_to_save([good, probe(16, 0.1, 0.6)], good, planned=16) == (16, None)
    step, reason = step_to_save([good, bad], good, planned=16)
    assert step == 8
    assert reason == "Ended, where bad; the saved weights are those of step 8, the best probe."


def test_sampling_leaves_random_state_and_training_mode_as_they_were(model: str) -> None:
    import numpy as np
    import torch

    policy = load_model(model, None, "full", "float32").train()
    policy.model.layers[0].eval()  # a mixed state comes back mixed
    torch.manual_seed(5)
    with undisturbed(policy):
        assert not policy.training
        torch.rand(3), random.random(), np.random.rand()
    after = float(torch.rand(1))
    torch.manual_seed(5)
    assert after == float(torch.rand(1))
    assert policy.training
    assert not policy.model.layers[0].training


def test_samples_depend_on_the_seed_and_not_on_padding_or_earlier_draws(
    model: str, tmp_path: Path
) -> None:
    import torch

    policy, tokenizer = load_model(model, None, "full", "float32"), load_tokenizer(model, None)
    prompts = [
        tokenizer(f"<bos><user>{words}<end>\n<assistant>", add_special_tokens=False)["input_ids"]
        for words in ("paint thing1", "paint thing2 thing3 thing4", "paint thing5")
    ]

    def draw(seed: int, temperature: float = 1.0, batch_size: int = 3) -> list[Sample]:
        return sample(
            policy,
            tokenizer,
            prompts,
            ends={tokenizer.eos_token_id},
            max_tokens=6,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            bf16=False,
        )

    first = draw(1)
    torch.rand(7)
    assert draw(1) == first
    assert draw(2) != first
    # Greedy answers do not depend on what they are batched with.
    assert draw(1, temperature=0, batch_size=1) == draw(2, temperature=0, batch_size=3)
    assert all(len(reply.ids) <= 6 for reply in first)
    assert all(reply.finished or len(reply.ids) == 6 for reply in first)
