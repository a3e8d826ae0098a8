"""Rankings in, preferences and triplets out; what is not paired is dropped with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc
from rapidfuzz import fuzz

from preferences.fingerprint import fingerprint
from preferences.policies import POLICIES, Standings, by_mean
from preferences.policies import PairsConfig as PairsConfig  # what assembly is configured with
from preferences.records import (
    Candidate,
    Dropped,
    Preference,
    Ranking,
    Triplet,
    schema_of,
)

WinProbability = Callable[[Ranking, int, int], float]
"""P(the candidate at one place beats the one at another)."""


def assemble(
    rankings: Iterable[Ranking],
    candidates: Mapping[str, Candidate],
    config: PairsConfig,
    win_probability: WinProbability,
) -> Iterator[Preference | Dropped]:
    """The pairs a policy proposes that are sure enough and different enough, each once."""
    policy = POLICIES[config.policy]
    for ranking in rankings:
        if len(ranking.candidate_ids) < 2:
            count = f"{len(ranking.candidate_ids)} candidates"
            yield _dropped(ranking.prompt_id, ranking, "fewer_than_two_candidates", count)
            continue
        if not ranking.judgment_ids:
            yield _dropped(ranking.prompt_id, ranking, "not_judged", "")
            continue
        standings = _standings(ranking, candidates, win_probability)
        proposed = list(policy(standings, config))
        if not proposed:
            yield _dropped(ranking.prompt_id, ranking, "no_fitting_pair", config.policy)
        earlier: dict[frozenset[str], str] = {}
        for better, worse in proposed:
            record = _preference(ranking, standings, better, worse, config)
            if len(proposed) > 1 and isinstance(record, Preference):
                # A model that says the same twice would have its pair count twice, or both ways.
                places = standings.candidates[better], standings.candidates[worse]
                texts = frozenset(candidate.response for candidate in places)
                first = earlier.setdefault(texts, record.preference_id)
                if first != record.preference_id:
                    record = _dropped(record.preference_id, ranking, "same_texts_again", first)
            yield record


def _standings(
    ranking: Ranking, candidates: Mapping[str, Candidate], win_probability: WinProbability
) -> Standings:
    order = by_mean(ranking)
    return Standings(
        prompt_id=ranking.prompt_id,
        candidates=[candidates[ranking.candidate_ids[n]] for n in order],
        means=[ranking.mean[n] for n in order],
        probability=lambda one, other: win_probability(ranking, order[one], order[other]),
    )


def _preference(
    ranking: Ranking, standings: Standings, better: int, worse: int, config: PairsConfig
) -> Preference | Dropped:
    chosen, rejected = standings.candidates[better], standings.candidates[worse]
    identity = fingerprint([chosen.candidate_id, rejected.candidate_id])
    probability = standings.probability(better, worse)
    # Put so that what is no number is no preference either.
    if not probability >= config.min_probability or probability == 0.5:
        return _dropped(identity, ranking, "probability_below_minimum", f"{probability:.3f}")
    if chosen.status == "truncated":
        return _dropped(identity, ranking, "chosen_truncated", chosen.candidate_id)
    alike = fuzz.ratio(chosen.response, rejected.response, score_cutoff=100 * config.max_similarity)
    if not alike and _words_equal(chosen.response, rejected.response):
        alike = 100.0
    if alike:
        return _dropped(identity, ranking, "answers_too_alike", f"{alike / 100:.3f}")
    return Preference(
        preference_id=identity,
        prompt_id=ranking.prompt_id,
        chosen_id=chosen.candidate_id,
        rejected_id=rejected.candidate_id,
        probability=probability,
        margin=standings.means[better] - standings.means[worse],
        judgment_ids=ranking.judgment_ids,
    )


def _words_equal(one: str, other: str) -> bool:
    # The first words settle it for nearly all, without splitting the whole.
    alike = one.split(maxsplit=1)[:1] == other.split(maxsplit=1)[:1]
    return alike and one.split() == other.split()


def _dropped(record: str, ranking: Ranking, reason: str, detail: str) -> Dropped:
    return Dropped("preferences", record, ranking.prompt_id, reason, detail)


def triplets(preferences: pa.Table, prompts: pa.Table, candidates: pa.Table) -> pa.Table:
    """Preferences with their texts, each text looked up by the id the preference names.

    All at once, as tables: this is most of the work of a big dataset.
    """
    prompt = _rows_of(prompts, "prompt_id", preferences["prompt_id"])
    chosen = _rows_of(candidates, "candidate_id", preferences["chosen_id"])
    rejected = _rows_of(candidates, "candidate_id", preferences["rejected_id"])
    columns = {
        "prompt": prompt["messages"],
        "chosen": _answers(chosen["response"]),
        "rejected": _answers(rejected["response"]),
        "chosen_model": chosen["model"],
        "rejected_model": rejected["model"],
    }
    schema = schema_of(Triplet)
    found = [columns[n] if n in columns else preferences[n] for n in schema.names]
    return pa.table(found, schema=schema)


def _rows_of(table: pa.Table, key: str, wanted: pa.ChunkedArray) -> pa.Table:
    places = pc.index_in(wanted, table[key])
    if places.null_count:
        missing = wanted.filter(places.is_null())[0]
        raise KeyError(f"no {key} {missing}")
    return table.take(places)


def _answers(texts: pa.ChunkedArray) -> pa.Array:
    """Each text as a conversation of one turn, the assistant's."""
    kind = schema_of(Triplet).field("chosen").type
    parts = [pa.repeat("assistant", len(texts)), texts.combine_chunks()]
    turns = pa.StructArray.from_arrays(parts, fields=list(kind.value_type))
    ends = pa.array(range(len(texts) + 1), pa.int32())
    return pa.ListArray.from_arrays(ends, turns, type=kind)
