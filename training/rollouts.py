"""Answers sampled from the policy that trains, and what each of them is worth.

Which prompts a step answers and with which noise follows from the seed and the step alone, so a
step that was interrupted is done again and comes out the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from preferences.errors import InputError
from preferences.records import Messages
from training.data import HeldOutPrompt
from training.sampling import left_padded, undisturbed

if TYPE_CHECKING:
    from torch import Tensor

RewardFunction = Callable[[Messages, str], float]
"""A prompt and an answer in, a score out: higher is better, True and False will do."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was sampled for one prompt."""

    ids: tuple[int, ...]
    """Its tokens, the one that ends it with them."""
    finished: bool
    """The last token ended it; False where it was cut at the limit."""


class Sampler(Protocol):
    """Samples a policy that lies in a folder; how vLLM is handed in, of which training knows
    nothing. It must sample from the whole distribution at that temperature: no top-k, no top-p, no
    penalties."""

    def __call__(
        self,
        policy: Path,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
    ) -> Sequence[Answer]:
        """One answer to each tokenized prompt, of at most `max_tokens` tokens with its end."""
        ...


@dataclass(frozen=True, slots=True)
class Rollouts:
    """A step's answers as tensors. B answers; a row is a prompt, its answer, and padding."""

    prompts: tuple[HeldOutPrompt, ...]
    texts: tuple[str, ...]
    """The answers as people read them, without special tokens."""
    tokens: Tensor
    """(B, length), padded on the right, so that positions are those of generation."""
    present: Tensor
    """(B, length): true where there is a token and no padding."""
    start: int
    """Length of the shortest prompt: no answer begins before."""
    mask: Tensor
    """(B, length − start): true at the answers' tokens, end tokens included."""
    finished: Tensor
    """(B,): whether the answer has an end token."""

    def __len__(self) -> int:
        return len(self.prompts)

    def batches(self, size: int) -> Iterator[Tensor]:
        """The numbers of all rows in their order, so many at a time."""
        import torch

        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield torch.arange(start, stop, device=self.tokens.device)


def prompts_of_step(number: int, wanted: int, seed: int, step: int) -> list[int]:
    """Which of `number` prompts the `step`-th step answers, counted from 1.

    The prompts are passed through again and again, each time in another order.
    """
    orders: dict[int, list[int]] = {}

    def at(position: int) -> int:
        turn, place = divmod(position, number)
        if turn not in orders:
            orders[turn] = list(range(number))
            random.Random(f"{seed} {turn}").shuffle(orders[turn])
        return orders[turn][place]

    return [at(position) for position in range((step - 1) * wanted, step * wanted)]


def seed_of_step(seed: int, step: int) -> int:
    """The noise of a step's answers: those of two steps or two runs have nothing in common."""
    return random.Random(f"{seed} {step}").getrandbits(31)


def sample_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Collection[int],
    pad: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    batch_size: int,
    bf16: bool,
) -> list[Answer]:
    """One answer to each tokenized prompt from the model as it is now, by transformers."""
    import torch

    from training.decoding import decode
    from training.shared_rollouts import shares

    device = model.device
    replies: list[list[int]] = []
    with undisturbed(model), torch.no_grad(), torch.autocast(device.type, torch.bfloat16, bf16):
        draw = decode if shares(model) else _generated
        for start in range(0, len(prompts), batch_size):
            torch.manual_seed(seed + start)
            batch = prompts[start : start + batch_size]
            replies += draw(
                model,
                batch,
                ends=ends,
                pad=pad,
                temperature=temperature,
                max_tokens=max_tokens,
            )
    return [answer_from(reply, ends) for reply in replies]


def _generated(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Collection[int],
    pad: int,
    temperature: float,
    max_tokens: int,
) -> list[list[int]]:
    """What transformers generates, with what it puts behind end tokens."""
    from transformers import GenerationConfig

    # Every knob is set: what is left out would be filled from the model's own generation config,
    # and any but the temperature would sample from another policy than the one that is trained.
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        use_cache=True,
        remove_invalid_values=True,  # a policy gone to NaN is reported where its loss is
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )
    tokens, mask = left_padded(prompts, pad, model.device)
    replies = model.generate(input_ids=tokens, attention_mask=mask, generation_config=generation)
    found: list[list[int]] = replies[:, tokens.shape[1] :].tolist()
    return found


def answer_from(ids: Sequence[int], ends: Collection[int]) -> Answer:
    """The answer in what was generated: everything up to the first end token, and that token."""
    last = next((i for i, token in enumerate(ids) if token in ends), None)
    kept = ids if last is None else ids[: last + 1]
    return Answer(tuple(kept), finished=last is not None)


def as_rollouts(
    prompts: Sequence[HeldOutPrompt],
    answers: Sequence[Answer],
    tokenizer: Any,
    pad: int,
    device: Any,
) -> Rollouts:
    """The answers to `prompts` as tensors."""
    import torch

    rows = [(*p.ids, *a.ids) for p, a in zip(prompts, answers, strict=True)]
    length = max(len(row) for row in rows)
    ends = torch.tensor([len(row) for row in rows], device=device)[:, None]
    starts = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)[:, None]
    place = torch.arange(length, device=device)
    start = min(len(prompt.ids) for prompt in prompts)
    return Rollouts(
        prompts=tuple(prompts),
        texts=tuple(tokenizer.decode(a.ids, skip_special_tokens=True) for a in answers),
        tokens=torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], device=device),
        present=place < ends,
        start=start,
        mask=((place >= starts) & (place < ends))[:, start:],
        finished=torch.tensor([a.finished for a in answers], device=device),
    )


def function_scores(
    functions: Mapping[str, RewardFunction], rollouts: Rollouts
) -> dict[str, list[float]]:
    """What each of the recipe's own functions says of each answer.

    Raises InputError where one fails or says what is no number: a made-up score would be trained.
    """
    return {
        name: [
            _score(name, function, prompt, text)
            for prompt, text in zip(rollouts.prompts, rollouts.texts, strict=True)
        ]
        for name, function in functions.items()
    }


def _score(name: str, function: RewardFunction, prompt: HeldOutPrompt, text: str) -> float:
    try:
        score = float(function(prompt.messages, text))
    except Exception as error:  # the user's function may raise anything
        raise InputError(
            f"reward function {name}: {type(error).__name__} on an answer to prompt "
            f"{prompt.prompt_id} ({error}); it has to score any text"
        ) from error
    if not math.isfinite(score):
        raise InputError(
            f"reward function {name}: {score} for an answer to prompt {prompt.prompt_id}; it has "
            "to return a finite number for any text"
        )
    return score
