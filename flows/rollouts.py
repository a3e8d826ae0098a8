"""Answers of a policy that trains, sampled by vLLM: a `training.rollouts.Sampler`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flows.children import in_child
from generation.engine import (
    EngineConfig,
    EngineRuntime,
    Sampling,
    TokenCompletion,
    TokenRequest,
)
from generation.opening import open_engine
from preferences.errors import ServiceError
from training import models
from training.rewarded import RewardedConfig
from training.rollouts import Answer, Sampler

if TYPE_CHECKING:
    from generation.vllm_process import VLLMEngine

BESIDE_TRAINING = EngineRuntime(memory_share=0.4)
"""The trainer has the same GPU."""


@contextmanager
def sampler(config: RewardedConfig, runtime: EngineRuntime) -> Iterator[Sampler | None]:
    """What samples for this training until the context is left; None where the trainer does.

    Its first use raises MissingExtra where vLLM is not installed.
    """
    if config.sampler == "transformers":
        yield None
        return
    with ExitStack() as stack:
        yield _VLLMSampler(config, runtime, stack)


class _VLLMSampler:
    """Meets `Sampler`. vLLM starts with the first adapter that there is."""

    def __init__(self, config: RewardedConfig, runtime: EngineRuntime, stack: ExitStack) -> None:
        self._config, self._runtime, self._stack = config, runtime, stack
        tokenizer = models.load_tokenizer(config.model, config.revision)
        self._ends = tuple(sorted(models.end_tokens(config.model, config.revision, tokenizer)))
        self._engine: VLLMEngine | None = None
        self._version = 0

    def __call__(
        self,
        policy: Path,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
    ) -> Sequence[Answer]:
        """Each answer's noise follows from the seed and its place."""
        if self._engine is None:
            self._engine = self._started(policy)
        self._version += 1
        sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
        requests = [
            TokenRequest(
                str(place),
                tuple(prompt),
                sampling,
                random.Random(f"{seed} {place}").getrandbits(63),
                self._ends,
                self._version,
            )
            for place, prompt in enumerate(prompts)
        ]
        answers: dict[str, Answer] = {}
        for reply in self._engine.complete(requests):
            if not isinstance(reply, TokenCompletion) or reply.finish_reason == "failed":
                raise ServiceError(f"vLLM gave no answer to a prompt: {reply.failure}")
            answers[reply.request_id] = Answer(reply.tokens, reply.finish_reason == "stop")
        return [answers[request.request_id] for request in requests]

    def _started(self, policy: Path) -> VLLMEngine:
        from generation.vllm_process import VLLMEngine

        config = self._config
        model, revision = config.model, config.revision
        if models.is_quantised(config.weights):
            # On the weights it trains on, which 4 bits have rounded.
            folder = self._stack.enter_context(TemporaryDirectory(prefix="pairwright-"))
            in_child("writing the base model for vLLM", _write_dequantised, config, folder)
            model, revision = folder, None
        engine = EngineConfig(
            engine="vllm",
            model=model,
            revision=revision,
            adapter=str(policy),
            dtype=config.dtype,
        )
        opened = self._stack.enter_context(open_engine(engine, self._runtime))
        assert isinstance(opened, VLLMEngine)
        return opened


def _write_dequantised(config: RewardedConfig, folder: str) -> None:
    from training.quantization import dequantised

    base = models.load_model(config.model, config.revision, config.weights, config.dtype)
    dequantised(base).save_pretrained(folder)
    models.load_tokenizer(config.model, config.revision).save_pretrained(folder)
