"""Any OpenAI-compatible endpoint: many calls at once, patient, and never above its budget."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import math
import os
import queue
import random
import threading
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import openai

from generation.engine import Completion, EngineConfig, EngineRuntime, Request
from generation.spending import Spending
from preferences.errors import InputError, ServiceError

LONGEST_PAUSE = 900.0
"""Seconds. An endpoint that asks to be left alone for longer is down as far as a run can tell."""
RETRIED = {408, 409, 425, 429}
"""What is worth another try, besides 5xx."""


class OpenAIEngine:
    """Meets `Engine`. `choice_probs` are read from the 20 likeliest first tokens; a choice that is
    not among them has 0. They are None, and the text is the endpoint's own, where an endpoint
    gives no log-probabilities. `logprob` is always None: endpoints do not say whether
    temperature has changed it.

    The key is read from the environment and goes into the request's header and nowhere else.
    """

    def __init__(self, config: EngineConfig, runtime: EngineRuntime) -> None:
        if config.adapter is not None:
            raise InputError(
                f"adapter {config.adapter}: an endpoint takes none; serve the adapted model and "
                "name it as `model`"
            )
        base_url = runtime.base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get(runtime.api_key_variable)
        if not key and not base_url:
            raise InputError(
                f"{runtime.api_key_variable} is not set; export the endpoint's key under this "
                "name, or set base_url for an endpoint that needs none"
            )
        self._model = config.model
        self._retries = runtime.retries
        self._concurrency = runtime.concurrency
        self._key_variable = runtime.api_key_variable
        self._spending = Spending(runtime.price_per_million, runtime.spending_limit)
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=base_url,
            timeout=runtime.timeout_seconds,
            # Tries are counted here: the client gives up on a long Retry-After, and each try has
            # to be within the budget.
            max_retries=0,
        )
        parts = urlsplit(str(self._client.base_url))
        # Not the whole address: it may carry a password.
        self._shown_url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._hidden = [word for word in (key, parts.password) if word]
        self._unsupported: set[str] = set()
        self._not_before = 0.0
        self._slots = asyncio.Semaphore(runtime.concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions as they arrive; stopping early cancels the calls in flight.

        Where no other request would fare better, nothing new is asked, the replies to what is in
        flight are yielded, for they are paid for, and ServiceError is raised.
        """
        arrived: queue.SimpleQueue[Future[Completion | None]] = queue.SimpleQueue()
        pending: set[Future[Completion | None]] = set()
        waiting = iter(requests)
        given_up = asyncio.Event()
        failure: ServiceError | None = None
        try:
            while True:
                # Twice what is in flight, so that the next is at hand when one arrives.
                room = 0 if failure else 2 * self._concurrency - len(pending)
                for request in itertools.islice(waiting, room):
                    future = self._start(self._ask(request, given_up))
                    pending.add(future)
                    future.add_done_callback(arrived.put)
                if not pending:
                    break
                future = arrived.get()
                pending.remove(future)
                try:
                    completion = future.result()
                except ServiceError as error:
                    failure = failure or error
                    continue
                if completion is not None:
                    yield completion
            if failure is not None:
                raise failure
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Cancel what is in flight and close the connections."""
        if self._thread.is_alive():
            self._start(self._cancel_all()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _cancel_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    async def _ask(self, request: Request, given_up: asyncio.Event) -> Completion | None:
        """The reply; None where another request showed first that there is no use in asking."""
        try:
            async with self._slots:
                return await self._reply(request, given_up)
        except ServiceError:
            given_up.set()
            raise

    async def _reply(self, request: Request, given_up: asyncio.Event) -> Completion | None:
        attempt = 0
        while True:
            # One that was told to wait holds the others back too.
            while (pause := self._not_before - time.monotonic()) > 0 and not given_up.is_set():
                await _sleep(pause, given_up)
            if given_up.is_set():
                return None
            arguments = self._arguments(request)
            worst = self._spending.worst_case(request)
            await self._spending.reserve(worst)
            # A call that breaks off may have been charged in full.
            cost = worst
            try:
                reply = await self._client.chat.completions.create(**arguments)
                if not isinstance(reply, openai.types.chat.ChatCompletion):
                    raise ServiceError(
                        f"{self._shown_url} answers with something else than a chat "
                        "completion; check base_url, which often ends in /v1"
                    )
                cost = self._spending.cost(reply.usage, worst)
                return _completion(request, reply, cost)
            except openai.APIStatusError as error:
                cost = None if worst is None else 0.0
                if self._is_quirk(error, arguments):
                    continue
                failure = self._failure(error)
                if failure is not None:
                    return Completion(request.request_id, "", "failed", failure=failure)
                problem = f"{error.status_code} {self._message(error)}"
                self._heed(error.response.headers)
            except openai.APIConnectionError as error:
                if "Connect" in type(error.__cause__).__name__:
                    cost = None if worst is None else 0.0  # It never got there.
                problem = f"{error} ({type(error.__cause__).__name__})"
            finally:
                self._spending.settle(worst, cost)
            if attempt >= self._retries:
                raise ServiceError(
                    f"{self._shown_url} did not answer after {attempt + 1} tries: {problem}; "
                    "check that it runs and that base_url is right, then run again"
                )
            await _sleep(min(30.0, 0.5 * 2**attempt) * random.uniform(0.75, 1), given_up)
            attempt += 1

    def _arguments(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        arguments: dict[str, Any] = {
            "model": self._model,
            # Half a surrogate pair, which a model can emit, has no UTF-8 and could not be sent.
            "messages": [
                {"role": m.role, "content": m.content.encode("utf-8", "replace").decode()}
                for m in request.messages
            ],
            "temperature": sampling.temperature,
        }
        longest = sampling.max_tokens
        if request.choices:
            longest = 1
            arguments["temperature"] = 0
            if "logprobs" not in self._unsupported:
                arguments |= {"logprobs": True, "top_logprobs": 20}
        else:
            if sampling.top_p < 1:
                arguments["top_p"] = sampling.top_p
            if sampling.stop:
                arguments["stop"] = list(sampling.stop)
        renamed = "max_tokens" in self._unsupported
        arguments["max_completion_tokens" if renamed else "max_tokens"] = longest
        if request.seed is not None:
            arguments["seed"] = request.seed % 2**31  # Some endpoints take no more bits.
        return arguments

    def _is_quirk(self, error: openai.APIStatusError, arguments: dict[str, Any]) -> bool:
        """Whether the endpoint wants the same call put otherwise; notes how."""
        if error.status_code not in (400, 422):
            return False
        text = self._message(error)
        if "max_completion_tokens" in text and "max_tokens" in arguments:
            self._unsupported.add("max_tokens")
            return True
        if "logprobs" in text and "logprobs" in arguments:
            self._unsupported.add("logprobs")
            return True
        return False

    def _failure(self, error: openai.APIStatusError) -> str | None:
        """Why this one request failed for good, or None if another try may help.

        Raises ServiceError where no other request would fare better.
        """
        status = error.status_code
        if status in (401, 403):
            raise ServiceError(
                f"{self._shown_url} refuses the key ({status}); check {self._key_variable} and "
                f"that it may use {self._model}"
            )
        if status == 404:
            raise ServiceError(
                f"{self._shown_url} knows no {self._model} (404); check `model`, and that "
                "base_url ends where /chat/completions begins"
            )
        if status == 402 or error.code == "insufficient_quota":
            raise ServiceError(
                f"{self._shown_url} wants money ({status}): {self._message(error)}; top up the "
                "account, then run again"
            )
        if status in RETRIED or status >= 500:
            return None
        return f"{status} {self._message(error)}"

    def _message(self, error: openai.APIStatusError) -> str:
        body = error.body
        said = body.get("message") if isinstance(body, Mapping) else None
        text = _one_line(str(said or error.message))
        for word in self._hidden:
            text = text.replace(word, "…")
        return text

    def _heed(self, headers: Mapping[str, str]) -> None:
        pause = retry_after(headers)
        if pause is None:
            return
        if pause > LONGEST_PAUSE:
            raise ServiceError(
                f"{self._shown_url} asks to be left alone for {pause:.0f} s; run again after that"
            )
        self._not_before = max(self._not_before, time.monotonic() + pause)


async def _sleep(seconds: float, given_up: asyncio.Event) -> None:
    """Sleep so long, or until there is no use in waiting."""
    with suppress(TimeoutError):
        await asyncio.wait_for(given_up.wait(), seconds)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply's headers ask to wait: Retry-After in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def _completion(request: Request, reply: Any, cost: float | None) -> Completion:
    usage = reply.usage
    counts: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
        "cost": cost,
    }

    def failed(why: str) -> Completion:
        return Completion(request.request_id, "", "failed", failure=why, **counts)

    if not reply.choices:
        return failed("the endpoint's reply holds no choice")
    choice = reply.choices[0]
    if choice.finish_reason == "content_filter":
        return failed("stopped by the endpoint's content filter")
    if refusal := getattr(choice.message, "refusal", None):
        return failed(f"refused: {_one_line(refusal)}")
    text = choice.message.content or ""
    if request.choices:
        probs = _choice_probs(request.choices, choice.logprobs)
        if probs is not None and max(probs) > 0:
            text = request.choices[probs.index(max(probs))]
        return Completion(request.request_id, text, "stop", choice_probs=probs, **counts)
    # Some servers leave the stop text in.
    found = [at for at in map(text.find, request.sampling.stop) if at >= 0]
    text = text[: min(found)] if found else text
    reason = "length" if choice.finish_reason == "length" else "stop"
    return Completion(request.request_id, text, reason, **counts)  # type: ignore[arg-type]


def _one_line(text: str) -> str:
    """What an endpoint says, fit for an error message and for a record's failure."""
    return " ".join(text.split())[:500]


def _choice_probs(choices: tuple[str, ...], logprobs: Any) -> tuple[float, ...] | None:
    first = logprobs.content[0] if logprobs and logprobs.content else None
    if first is None:
        return None
    top = {t.token: t.logprob for t in (first, *(first.top_logprobs or ()))}
    return tuple(math.exp(top[c]) if c in top else 0.0 for c in choices)
