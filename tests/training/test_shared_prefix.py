"""Sharing a prompt changes nothing but the time: TRL's own forward pass is the measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.training.architectures import ARCHITECTURES, a_batch, a_model, apart, padded
from training import shared_attention, shared_prefix
from training.shared_attention import Segments
from training.shared_prefix import Shared, share, shared, why_not


def scored(model: Any, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """What the forward pass returns, and the gradients of a sum of log-probabilities that are
    weighed differently each."""
    model.zero_grad()
    found = model(**batch, fused_lm_head=True, use_cache=False)
    draw = torch.Generator().manual_seed(2)
    weights = torch.randn(found.log_probs.shape, generator=draw)
    (found.log_probs * weights).sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return found, gradients


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("config", ARCHITECTURES)
def test_every_architecture_gives_what_trl_computes_and_its_gradients(
    config: str, checkpointing: bool
) -> None:
    model = a_model(config)
    assert why_not(model) is None
    batch = a_batch()
    expected, gradients = scored(model, batch)
    share(model, answers=2)
    if checkpointing:
        model.gradient_checkpointing_enable()
    found, ours = scored(model, batch)
    assert found.log_probs.shape == (12, batch["labels"].shape[1] - 1)
    assert (found.log_probs - expected.log_probs).abs().max() < 1e-5
    assert (found.entropy - expected.entropy).abs().max() < 1e-5
    assert (found.mean_logits - expected.mean_logits).abs().max() < 1e-5
    assert torch.equal(found.is_top1, expected.is_top1)
    assert torch.equal(found.label_mask, expected.label_mask)
    assert apart(ours, gradients) < 1e-6


@pytest.mark.parametrize("config", ["LlamaConfig", "Gemma2Config"])
def test_called_in_any_other_way_the_model_computes_what_it_did(config: str) -> None:
    model = a_model(config).eval()
    batch = a_batch()
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    before = model(**plain).logits
    prompt = batch["input_ids"][:1, :9]
    answered = model.generate(prompt, max_new_tokens=12, do_sample=False)
    share(model, answers=2)
    assert torch.equal(model(**plain).logits, before)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), answered)


def positions_not_reset(batch: Shared) -> Shared:
    return replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None])


def sibling_seen(batch: Shared) -> Shared:
    """Of the answer that it stands beside, each rejected one sees a token."""
    old = batch.segments
    return replace(
        batch,
        segments=Segments(old.own, tuple(n + (n > 0) for n in old.shared), old.answers, {}),
    )


def prompt_not_seen(batch: Shared) -> Shared:
    old = batch.segments
    return replace(
        batch, segments=Segments(old.own, tuple(max(0, n - 1) for n in old.shared), 2, {})
    )


@pytest.mark.parametrize("fault", [positions_not_reset, sibling_seen, prompt_not_seen])
def test_a_planted_fault_is_seen(
    fault: Callable[[Shared], Shared], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model()
    batch = a_batch()
    expected, gradients = scored(model, batch)
    share(model, answers=2)
    monkeypatch.setattr(shared_prefix, "shared", lambda *given: fault(shared(*given)))
    found, ours = scored(model, batch)
    assert (found.log_probs - expected.log_probs).abs().max() > 1e-3
    assert apart(ours, gradients) > 1e-3


def test_a_window_that_is_forgotten_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model("MistralConfig")
    batch = a_batch()
    expected, _ = scored(model, batch)
    share(model, answers=2)
    real = Segments.mask
    monkeypatch.setattr(Segments, "mask", lambda self, n, window, like: real(self, n, None, like))
    assert (scored(model, batch)[0].log_probs - expected.log_probs).abs().max() > 1e-3


some_tokens = st.lists(st.integers(1, 3), min_size=1, max_size=6)


@given(st.lists(st.tuples(some_tokens, some_tokens, some_tokens), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_every_token_is_found_again_and_none_stands_twice(
    groups: list[tuple[list[int], list[int], list[int]]],
) -> None:
    for answers in (1, 2, 3):
        rows = [group[n] for n in range(answers) for group in groups]
        batch = padded([([], row) for row in rows])
        found = shared(batch["input_ids"], batch["attention_mask"], answers)
        for row, places in zip(rows, found.places, strict=True):
            where = places[: len(row)]
            assert found.input_ids[0][where].tolist() == row
            assert found.position_ids[0][where].tolist() == list(range(len(row)))
        # The first answer of a group stands there as a whole; of others, what is unlike it.
        expected = 0
        for first, *others in (group[:answers] for group in groups):
            alike = [
                next((i for i in range(len(o)) if o[: i + 1] != first[: i + 1]), len(o))
                for o in others
            ]
            expected += len(first) + sum(len(o) - n for o, n in zip(others, alike, strict=True))
        assert found.input_ids.shape[1] == expected == sum(found.segments.own)


def test_rows_that_are_padded_at_their_left_are_refused() -> None:
    batch = a_batch()
    with pytest.raises(ValueError, match="pad at the right"):
        shared(batch["input_ids"].flip(1), batch["attention_mask"].flip(1), 2)


def test_a_head_that_trains_has_trls_gradient() -> None:
    model = a_model("Gemma2Config")  # its head is its embedding
    model.get_output_embeddings().weight.requires_grad_(True)
    batch = a_batch()
    expected, gradients = scored(model, batch)
    share(model, answers=2)
    found, ours = scored(model, batch)
    assert "model.embed_tokens.weight" in ours
    assert (found.log_probs - expected.log_probs).abs().max() < 1e-5
    assert apart(ours, gradients) < 1e-6


def by_its_bounds(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """torch's `varlen_attn`, by its documentation, with a causal mask aligned at the end."""
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found = []
    for n in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[n] : cu_seq_q[n + 1]]
        k, v = (each[cu_seq_k[n] : cu_seq_k[n + 1]] for each in (key, value))
        groups = query.shape[1] // key.shape[1] if enable_gqa else 1
        k, v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
        at = torch.arange(len(q))[:, None] + len(k) - len(q)
        behind = at - torch.arange(len(k))
        seen = behind >= 0
        if window_size[0] >= 0:
            seen &= behind <= window_size[0]
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        chances = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", chances, v))
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 4])
def test_what_the_gpu_is_given_says_the_same(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.nn.attention.varlen as kernels

    monkeypatch.setattr(kernels, "varlen_attn", by_its_bounds)
    batch = a_batch()
    segments = shared(batch["input_ids"], batch["attention_mask"], 2).segments
    torch.manual_seed(3)
    total = sum(segments.own)
    query, key, value = (torch.randn(1, heads, total, 8) for heads in (4, 2, 2))
    expected, _ = shared_attention.shared_prefix_attention(
        None, query, key, value, None, segments=segments, scaling=0.3, sliding_window=window
    )
    found = shared_attention._at_once(query, key, value, segments, 0.3, window)
    assert found.shape == (1, total, 4, 8)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_a_kernel_that_gives_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention.varlen as kernels

    agrees = shared_attention._kernel_agrees.__wrapped__
    given = (4, 2, 8), torch.float32, torch.device("cpu")
    assert not agrees(*given)  # there is none on a CPU
    monkeypatch.setattr(kernels, "varlen_attn", by_its_bounds)
    assert agrees(*given)

    def too_wide(*given: Any, **values: Any) -> Tensor:
        """A window that is one token too wide."""
        left = values["window_size"][0]
        return by_its_bounds(*given, **{**values, "window_size": (left + (left >= 0), 0)})

    monkeypatch.setattr(kernels, "varlen_attn", too_wide)
    assert not agrees(*given)


def test_whichever_adapter_is_on_is_asked() -> None:
    import peft

    base = a_model()
    policy: Any = peft.get_peft_model(
        base, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    policy.add_adapter(
        "other", peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    batch = a_batch()

    def answers() -> list[Tensor]:
        told = []
        for name in ("default", "other"):
            policy.set_adapter(name)
            told.append(policy(**batch, fused_lm_head=True).log_probs)
        with policy.disable_adapter():
            return [*told, policy(**batch, fused_lm_head=True).log_probs]

    before = answers()
    share(base, answers=2)
    for ours, theirs in zip(answers(), before, strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    assert (before[0] - before[1]).abs().max() > 0.1


def with_virtual_tokens() -> Any:
    import peft

    return peft.get_peft_model(
        a_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )


def with_dropout() -> Any:
    import peft

    return peft.get_peft_model(
        a_model(), peft.LoraConfig(target_modules="all-linear", lora_dropout=0.1)
    )


def another() -> Any:
    import transformers

    make: Any = transformers.GPT2LMHeadModel
    return make(transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (another, "not known to be exact for GPT2LMHeadModel"),
        (with_virtual_tokens, "virtual tokens stand before every row"),
        (with_dropout, "dropout draws anew for every row"),
        (lambda: a_model(attention_dropout=0.1), "dropout draws anew for every row"),
        (lambda: a_model(attn_implementation="eager"), "attention is eager, not sdpa"),
        (
            lambda: a_model("Gemma3TextConfig", use_bidirectional_attention=True),
            "looks at later tokens",
        ),
    ],
)
def test_where_it_would_not_be_exact_it_says_why(make: Callable[[], Any], said: str) -> None:
    reason = why_not(make())
    assert reason is not None
    assert said in reason
