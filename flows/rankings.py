"""What rankings start from, besides the judgments: how judges err, and how people differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from judging.calibration import Calibrated, Families, Label, calibrate, labels_of, lacking
from judging.judge import Group
from judging.noise import Noise
from judging.ranking import learn_noise, rank
from judging.raters import family_of, is_human
from preferences.records import Judgment

Judged = tuple[Group, Sequence[Judgment]]
"""A group with all that was said about it."""
NOISE_PROMPTS = 1000
"""The first so many judged prompts tell the judges' noise; more would not change it."""
MAX_LABELS = 5_000
"""Of people, for the calibration: the first so many; more would not change four numbers."""
BATCH = 500


@dataclass(frozen=True)
class Scale:
    """The judges' noise, and the way from their scale to people's where people spoke."""

    noise: Noise
    calibrated: Calibrated | None
    """None where people judged nothing that judges did."""
    uncalibrated: str | None
    """What labels are missing to call probabilities calibrated, as a sentence; None where nothing
    is, or there is no judge to calibrate."""

    def summary(self) -> dict[str, Any]:
        """For the manifest of the rankings. Figures from too few labels would mislead."""
        calibrated = self.calibrated
        return {
            "noise": asdict(self.noise),
            "map": asdict(calibrated.calibration) if calibrated else None,
            "calibration": asdict(calibrated) if calibrated and not self.uncalibrated else None,
            "uncalibrated": self.uncalibrated,
        }


def learn_scale(
    read: Callable[[], Iterable[Judged]], families: Families, has_people: bool
) -> Scale:
    """From all that was judged, in the order of the prompts; `read` starts anew each time."""
    machines = ((g, [j for j in said if not is_human(j)]) for g, said in read())
    sample = list(islice(((g, said) for g, said in machines if said), NOISE_PROMPTS))
    noise = learn_noise([g for g, _ in sample], [j for _, said in sample for j in said])
    if not sample:
        return Scale(noise, None, None)
    labels: list[Label] = []
    if has_people:
        for part in _batches(read()):
            labels += _labels(part, noise, families)
            if len(labels) >= MAX_LABELS:
                break
    return Scale(noise, calibrate(labels) if labels else None, lacking(labels))


def families(judges: Iterable[str], models: dict[str, str]) -> Families:
    """From the names of the judges' models, and of the models behind the candidates' names."""
    known = (family_of(judge) for judge in judges)
    return Families(frozenset(family for family in known if family is not None), models)


def _labels(judged: Sequence[Judged], noise: Noise, families: Families) -> Iterator[Label]:
    people = {g.prompt.prompt_id: [j for j in said if is_human(j)] for g, said in judged}
    asked = [(g, said) for g, said in judged if people[g.prompt.prompt_id]]
    machines = [j for _, said in asked for j in said if not is_human(j)]
    for (group, _), ranking in zip(
        asked, rank([g for g, _ in asked], machines, noise), strict=True
    ):
        if ranking.judgment_ids:
            candidates = {c.candidate_id: c for c in group.candidates}
            yield from labels_of(ranking, candidates, people[ranking.prompt_id], families)


def _batches(judged: Iterable[Judged]) -> Iterator[list[Judged]]:
    left = iter(judged)
    while part := list(islice(left, BATCH)):
        yield part
