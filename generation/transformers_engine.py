"""A causal language model in this process, one batch at a time: slow, and needs no vLLM.

The sampling loop is our own because `generate` draws the whole batch's noise from one generator,
so that a reply would depend on its neighbours. Here each request has a generator of its own.

Notation used for tensor shapes: B rows of a batch, P longest prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from generation.chat import Chat, PromptRefused, too_long
from generation.engine import Completion, EngineConfig, EngineRuntime, FinishReason, Request
from preferences.errors import ServiceError

SORTED_BATCHES = 8
"""Batches read ahead and sorted by prompt length, so that little is spent on padding."""

PutOn = Callable[[Any, Path], Any]
"""Puts the adapter in a folder on a loaded model."""


@dataclass(slots=True)
class _Row:
    """One request of a batch and what has been drawn for it."""

    request: Request
    prompt: list[int]
    room: int
    """Most tokens that may be drawn: the request's, or what the context leaves."""
    choices: list[int]
    noise: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    text: str | None = None
    """Set where a stop text has cut the answer."""
    reason: FinishReason | None = None


class TransformersEngine:
    """Meets `Engine`. `Completion.logprob` and `choice_probs` are the model's own, at temperature 1
    and before any mask or top_p.

    A sampled reply depends on its request's seed and not on the batch or the order, up to
    rounding. The model may be one in training: it is evaluated in `eval` mode and put back.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int = 32, max_length: int | None = None
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._chat = Chat(tokenizer, getattr(model, "name_or_path", "") or "the model")
        text_config = model.config.get_text_config()
        self._virtual = _virtual_tokens(model)
        positions = getattr(text_config, "max_position_embeddings", None)
        limits = [max_length, None if positions is None else int(positions) - self._virtual]
        # A model without a limit of its own, as a recurrent one, takes any length.
        self._context = min((n for n in limits if n is not None), default=2**31)
        self._ends = _end_tokens(model, tokenizer)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # Of virtual tokens peft puts new ones before every token that it is given.
        self._network = base if self._virtual else model
        # Only the last position's logits are needed, and those of a long prompt fill a GPU.
        accepted = inspect.signature(base.forward).parameters
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        # Batches of different threads would fight over the model's mode and the memory.
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls, config: EngineConfig, runtime: EngineRuntime, put_on: PutOn | None = None
    ) -> TransformersEngine:
        """The model and adapter that the config names, on the GPU if there is one.

        `put_on` is for adapters that peft does not know. Raises ServiceError, with transformers'
        reason, where they do not load.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        shows_progress = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        source: dict[str, Any] = {
            "revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
        }
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.model, **source)
            model: Any = AutoModelForCausalLM.from_pretrained(
                config.model, dtype=config.dtype, **source
            )
            if config.adapter is not None and put_on is not None:
                model = put_on(model, Path(config.adapter))
            elif config.adapter is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, config.adapter)
        except (OSError, ValueError) as error:
            raise ServiceError(
                f"{config.model} does not load: {' '.join(str(error).split())}"
            ) from error
        finally:
            if shows_progress:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return cls(model, tokenizer, runtime.batch_size, config.max_length)

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield the completions batch by batch."""
        waiting = iter(requests)
        while ahead := list(itertools.islice(waiting, self._batch_size * SORTED_BATCHES)):
            rows = []
            for request in ahead:
                row = self._row(request)
                if isinstance(row, Completion):
                    yield row
                else:
                    rows.append(row)
            # Choices need one step, so they are not batched with answers of many.
            rows.sort(key=lambda row: (not row.choices, len(row.prompt)))
            for _, alike in itertools.groupby(rows, key=lambda row: bool(row.choices)):
                while batch := list(itertools.islice(alike, self._batch_size)):
                    yield from self._answer(batch)

    def _row(self, request: Request) -> _Row | Completion:
        try:
            prompt = self._chat.prompt(request.messages)
        except PromptRefused as error:
            return Completion(request.request_id, "", "failed", failure=str(error))
        failure = too_long(len(prompt), self._context)
        if failure is not None:
            return Completion(request.request_id, "", "failed", failure=failure)
        choices: list[int] = []
        if request.choices:
            choices = self._chat.choice_tokens(request.messages, request.choices)
        # On the CPU also for a model on a GPU: the same seed is then the same noise everywhere.
        noise = torch.Generator()
        if request.seed is None:
            noise.seed()
        else:
            noise.manual_seed(request.seed % 2**63)
        room = min(request.sampling.max_tokens, self._context - len(prompt))
        return _Row(request, prompt, room, choices, noise)

    def _answer(self, rows: list[_Row]) -> list[Completion]:
        with self._lock, torch.inference_mode():
            was_training = self._model.training
            self._model.eval()
            try:
                if rows[0].choices:
                    return self._choose(rows)
                self._sample(rows)
            finally:
                self._model.train(was_training)
        return [self._completion(row) for row in rows]

    def _choose(self, rows: list[_Row]) -> list[Completion]:
        """The likeliest choice of each row, and the probability of each as the first token."""
        logits_B_V, _ = self._forward(*self._prompts(rows), cache=None, use_cache=False)
        logprobs_B_V = logits_B_V.log_softmax(-1).cpu()
        completions = []
        for row, logprobs_V in zip(rows, logprobs_B_V, strict=True):
            logprobs = logprobs_V[row.choices]
            best = int(logprobs.argmax())
            completions.append(
                Completion(
                    row.request.request_id,
                    row.request.choices[best],
                    "stop",
                    prompt_tokens=len(row.prompt),
                    completion_tokens=1,
                    logprob=float(logprobs[best]),
                    choice_probs=tuple(logprobs.exp().tolist()),
                )
            )
        return completions

    def _sample(self, rows: list[_Row]) -> None:
        """Draw token after token until every row has its reason to end."""
        tokens_B_P, mask_B_P = self._prompts(rows)
        logits_B_V, cache = self._forward(tokens_B_P, mask_B_P, cache=None)
        active = list(rows)
        mask = mask_B_P
        while True:
            drawn = _draw(logits_B_V, active)
            raw_B_V = logits_B_V.log_softmax(-1)
            logprobs = raw_B_V.gather(1, drawn[:, None].to(raw_B_V.device))[:, 0].tolist()
            for row, token, logprob in zip(active, drawn.tolist(), logprobs, strict=True):
                if row.reason is None:
                    self._extend(row, token, logprob)
            going = [i for i, row in enumerate(active) if row.reason is None]
            if not going:
                return
            if len(going) <= len(active) // 2:
                # Dropping finished rows copies the cache, so it waits until it halves the work.
                keep = torch.tensor(going, device=mask.device)
                cache.batch_select_indices(keep)
                mask = mask[keep]
                drawn = drawn[keep.cpu()]
                active = [active[i] for i in going]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
            logits_B_V, cache = self._forward(drawn[:, None].to(mask.device), mask, cache)

    def _extend(self, row: _Row, token: int, logprob: float) -> None:
        row.tokens.append(token)
        row.logprob += logprob
        sampling = row.request.sampling
        if token in self._ends:
            row.reason = "stop"
            return
        if sampling.stop:
            text = self._decode(row.tokens)
            found = [at for at in map(text.find, sampling.stop) if at >= 0]
            if found:
                row.text, row.reason = text[: min(found)], "stop"
                return
        if len(row.tokens) >= row.room:
            row.reason = "length"

    def _completion(self, row: _Row) -> Completion:
        assert row.reason is not None
        text = row.text
        if text is None:
            # The end token belongs to the turn, not to the text.
            text = self._decode(row.tokens[:-1] if row.reason == "stop" else row.tokens)
        return Completion(
            row.request.request_id,
            text,
            row.reason,
            prompt_tokens=len(row.prompt),
            completion_tokens=len(row.tokens),
            logprob=row.logprob,
        )

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _prompts(self, rows: list[_Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask, both (B, P). Padded on the left: every row's last token is its own."""
        longest = max(len(row.prompt) for row in rows)
        padding = [[0] * (longest - len(row.prompt)) for row in rows]
        device = self._model.device
        return (
            torch.tensor([p + row.prompt for p, row in zip(padding, rows, strict=True)]).to(device),
            torch.tensor(
                [p + [1] * len(row.prompt) for p, row in zip(padding, rows, strict=True)]
            ).to(device),
        )

    def _forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, cache: Any, use_cache: bool = True
    ) -> tuple[torch.Tensor, Any]:
        """Logits of the next token, (B, V) in float32, and the cache that continues from here."""
        inputs = {"input_ids": tokens}
        if self._virtual:
            mask = torch.cat([mask.new_ones(len(mask), self._virtual), mask], dim=1)
            if cache is None:
                inputs, cache = self._behind_virtual(tokens)
        width = next(iter(inputs.values())).shape[1]
        # Padding takes no position, so a row's positions do not depend on its neighbours.
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        output = self._network(
            **inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=use_cache,
            **self._extra,
        )
        return output.logits[:, -1].float(), output.past_key_values

    def _behind_virtual(self, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any]:
        """What goes into the base model first, and the cache that it starts from: virtual tokens
        are embeddings before the prompt's own, or keys and values."""
        start = self._model.get_prompt(batch_size=len(tokens))
        if not isinstance(start, torch.Tensor):
            return {"input_ids": tokens}, start
        embedded = self._network.get_input_embeddings()(tokens)
        return {"inputs_embeds": torch.cat([start.to(embedded.dtype), embedded], dim=1)}, None


