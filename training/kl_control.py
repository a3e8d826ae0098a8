"""What it costs a policy to leave its reference: a fixed price, or one that steers to a target.

The price is the coefficient β of the reward r − β·KL. At the optimum the policy is proportional to
π_ref·exp(r/β), so β decides how far it goes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from preferences.config import Config

MOST_CHANGE = 0.2
"""Largest relative error of the KL that the controller answers to (Ziegler et al. 2019)."""


class FixedKL(Config):
    """The same price from the first step to the last."""

    kind: Literal["fixed"] = "fixed"
    coefficient: float = Field(0.05, ge=0)
    """β, in units of reward per nat, usually 0.01 to 0.2."""


class AdaptiveKL(Config):
    """A price that rises while the policy is further from the reference than wished, and falls
    while it is nearer: log-space proportional control (Ziegler et al. 2019, section 2.2)."""

    kind: Literal["adaptive"]
    coefficient: float = Field(0.15, gt=0)
    """β at the start, in units of reward per nat."""
    target: float = Field(6.0, gt=0)
    """KL from the reference to steer to, in nats per answer."""
    horizon: int = Field(10_000, ge=1)
    """Answers over which an error of the KL changes β by as much, relatively; more is slower."""


def next_coefficient(
    control: FixedKL | AdaptiveKL, coefficient: float, kl: float, answers: int
) -> float:
    """β for the next step, after one whose `answers` had a mean KL of `kl` nats.

    β·(1 + e·answers/horizon), where e is kl/target − 1, cut to ±0.2. Never below 0.
    """
    if control.kind == "fixed":
        return coefficient
    error = min(MOST_CHANGE, max(-MOST_CHANGE, kl / control.target - 1))
    # Many answers for a short horizon would turn the price negative: leaving would be paid for.
    return coefficient * max(0.0, 1 + error * answers / control.horizon)
