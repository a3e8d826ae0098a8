"""Which prompts are put to people, within a budget, and which the judges are trusted with.

People are asked about a random slice of the prompts first: it shows how often they agree with the
judges. The rest of the budget goes where an answer is worth most. The judges' word alone is taken
where they are so sure that people agree with them as often as wanted (Jung, Brahman & Choi 2024,
"Trust or Escalate: LLM judges with provable guarantees for human agreement", arXiv:2407.18370).

All this looks at what judges say; what people said only tells how sure is sure enough. So a
question stays the same question whatever is answered, and no answer can move the order in which
thresholds are tested.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from judging.judge import Group
from judging.ranking import best_probabilities, expected_regret, win_probability
from judging.raters import opinions
from preferences.config import Config
from preferences.policies import by_mean
from preferences.records import Decision, Judgment, Ranking, Route

DELTA = 0.05
"""The chance that agreement is below the target all the same."""
FIRST_TEST = 3
"""The first threshold is tested on about so many times the labels that could pass if all agreed:
with fewer it fails by bad luck, with many more only thresholds that keep much are ever tested."""
TESTS = 20
"""Thresholds from there to the one that keeps all, in equal steps of the share of prompts kept."""
BATCH = 256
"""Groups whose posteriors are drawn from at once: what bounds the memory."""


class PeopleConfig(Config):
    """What people are asked, and when the judges' word is enough without them."""

    labels: str
    """Where people answer: a table, .csv or .jsonl, which a build writes, people fill in and the
    next build reads; or `argilla`."""
    budget: int = Field(ge=1)
    """Most questions asked, one for a prompt."""
    answers: int = Field(2, ge=2, le=6)
    """How many answers a question shows; of three and more, people say the order."""
    overlap: int = Field(3, ge=1)
    """How many people answer each question of the random slice in Argilla; elsewhere it is one."""
    gold: str | None = None
    """A table of pairs whose better answer is known, with `prompt`, `chosen` and `rejected`: they
    are mixed among the questions and show how well people do."""
    wait_days: float | None = Field(None, ge=0)
    """How long the dataset waits for the answers that were asked for; by default it does not, and
    a later build takes up what has come."""
    calibration: float = Field(0.5, ge=0, le=1)
    """Share of the budget for prompts drawn at random; the rest goes where it is worth most."""
    target_agreement: float = Field(0.8, gt=0.5, lt=1)
    """How often people are to agree with the judges where judges are trusted alone."""
    keep: float = Field(0.9, ge=0.5, le=1)
    """Until people's answers tell, judges are trusted where they are at least so sure."""
    category_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )
    """What an answer is worth by the prompt's category, 1 where it is not named; with 0, people are
    asked about the category at random only."""
    seed: int = 0
    """Another seed, another random slice."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What routing has to know of a prompt: ids and numbers, no texts."""

    prompt_id: str
    best: str
    """The candidate with the highest mean."""
    worst: str
    """The one with the lowest that says something else: with the best, the likely pair."""
    confidence: float
    """P(best beats worst)."""
    rivals: tuple[str, str]
    """The two that are most probably the best, the one more likely better first."""
    probability: float
    """P(the first rival beats the second)."""
    regret: float
    """Expected, in logits."""
    weight: float
    texts: tuple[tuple[str, ...], ...]
    """All candidates, those that say the same together; the likelier best come first."""
    answered: bool = False
    """Whether people have answered a question about it."""
    agreed: bool | None = None
    """Whether most of those who compared best and worst prefer the best; None if nobody did."""

    @property
    def worth(self) -> float:
        """Of an answer."""
        return self.regret * self.weight


@dataclass(frozen=True)
class Trust:
    """How sure the judges have to be to be believed without people."""

    threshold: float | None
    """The least confidence that is enough; None where none is."""
    tested: bool
    """Whether people's answers say so; if not, it is the recipe's."""
    labels: int
    """Prompts of the random slice that people have answered."""
    agreed: int
    """On how many of them people agree with the judges."""
    lacking: str | None = None
    """What is missing, as a sentence, where answers do not settle it."""


@dataclass(frozen=True)
class Choice:
    """What is decided over all prompts together."""

    calibrate: frozenset[str]
    """Prompts of the random slice."""
    ask: frozenset[str]
    """Prompts worth asking about."""
    answered: int
    """How many of all these people have answered."""
    trust: Trust


