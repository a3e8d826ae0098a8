"""A spending limit that cannot be passed: money is set aside before a call and settled after."""

from __future__ import annotations

import asyncio
from typing import Any

from generation.engine import Request
from preferences.errors import InputError, ServiceError

CALL_TOKENS = 128
"""More than a chat template adds of its own, a standing system prompt included."""
MESSAGE_TOKENS = 16
"""More than a chat template adds to one message."""


class Spending:
    """What has been spent and what is set aside, in the currency of the prices.

    For the calls of one event loop. Without prices nothing is counted.
    """

    def __init__(self, price_per_million: tuple[float, float] | None, limit: float | None) -> None:
        if limit is not None and price_per_million is None:
            raise InputError(
                f"spending_limit {limit} needs price_per_million: [prompt price, completion price]"
            )
        self.spent = 0.0
        self._set_aside = 0.0
        self._in_flight = 0
        self._price = price_per_million
        self._limit = limit
        self._settled = asyncio.Event()

    def worst_case(self, request: Request) -> float | None:
        """The most a call can cost; None without prices.

        A token is at least one byte, so a prompt has no more tokens than bytes.
        """
        prompt = CALL_TOKENS + sum(
            MESSAGE_TOKENS + len(f"{m.role}{m.content}".encode("utf-8", "replace"))
            for m in request.messages
        )
        return self._of(prompt, 1 if request.choices else request.sampling.max_tokens)

    def cost(self, usage: Any, worst: float | None) -> float | None:
        """What a call cost by the endpoint's own count, or the worst where it gives none."""
        if usage is None:
            return worst
        return self._of(usage.prompt_tokens, usage.completion_tokens)

    async def reserve(self, worst: float | None) -> None:
        """Set `worst` aside, waiting for calls in flight that may leave something over.

        Raises ServiceError where nothing is in flight and it still does not fit.
        """
        if worst is None:
            return
        while self._limit is not None and self.spent + self._set_aside + worst > self._limit:
            if not self._in_flight:
                raise ServiceError(
                    f"spending_limit {self._limit:g} is reached: {self.spent:.6g} is spent and the "
                    f"next call may cost {worst:.6g}; what was answered is kept, so raise "
                    "spending_limit or lower max_tokens and run again"
                )
            self._settled.clear()
            await self._settled.wait()
        self._set_aside += worst
        self._in_flight += 1

    def settle(self, worst: float | None, cost: float | None) -> None:
        """Count what a call has cost and free what was set aside for it."""
        if worst is None or cost is None:
            return
        self.spent += cost
        self._in_flight -= 1
        # Sums of floats leave dust; with nothing in flight, nothing is set aside.
        self._set_aside = self._set_aside - worst if self._in_flight else 0.0
        self._settled.set()

    def _of(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        if self._price is None:
            return None
        return (prompt_tokens * self._price[0] + completion_tokens * self._price[1]) / 1e6
