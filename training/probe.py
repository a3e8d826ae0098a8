"""Held-out sampling during training: the only place where a collapse shows.

A policy pushed too far answers nonsense while reward accuracy and margins keep rising, because
both look only at the dataset's own answers. So the policy is sampled as it trains, on prompts it
never saw, its answers are looked at and judged against the reference model's, and a run that
decays is stopped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field

from preferences.config import Config
from preferences.records import Messages
from training.sampling import Sample

REPETITION_ORDER = 4
MAX_REPETITION = 0.7
"""Share of 4-grams that occurred before; above it an answer goes round in circles.
seq-rep-n of Welleck et al. 2020: people write about 0.01, greedy GPT-2 about 0.4."""


class ProbeConfig(Config):
    """When and how the policy is sampled while it trains, and when that stops the run."""

    every: int = Field(50, ge=1)
    """Steps between two probes; the last step is always probed."""
    prompts: int = Field(64, ge=1)
    """Held-out prompts answered in each probe; the standard error of a win rate is 0.5/√prompts."""
    max_tokens: int = Field(256, ge=1)
    """Longest answer, in tokens; a longer one is cut and counts as malformed."""
    temperature: float = Field(1.0, ge=0, le=5)
    """0 takes the likeliest token every time."""
    batch_size: int = Field(32, ge=1)
    """Prompts answered at once; it decides which prompts share a seed."""
    max_malformed: float = Field(0.2, gt=0, le=1)
    """Largest share of answers that are empty, cut, in circles or refused by `well_formed`."""
    max_length_rate: float = Field(0.2, gt=0, le=1)
    """Largest share of answers cut at `max_tokens`."""
    min_win_rate: float = Field(0.35, ge=0, le=0.5)
    """Smallest mean probability of beating the reference; without a scorer it is not looked at."""
    patience: int = Field(2, ge=1)
    """So many bad probes in a row stop the run."""


class Scorer(Protocol):
    """Compares answers; handed in from above, so that training knows no judge."""

    def __call__(
        self, prompts: Sequence[Messages], responses: Sequence[str], references: Sequence[str]
    ) -> Sequence[float | None]:
        """P(response beats the reference's response), in [0, 1]; None where there is no verdict."""
        ...


WellFormed = Callable[[Messages, str], bool]
"""Whether a finished answer has the form the task asks for."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What the policy's answers on held-out prompts looked like at one step."""

    step: int
    prompts: int
    malformed: float
    """Share of the answers, between 0 and 1."""
    length_rate: float
    """Share of the answers cut at the token limit."""
    mean_tokens: float
    reference_mean_tokens: float
    win_rate: float | None
    """Mean P(beats the reference) over the judged answers; 0.5 at step 0: the reference itself."""
    win_rate_error: float | None
    """Standard error of the win rate over prompts."""
    judged: int
    breach: str | None
    """What is wrong, in words; None where every threshold is kept."""


def malformed_reason(
    messages: Messages, sample: Sample, well_formed: WellFormed | None
) -> str | None:
    """Why an answer is malformed, in one word, or None."""
    if not sample.finished:
        return "unfinished"
    if not sample.text.strip():
        return "empty"
    if repetition(sample.ids) > MAX_REPETITION:
        return "repetitive"
    if well_formed is not None and not well_formed(messages, sample.text):
        return "form"
    return None


def repetition(ids: Sequence[int]) -> float:
    """1 − distinct/all 4-grams of the tokens; 0 for answers too short to go round in circles."""
    grams = [tuple(ids[i : i + REPETITION_ORDER]) for i in range(len(ids) - REPETITION_ORDER + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= 2 * REPETITION_ORDER else 0.0


def measure(
    config: ProbeConfig,
    step: int,
    prompts: Sequence[Messages],
    samples: Sequence[Sample],
    references: Sequence[Sample],
    reasons: Sequence[str | None],
    wins: Sequence[float | None],
) -> Probe:
    """The probe of one step from its samples, why each is malformed, and how each was judged."""
    judged = [win for win in wins if win is not None]
    if any(not 0 <= win <= 1 for win in judged) or len(wins) != len(prompts):
        raise ValueError("a scorer returns one probability in [0, 1], or None, for each prompt")
    win_rate = sum(judged) / len(judged) if judged else None
    probe = Probe(
        step=step,
        prompts=len(prompts),
        malformed=sum(reason is not None for reason in reasons) / len(prompts),
        length_rate=sum(not sample.finished for sample in samples) / len(prompts),
        mean_tokens=sum(len(sample.ids) for sample in samples) / len(prompts),
        reference_mean_tokens=sum(len(sample.ids) for sample in references) / len(prompts),
        win_rate=win_rate,
        win_rate_error=_standard_error(judged),
        judged=len(judged),
        breach=None,
    )
    return with_breach(config, probe)


def with_breach(config: ProbeConfig, probe: Probe) -> Probe:
    """The probe with what it breaks said in words."""
    broken = []
    if probe.malformed > config.max_malformed:
        broken.append(
            f"{probe.malformed:.0%} of the answers are malformed "
            f"(at most {config.max_malformed:.0%})"
        )
    if probe.length_rate > config.max_length_rate:
        broken.append(
            f"{probe.length_rate:.0%} run into the limit of {config.max_tokens} tokens "
            f"(at most {config.max_length_rate:.0%})"
        )
    if probe.win_rate is not None and probe.win_rate < config.min_win_rate:
        broken.append(
            f"they win {probe.win_rate:.0%} against the reference (at least "
            f"{config.min_win_rate:.0%})"
        )
    return dataclasses.replace(probe, breach="; ".join(broken) or None)


def best_probe(probes: Sequence[Probe], scored: bool) -> Probe | None:
    """The probe whose weights to keep: highest win rate, or without a scorer fewest malformed.

    Only probes that keep every threshold count; of equals the later one, which learnt more.
    """
    kept = [probe for probe in probes if probe.breach is None]
    if not kept:
        return None
    if scored:
        return max(kept, key=lambda p: (-1.0 if p.win_rate is None else p.win_rate, p.step))
    return max(kept, key=lambda p: (-p.malformed, p.step))


def must_stop(config: ProbeConfig, probes: Sequence[Probe]) -> bool:
    """Whether the last `patience` probes all broke a threshold."""
    last = probes[-config.patience :]
    return len(last) == config.patience and all(probe.breach is not None for probe in last)


def step_to_save(
    probes: Sequence[Probe], best: Probe | None, planned: int
) -> tuple[int, str | None]:
    """The step whose weights to publish after the last probe, and why if it is not that probe's."""
    last = probes[-1]
    if last.breach is None or best is None:
        return last.step, None
    kept = "the reference itself" if best.step == 0 else f"step {best.step}, the best probe"
    ended = f"Stopped after step {last.step} of {planned}" if last.step < planned else "Ended"
    return best.step, f"{ended}, where {last.breach}; the saved weights are those of {kept}."


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
