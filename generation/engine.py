"""What answers a request: the Engine protocol and the values that pass through it.

An engine is anything with `complete`. The journal wraps an engine and is itself one, so the code
that asks never knows whether an answer is new or was given before a crash.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import Field

from preferences.config import Config
from preferences.records import Messages

FinishReason = Literal["stop", "length", "failed"]


class Sampling(Config):
    """How a model's next token is drawn."""

    temperature: float = Field(1.0, ge=0, le=5)
    """0 takes the likeliest token every time."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the smallest set of tokens with at least this probability (nucleus sampling)."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer, in tokens; a longer one is cut and marked `truncated`."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call to a model. Everything but `request_id` can change the reply."""

    request_id: str
    messages: Messages
    sampling: Sampling
    seed: int | None = None
    """Makes a sampled reply reproducible. Requests with the same seed share their noise."""
    choices: tuple[str, ...] = ()
    """Answers whose probabilities are wanted, each one token, as ("A", "B"): the reply is then one
    of them and `Completion.choice_probs` holds the model's own probabilities, before masking."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One call in tokens, which the model's newest adapter answers: how a policy that trains is
    sampled. vLLM alone takes it, where its config names an adapter."""

    request_id: str
    tokens: tuple[int, ...]
    """The prompt, as the model reads it."""
    sampling: Sampling
    seed: int
    ends: tuple[int, ...]
    """Tokens of which each ends the answer; no other does."""
    version: int
    """From 1, one more whenever the adapter's folder has other weights."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The reply to one request, or the reason there is none."""

    request_id: str
    text: str
    finish_reason: FinishReason
    """`length`: cut by `max_tokens`; `failed`: see `failure`."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprob: float | None = None
    """Sum of the sampled tokens' log-probabilities, in nats; None where the engine gives none."""
    choice_probs: tuple[float, ...] | None = None
    """The probability of each of the request's choices as the first token; they sum to at most 1.
    None where none were asked for or the engine gives none."""
    cost: float | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class TokenCompletion(Completion):
    """The reply to a request in tokens, without text."""

    tokens: tuple[int, ...] = ()
    """The answer, with the token that ended it."""


class Engine(Protocol):
    """Answers requests."""

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield one completion for each request as soon as it is ready, in any order.

        A request the model cannot answer (too long, refused by a filter) yields a completion with
        `finish_reason="failed"` and the reason. An engine that is down, after its retries, raises
        `ServiceError`; completions yielded before stay valid.
        """
        ...


class EngineConfig(Config):
    """Which model answers: everything here bears identity."""

    engine: Literal["vllm", "openai", "transformers"] = "vllm"
    """`vllm` runs the model here; `openai` asks any OpenAI-compatible endpoint; `transformers`
    runs it here, slowly, where vLLM does not install."""
    model: str
    """A folder with weights, a Hub id, or the endpoint's name for the model."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""
    adapter: str | None = None
    """A folder with an adapter to put on the model: with vLLM a LoRA, with transformers any that
    peft knows."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """The numbers the model computes with; `auto` takes what its config says."""
    max_length: int | None = Field(None, ge=1)
    """Most tokens of prompt and answer together; by default what the model's config allows."""
    trust_remote_code: bool = False
    """Run Python that comes with the model. Say true only for a model you have read."""


class EngineRuntime(Config):
    """Where and how an engine runs. Nothing here changes a reply or bears identity."""

    tensor_parallel: int = Field(1, ge=1)
    """GPUs that share one model (vLLM)."""
    memory_share: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM may take."""
    cpu_cache_gib: float = Field(1.0, gt=0)
    """GiB for vLLM's key-value cache when it runs on CPU."""
    batch_size: int = Field(32, ge=1)
    """Requests at once (transformers)."""
    base_url: str | None = None
    """The endpoint (openai); by default the environment's OPENAI_BASE_URL."""
    api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key. The key itself is written nowhere."""
    concurrency: int = Field(16, ge=1)
    """Requests in flight at once (openai)."""
    retries: int = Field(6, ge=0)
    """Tries after a failed one, with growing pauses; the endpoint's Retry-After is honoured."""
    timeout_seconds: float = Field(120, gt=0)
    """Longest wait for one reply (openai)."""
    price_per_million: tuple[float, float] | None = None
    """Price of a million prompt tokens and of a million completion tokens (openai)."""
    spending_limit: float | None = Field(None, gt=0)
    """Stop before the cost of all calls passes this; needs `price_per_million`."""