def standings(
    rankings: Sequence[Ranking],
    groups: Iterable[Group],
    weights: Mapping[str, float],
    answers: Mapping[str, Sequence[Judgment]] | None = None,
) -> Iterator[Standing]:
    """Of the prompts that people can be asked about: judged, and with two different answers.

    The rankings are the judges' alone, and `answers` by prompt what people said when asked. In the
    order of the rankings; nothing depends on which are looked at together.
    """
    by_prompt = {group.prompt.prompt_id: group for group in groups}
    judged = [r for r in rankings if r.judgment_ids and len(r.candidate_ids) > 1]
    by_size: dict[int, list[Ranking]] = defaultdict(list)
    for ranking in judged:
        by_size[len(ranking.candidate_ids)].append(ranking)
    found: dict[str, Standing | None] = {}
    for size, alike in sorted(by_size.items()):
        for start in range(0, len(alike), BATCH):
            batch = alike[start : start + BATCH]
            mean = np.array([r.mean for r in batch])
            covariance = np.array([r.covariance for r in batch]).reshape(-1, size, size)
            numbers = zip(
                batch,
                expected_regret(mean, covariance).tolist(),
                best_probabilities(mean, covariance).tolist(),
                strict=True,
            )
            for ranking, regret, best in numbers:
                group = by_prompt[ranking.prompt_id]
                weight = weights.get(group.prompt.category or "", 1.0)
                found[ranking.prompt_id] = _standing(ranking, group, regret, best, weight)
    for ranking in judged:
        if (standing := found[ranking.prompt_id]) is not None:
            said = (answers or {}).get(ranking.prompt_id, ())
            agreed = agreement_with(standing, said)
            yield replace(standing, answered=bool(said), agreed=agreed) if said else standing


def _standing(
    ranking: Ranking, group: Group, regret: float, best: Sequence[float], weight: float
) -> Standing | None:
    words = {c.candidate_id: c.response.split() for c in group.candidates}
    ids = ranking.candidate_ids

    def other(order: Sequence[int], than: int) -> int | None:
        """The first that says something else: nobody can tell the same from the same."""
        return next((n for n in order if words[ids[n]] != words[ids[than]]), None)

    order = by_mean(ranking)
    likely = sorted(order, key=lambda n: -best[n])
    worst, rival = other(order[::-1], order[0]), other(likely, likely[0])
    if worst is None or rival is None:
        return None
    same: dict[str, list[str]] = defaultdict(list)
    for n in likely:
        same[" ".join(words[ids[n]])].append(ids[n])
    one, two = likely[0], rival
    probability = win_probability(ranking, one, two)
    if probability < 0.5:
        one, two, probability = two, one, 1 - probability
    return Standing(
        prompt_id=ranking.prompt_id,
        best=ids[order[0]],
        worst=ids[worst],
        confidence=win_probability(ranking, order[0], worst),
        rivals=(ids[one], ids[two]),
        probability=probability,
        regret=regret,
        weight=weight,
        texts=tuple(map(tuple, same.values())),
    )


def agreement_with(standing: Standing, people: Iterable[Judgment]) -> bool | None:
    """Whether most of the people who compared best and worst prefer the best; None if nobody did.

    A tie agrees with nobody.
    """
    pair = {standing.best, standing.worst}
    said = [o for o in opinions(people) if {o.first, o.second} == pair]
    if not said:
        return None
    agreed = sum((o.leaning if o.first == standing.best else 1 - o.leaning) > 0.5 for o in said)
    return 2 * agreed > len(said)


def choose(standing: Iterable[Standing], config: PeopleConfig) -> Choice:
    """Decide over all prompts; each costs its id and two numbers of memory.

    Whether people agree with the judges counts in the random slice only. Prompts outside it that
    people have answered questions about stay asked about, and are part of the budget.
    """
    known: list[tuple[str, float, float]] = []
    agreed: dict[str, bool] = {}
    answered: set[str] = set()
    for s in standing:
        known.append((s.prompt_id, s.confidence, s.worth))
        if s.agreed is not None:
            agreed[s.prompt_id] = s.agreed
        if s.answered:
            answered.add(s.prompt_id)
    ids = sorted((prompt_id for prompt_id, *_ in known), key=lambda p: (_draw(p, config.seed), p))
    calibrate = frozenset(ids[: int(config.budget * config.calibration)])
    confidences = np.sort([confidence for _, confidence, _ in known])[::-1]
    labels = [
        (confidence, agreed[prompt_id])
        for prompt_id, confidence, _ in known
        if prompt_id in calibrate and prompt_id in agreed
    ]
    trust = trusted(confidences.tolist(), labels, config)
    before = answered - calibrate
    unsure = sorted(
        (-worth, prompt_id)
        for prompt_id, confidence, worth in known
        if worth > 0
        and prompt_id not in calibrate
        and prompt_id not in before
        and not _is_sure(confidence, trust)
    )
    left = max(config.budget - len(calibrate) - len(before), 0)
    ask = before.union(prompt_id for _, prompt_id in unsure[:left])
    return Choice(calibrate, frozenset(ask), len(labels) + len(before), trust)


