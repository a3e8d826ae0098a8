"""A head that does not train gives log-probabilities, and their gradient at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training.frozen_head import HELD, FrozenHead


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_frozen_head_gives_log_probabilities_and_their_slope(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HELD, "cpu", 3 * 11)  # three tokens at a time
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64)
    targets = torch.tensor([0, 10, 3, 3, 7, 1, 5])
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected: Any = torch.distributions.Categorical(logits=logits)
    head: Any = FrozenHead.apply
    log_probs, entropy, mean, likely = head(softcap, hidden, weight, targets)
    assert torch.allclose(log_probs, expected.log_prob(targets), rtol=0, atol=1e-12)
    assert torch.allclose(entropy, expected.entropy(), rtol=0, atol=1e-12)
    assert torch.allclose(mean, logits.mean(-1), rtol=0, atol=1e-12)
    assert torch.equal(likely, logits.argmax(-1) == targets)
    assert not entropy.requires_grad
    assert torch.autograd.gradcheck(lambda h: head(softcap, h, weight, targets)[0], hidden)
