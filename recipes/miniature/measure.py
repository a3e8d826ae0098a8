"""Measure the miniature on its held-out prompts, where the true reward is known.

    python recipes/miniature/measure.py [--models DIR] [--samples 6]

Prints the table of README.md: what the policy's samples are worth, and how often the judge is
right, consistent and partial to the first answer, over all pairs of unequal worth in both orders.
Two to four minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from fitting import Progress
from policy import chat_tokens, pad, sample
from tokenizer import judge_text, token_id
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar
from world import is_well_formed, tasks, true_reward

BATCH = 128
"""Judge calls at once."""


class Call(NamedTuple):
    """One call of the judge on two different answers to one prompt."""

    difference: float
    """True reward of the first less that of the second."""
    first_wins: float
    """P(A) / (P(A) + P(B))."""
    mass: float
    """P(A) + P(B)."""


def main() -> None:
    """Sample, judge and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path(__file__).parent)
    parser.add_argument("--samples", type=int, default=6, help="answers to each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]

    tokenizer = AutoTokenizer.from_pretrained(arguments.models / "policy")
    policy = LlamaForCausalLM.from_pretrained(arguments.models / "policy")
    judge = LlamaForCausalLM.from_pretrained(arguments.models / "judge")
    asked = [task for task in tasks(held_out=True) for _ in range(arguments.samples)]
    answers = sample(policy, tokenizer, asked)
    rewards = [true_reward(t.prompt, a) for t, a in zip(asked, answers, strict=True)]
    malformed = 1 - statistics.fmean(map(is_well_formed, answers))
    lengths = [len(tokenizer.encode(answer)) for answer in answers]
    print("| measured on held-out prompts | |\n|---|---|")
    print(f"| answers | {len(answers)} to {len(answers) // arguments.samples} prompts |")
    mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
    print(f"| true reward, mean ± standard deviation | {mean:.3f} ± {deviation:.3f} |")
    print(f"| malformed, share | {malformed:.3f} |")
    print(f"| tokens of an answer | {statistics.fmean(lengths):.1f}, at most {max(lengths)} |")

    groups = [range(i, i + arguments.samples) for i in range(0, len(asked), arguments.samples)]
    pairs = [pair for group in groups for pair in itertools.permutations(group, 2)]
    texts = [judge_text(asked[i].prompt, answers[i], answers[j]) for i, j in pairs]
    shares = _judge(judge, tokenizer, texts)
    calls = {
        (i, j): Call(rewards[i] - rewards[j], a / (a + b), a + b)
        for (i, j), (a, b) in zip(pairs, shares, strict=True)
    }
    _print_judge(calls)
    _print_best(groups, calls, rewards)


@torch.inference_mode()
def _judge(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[tuple[float, float]]:
    """The probabilities of A and of B as the next token, for each user message."""
    letters = [token_id(tokenizer, letter) for letter in "AB"]
    shares: list[tuple[float, float]] = []
    prompts = [chat_tokens(tokenizer, text) for text in texts]
    # Prompts of similar lengths share a batch, which saves padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    progress = Progress("judge calls", -(-len(order) // BATCH))
    for begin in range(0, len(order), BATCH):
        rows = [prompts[i] for i in order[begin : begin + BATCH]]
        hidden_BTD = model.model(pad(rows)).last_hidden_state
        ends = torch.tensor([len(row) - 1 for row in rows])
        probs_BV = model.lm_head(hidden_BTD[torch.arange(len(rows)), ends]).softmax(-1)
        shares += [(a, b) for a, b in probs_BV[:, letters].tolist()]
        progress.advance()
    return [share for _, share in sorted(zip(order, shares, strict=True))]


def _print_judge(calls: dict[tuple[int, int], Call]) -> None:
    # Answers of equal worth, many of them the same text, have no right verdict and no winner to be
    # consistent about; the margin keeps float noise from making one.
    decided = {pair: call for pair, call in calls.items() if abs(call.difference) > 1e-9}
    right = statistics.fmean((c.first_wins > 0.5) == (c.difference > 0) for c in decided.values())
    both = statistics.fmean(
        (c.first_wins > calls[j, i].first_wins) == (c.difference > 0)
        for (i, j), c in decided.items()
    )
    consistent = statistics.fmean(
        (c.first_wins > 0.5) != (calls[j, i].first_wins > 0.5) for (i, j), c in decided.items()
    )
    picks_a = statistics.fmean(c.first_wins > 0.5 for c in decided.values())
    print(f"| judge: calls, all pairs in both orders | {len(calls)} |")
    print(f"| judge: of them on answers of unequal worth, counted below | {len(decided)} |")
    print(f"| judge: one call agrees with the true reward | {right:.3f} |")
    print(f"| judge: both orders, probabilities averaged | {both:.3f} |")
    print(f"| judge: same winner when swapped | {consistent:.3f} |")
    print(f"| judge: picks A, share | {picks_a:.3f} |")
    print(f"| judge: calibration error (ECE, 10 bins) | {_ece(list(decided.values())):.3f} |")
    print(f"| judge: probability on A or B, least | {min(c.mass for c in calls.values()):.4f} |")


def _ece(calls: Sequence[Call]) -> float:
    error = 0.0
    for low in range(10):
        members = [c for c in calls if low <= min(c.first_wins * 10, 9.99) < low + 1]
        if members:
            said = statistics.fmean(c.first_wins for c in members)
            true = statistics.fmean(c.difference > 0 for c in members)
            error += abs(said - true) * len(members) / len(calls)
    return error


def _print_best(
    groups: Sequence[range], calls: dict[tuple[int, int], Call], rewards: Sequence[float]
) -> None:
    def wins(i: int, group: range) -> float:
        return sum(calls[i, j].first_wins - calls[j, i].first_wins for j in group if j != i)

    chosen = statistics.fmean(rewards[max(g, key=lambda i: wins(i, g))] for g in groups)
    oracle = statistics.fmean(max(rewards[i] for i in group) for group in groups)
    print(f"| best of {len(groups[0])}: by the judge / by the true reward | "
          f"{chosen:.3f} / {oracle:.3f} |")  # fmt: skip


if __name__ == "__main__":
    main()