def _draw(logits_B_V: torch.Tensor, rows: list[_Row]) -> torch.Tensor:
    """The next token of each row, (B,) on the CPU, by one uniform number from the row's noise."""
    drawn = logits_B_V.argmax(-1).cpu()
    warm = [i for i, r in enumerate(rows) if r.reason is None and r.request.sampling.temperature]
    if not warm:
        return drawn
    device = logits_B_V.device
    sampling = [rows[i].request.sampling for i in warm]
    temperature = torch.tensor([s.temperature for s in sampling], device=device)[:, None]
    probs = (logits_B_V[warm] / temperature).softmax(-1).double()
    if any(s.top_p < 1 for s in sampling):
        top_p = torch.tensor([s.top_p for s in sampling], device=device)[:, None]
        descending, order = probs.sort(-1, descending=True)
        # A token stays if those likelier than it do not reach top_p: the first always does.
        outside = (descending.cumsum(-1) - descending >= top_p) & (top_p < 1)
        probs = probs.masked_fill(outside.gather(1, order.argsort(-1)), 0.0)
    cumulative = probs.cumsum(-1)
    uniform = torch.cat(
        [torch.rand(1, 1, dtype=torch.float64, generator=rows[i].noise) for i in warm]
    ).to(device)
    # The first token whose cumulative probability passes the number; never one of probability 0.
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    drawn[warm] = tokens[:, 0].clamp(max=probs.shape[-1] - 1).cpu()
    return drawn


def _virtual_tokens(model: Any) -> int:
    """How many stand before every prompt: those of prefix and prompt tuning."""
    adapter = getattr(model, "active_peft_config", None)
    return int(adapter.num_virtual_tokens) if adapter and adapter.is_prompt_learning else 0


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a turn; chat models often have one more than the tokenizer names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return ends - {None}
