"""What a finished run learnt, on held-out pairs: implicit reward accuracy, with its baseline; and
how far a policy has gone from another, on its own answers.

The implicit reward of an answer is β·[log π(answer) − log π_ref(answer)] (Rafailov et al. 2023).
A policy that only learnt "longer is better" scores well on it too, so that rule is scored on the
same pairs beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preferences.errors import InputError
from preferences.estimate import Z95, Estimate, clustered_mean
from preferences.records import Messages
from training import models
from training.data import load_pairs, tokenize_answer
from training.models import Dtype
from training.saved_adapters import load_trained
from training.settings import TrainingConfig


@dataclass(frozen=True, slots=True)
class RewardAccuracy:
    """How often the chosen answer is the better one; a tie counts half."""

    pairs: int
    prompts: int
    accuracy: Estimate
    """By the implicit reward."""
    longer_wins: Estimate
    """By the rule that the answer with more tokens is better."""


def implicit_reward_accuracy(
    config: TrainingConfig, output: Path, dataset: Path, split: str = "test", batch_size: int = 8
) -> RewardAccuracy:
    """Score the weights a finished run left in `output` on a split of `dataset`."""
    tokenizer = models.load_tokenizer(config.model, config.revision)
    ends = models.end_tokens(config.model, config.revision, tokenizer)
    pairs = load_pairs(dataset, split, tokenizer, ends=ends, max_length=config.max_length)
    if pairs is None:
        raise InputError(f"{dataset}: no data/{split}-*.parquet in it; name another split")
    rows = [
        (row["prompt_ids"], row[f"{answer}_ids"])
        for row in pairs.rows
        for answer in ("chosen", "rejected")
    ]
    with models.quiet_libraries():
        policy, reference = _log_probs(config, output, rows, tokenizer.pad_token_id, batch_size)
    rewards = [ours - theirs for ours, theirs in zip(policy, reference, strict=True)]
    lengths = [float(len(answer)) for _, answer in rows]
    clusters = list(pairs.rows["prompt_id"])
    return RewardAccuracy(
        pairs=len(clusters),
        prompts=len(set(clusters)),
        accuracy=clustered_share(_first_of_two_wins(rewards), clusters),
        longer_wins=clustered_share(_first_of_two_wins(lengths), clusters),
    )


@dataclass(frozen=True, slots=True)
class Policy:
    """A language model: a folder or a Hub id, and what a run trained on it."""

    model: str
    revision: str | None = None
    adapter: Path | None = None


@dataclass(frozen=True, slots=True)
class OwnAnswer:
    """What a policy answered."""

    prompt: Messages
    response: str
    finished: bool
    """It ended by itself and was not cut."""


def log_ratios(
    policy: Policy,
    reference: Policy,
    answers: Sequence[OwnAnswer],
    dtype: Dtype,
    temperature: float = 1.0,
    batch_size: int = 8,
) -> list[float | None]:
    """log π(answer | prompt) − log π_ref(answer | prompt) of each answer, in nats.

    Over answers that the policy itself drew at this temperature from its whole distribution, their
    mean estimates KL(π‖π_ref) an answer, of both models at that temperature; up to where answers
    are cut. One answer's can be negative. Texts are taken as the tokens that the template makes of
    them; None where it refuses them.
    """
    tokenizer = models.load_tokenizer(policy.model, policy.revision)
    ends = models.end_tokens(policy.model, policy.revision, tokenizer)
    found: dict[int, tuple[list[int], list[int]]] = {}
    for number, answer in enumerate(answers):
        prompt = [{"role": m.role, "content": m.content} for m in answer.prompt]
        told = [{"role": "assistant", "content": answer.response}]
        tokens, _, _ = tokenize_answer(prompt, told, tokenizer, ends=ends, max_length=_ANY)
        if tokens is not None:
            cut = not answer.finished and tokens.answer[-1] in ends
            found[number] = tokens.prompt, tokens.answer[:-1] if cut else tokens.answer
    rows, pad = list(found.values()), tokenizer.pad_token_id
    with models.quiet_libraries():
        ours, theirs = (
            answer_log_probs(
                _loaded(each, dtype), rows, pad, batch_size, dtype == "bfloat16", temperature
            )
            for each in (policy, reference)
        )
    ratios = dict(zip(found, (a - b for a, b in zip(ours, theirs, strict=True)), strict=True))
    return [ratios.get(number) for number in range(len(answers))]


_ANY = 2**31


def _loaded(policy: Policy, dtype: Dtype) -> Any:
    import torch

    # In `dtype`, as what is frozen is: nothing trains here.
    model = models.load_model(policy.model, policy.revision, "lora", dtype)
    if policy.adapter is not None:
        model = load_trained(model, policy.adapter)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def clustered_share(scores: Sequence[float], clusters: Sequence[str]) -> Estimate:
    """Mean of scores in [0, 1] with a 95 % Wilson interval that knows pairs share prompts.

    The number of pairs is divided by the design effect (Kish 1965): the variance over clusters
    against that of independent pairs. Where every score is 0 or every score is 1, or there is one
    cluster, the number of clusters is taken.
    """
    estimate = clustered_mean(zip(clusters, scores, strict=True))
    if estimate is None:
        raise ValueError("no pairs were scored")
    n, mean = len(scores), estimate.mean
    independent = mean * (1 - mean) / n
    effective = float(estimate.clusters)
    if estimate.clusters > 1 and independent > 0:
        clustered = ((estimate.high - estimate.low) / (2 * Z95)) ** 2
        effective = n / max(1.0, clustered / independent)
    centre = (mean + Z95**2 / (2 * effective)) / (1 + Z95**2 / effective)
    spread = mean * (1 - mean) / effective + Z95**2 / (4 * effective**2)
    half = Z95 * math.sqrt(spread) / (1 + Z95**2 / effective)
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half), estimate.clusters)


def answer_log_probs(
    model: Any,
    rows: Sequence[tuple[list[int], list[int]]],
    pad: int,
    batch_size: int,
    bf16: bool = False,
    temperature: float = 1.0,
) -> list[float]:
    """log π(answer | prompt) of each (prompt, answer), in nats, summed over the answer's tokens; of
    the policy at this temperature."""
    import torch

    device = model.device
    sums: list[float] = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, bf16):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            width = max(len(prompt) + len(answer) for prompt, answer in batch)
            ids = torch.full((len(batch), width), pad, device=device)
            present = torch.zeros_like(ids)
            counted = torch.zeros_like(ids, dtype=torch.bool)
            for i, (prompt, answer) in enumerate(batch):
                end = len(prompt) + len(answer)
                ids[i, :end] = torch.tensor(prompt + answer, device=device)
                present[i, :end] = 1
                counted[i, len(prompt) : end] = True
            logits = model(input_ids=ids, attention_mask=present).logits
            # Virtual tokens stand before the prompt's own.
            logits = logits[:, -width:][:, :-1].float() / temperature
            tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            sums += (tokens * counted[:, 1:]).sum(-1).tolist()
    return sums


def _log_probs(
    config: TrainingConfig,
    output: Path,
    rows: Sequence[tuple[list[int], list[int]]],
    pad: int,
    batch_size: int,
) -> tuple[list[float], list[float]]:
    """Of the policy and of the reference."""
    import torch

    bf16 = config.dtype == "bfloat16"
    model = models.load_model(config.model, config.revision, config.weights, config.dtype)
    if torch.cuda.is_available():
        model = model.to("cuda")
    model.eval()
    reference = answer_log_probs(model, rows, pad, batch_size, bf16)
    saved = output / models.saved_folder(config.weights)
    if saved.name == "model":
        del model
        trained = models.load_model(str(saved), None, "full", config.dtype)
        trained = trained.to("cuda") if torch.cuda.is_available() else trained
    else:
        trained = load_trained(model, saved)
    trained.eval()
    return answer_log_probs(trained, rows, pad, batch_size, bf16), reference


def _first_of_two_wins(values: Sequence[float]) -> list[float]:
    """For values in pairs: 1 where the first is larger, 0 where the second is, 0.5 for a tie."""
    pairs = zip(values[::2], values[1::2], strict=True)
    return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in pairs]