def routes(standing: Iterable[Standing], choice: Choice, answers: int) -> Iterator[Route]:
    """What is done about each prompt, by what was decided over all of them.

    A question shows so many answers, if there are so many that differ.
    """
    for s in standing:
        decision: Decision = "over_budget"
        pair, probability = s.rivals, s.probability
        if s.prompt_id in choice.calibrate:
            decision, pair, probability = "calibrate", (s.best, s.worst), s.confidence
        elif s.prompt_id in choice.ask:
            decision = "ask"
        elif _is_sure(s.confidence, choice.trust):
            decision, pair, probability = "keep", (s.best, s.worst), s.confidence
        yield Route(
            prompt_id=s.prompt_id,
            decision=decision,
            first_id=pair[0],
            second_id=pair[1],
            probability=probability,
            confidence=s.confidence,
            regret=s.regret,
            weight=s.weight,
            threshold=choice.trust.threshold,
            others=tuple(ids[0] for ids in s.texts if not {*ids} & {*pair})[: answers - 2],
        )


def trusted(
    confidences: Sequence[float], labels: Sequence[tuple[float, bool]], config: PeopleConfig
) -> Trust:
    """The least confidence above which people agree with the judges as often as wanted.

    `confidences` are those of all prompts, falling; `labels` those of a random part, with whether
    people agree. Thresholds are tested in a fixed order, from the one that keeps fewest: that
    agreement above it is below the target is rejected if so many would agree by chance with
    probability `DELTA` at most. The first that fails ends it, so that all tests together are wrong
    with probability `DELTA` at most (fixed-sequence testing: Maurer, Hothorn & Lehmacher 1995; for
    judges: Jung et al. 2024). The order comes from the judges' confidences alone.
    """
    agreed = sum(agrees for _, agrees in labels)
    least = math.ceil(math.log(DELTA) / math.log(config.target_agreement))
    if len(labels) < least:
        lacking = (
            f"{len(labels)} answers on the random slice; {least} are the fewest that can show "
            f"{config.target_agreement:.0%} agreement, and {FIRST_TEST * least} make it likely"
        )
        return Trust(config.keep, False, len(labels), agreed, lacking)
    threshold, lacking = None, ""
    first = min(FIRST_TEST * least / len(labels), 1.0)
    for step in range(TESTS):
        share = first + (1 - first) * step / (TESTS - 1)
        tried = confidences[math.ceil(share * len(confidences)) - 1]
        above = [agrees for confidence, agrees in labels if confidence >= tried]
        if binomial_tail(sum(above), len(above), config.target_agreement) > DELTA:
            lacking = (
                f"people agree with the judges on {sum(above)} of {len(above)} prompts where the "
                f"judges are surest (P ≥ {tried:.3f}), too few to show "
                f"{config.target_agreement:.0%}; more answers, a better judge or a lower target "
                "would help"
            )
            break
        threshold = tried
    return Trust(threshold, True, len(labels), agreed, lacking if threshold is None else None)


def binomial_tail(least: int, trials: int, probability: float) -> float:
    """P(at least so many of the trials succeed)."""
    if least <= 0:
        return 1.0
    log, log_not = math.log(probability), math.log1p(-probability)
    whole = math.lgamma(trials + 1)
    return math.fsum(
        math.exp(
            whole
            - math.lgamma(k + 1)
            - math.lgamma(trials - k + 1)
            + k * log
            + (trials - k) * log_not
        )
        for k in range(least, trials + 1)
    )


def _is_sure(confidence: float, trust: Trust) -> bool:
    return trust.threshold is not None and confidence >= trust.threshold


def _draw(prompt_id: str, seed: int) -> bytes:
    # By the prompt alone: the slice is the same however the prompts are cut or ordered, and one
    # that grows keeps what was asked.
    return hashlib.sha256(f"ask people {seed} {prompt_id}".encode()).digest()
