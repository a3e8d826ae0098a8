"""The in-process engine against passes of the bare model over one unpadded prompt at a time."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from generation.engine import Completion, EngineConfig, EngineRuntime, Request, Sampling
from generation.opening import open_engine
from generation.transformers_engine import TransformersEngine
from preferences.errors import InputError, ServiceError
from preferences.records import messages_from
from tests.generation.tiny_model import CONTEXT, Reference

# Of many lengths, so that every batch has padding.
PROMPTS = [f"{i}: " + "write of the thing " * (1 + i % 7) for i in range(24)]


def request(text: str, seed: int | None = None, **sampling: object) -> Request:
    return Request(text, messages_from(text), Sampling.model_validate(sampling), seed)


def sampled(max_tokens: int = 12) -> list[Request]:
    return [request(text, seed, max_tokens=max_tokens) for seed, text in enumerate(PROMPTS)]


def answers(engine: TransformersEngine, requests: list[Request]) -> dict[str, Completion]:
    found = list(engine.complete(requests))
    assert len(found) == len(requests)
    return {c.request_id: c for c in found}


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Reference:
    return Reference(tiny_model)


@pytest.fixture(scope="module")
def engine(reference: Reference) -> TransformersEngine:
    return TransformersEngine(reference.model, reference.tokenizer, batch_size=5)


def test_greedy_replies_and_their_log_probabilities_are_the_models(engine, reference):
    found = answers(engine, [request(p, temperature=0, max_tokens=24) for p in PROMPTS[:8]])
    for text in PROMPTS[:8]:
        tokens = reference.greedy(text, 24)
        completion = found[text]
        assert completion.text == reference.decode(tokens)
        assert completion.logprob == pytest.approx(reference.logprob(text, tokens), abs=1e-3)
        assert completion.prompt_tokens == len(reference.prompt(text))
        assert completion.completion_tokens == len(tokens)


def test_a_seed_gives_the_same_reply_in_another_batch_order_and_engine(engine, tiny_model):
    in_fives = answers(engine, sampled())
    assert len({c.text for c in in_fives.values()}) == len(PROMPTS)
    alone = answers(engine, sampled()[7:8])
    config = EngineConfig(engine="transformers", model=str(tiny_model))
    with open_engine(config, EngineRuntime(batch_size=16)) as other:
        backwards = {c.request_id: c for c in other.complete(sampled()[::-1])}
    for found in (alone, backwards):
        for request_id, completion in found.items():
            expected = in_fives[request_id]
            # The sum of log-probabilities differs by rounding alone.
            assert completion.logprob == pytest.approx(expected.logprob, abs=1e-3)
            assert dataclasses.replace(completion, logprob=None) == dataclasses.replace(
                expected, logprob=None
            )


def test_a_longer_limit_continues_the_same_reply(engine):
    short, long = answers(engine, sampled(5)), answers(engine, sampled(15))
    for text in PROMPTS:
        # The last character may have been cut in the middle of its bytes.
        assert long[text].text.startswith(short[text].text.rstrip("\ufffd"))


def test_rows_that_end_early_leave_the_others_as_they_are(engine):
    limits = [3, 30, 1, 2, 3]
    together = [request(p, 9, max_tokens=n) for p, n in zip(PROMPTS, limits, strict=False)]
    found = answers(engine, together)
    for one in together:
        assert found[one.request_id].text == answers(engine, [one])[one.request_id].text
        assert (found[one.request_id].completion_tokens or 0) <= one.sampling.max_tokens


def test_without_a_seed_replies_differ(engine):
    asked = [Request(str(i), messages_from("go"), Sampling(max_tokens=12)) for i in range(8)]
    # One in eight is empty, so that some may be equal; with shared noise all would be.
    assert len({c.text for c in engine.complete(asked)}) > 2


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (3.0, 1.0), (3.0, 0.6)])
def test_first_tokens_are_drawn_as_often_as_the_model_says(reference, temperature, top_p):
    draws = 4000
    engine = TransformersEngine(reference.model, reference.tokenizer, batch_size=500)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=1)
    asked = [Request(str(i), messages_from("go"), sampling, i) for i in range(draws)]
    drawn = Counter(round(c.logprob or 0, 4) for c in engine.complete(asked))

    raw = [float(logprob) for logprob in reference.logprobs("go", [])[0]]
    weights = sorted(((2.718281828459045 ** (x / temperature), x) for x in raw), reverse=True)
    total, nucleus, expected = sum(w for w, _ in weights), 0.0, {}
    for weight, logprob in weights:
        if nucleus >= top_p:
            break
        nucleus += weight / total
        expected[round(logprob, 4)] = weight / total
    share = sum(expected.values())
    # A token is known by its raw log-probability; rounding may shift it by one in the last place.
    for logprob, probability in list(expected.items())[:20]:
        count = sum(drawn[round(logprob + d, 4)] for d in (-1e-4, 0.0, 1e-4))
        p = probability / share
        # Five standard errors of a share: one run in a hundred thousand fails by chance.
        assert count / draws == pytest.approx(p, abs=5 * (p * (1 - p) / draws) ** 0.5)
    if top_p < 1:
        # The nucleus holds the token that reaches top_p and none after it.
        assert min(drawn) == pytest.approx(min(expected), abs=2e-4)


def test_choice_probabilities_are_the_models_own_also_far_from_the_top(engine, reference):
    choices = ("A", "B", "C", "%")
    asked = [
        Request(p, messages_from(p), Sampling(temperature=1.5), 3, choices) for p in PROMPTS[:8]
    ]
    found = answers(engine, [*asked, *sampled()[20:]])
    for text in PROMPTS[:8]:
        probs = reference.logprobs(text, [])[0].exp()
        expected = [float(probs[reference.tokenizer.encode(c)[0]]) for c in choices]
        assert found[text].choice_probs == pytest.approx(expected, abs=1e-5)
        assert found[text].text == choices[expected.index(max(expected))]
        assert (found[text].finish_reason, found[text].completion_tokens) == ("stop", 1)


def test_a_choice_of_two_tokens_is_named(engine):
    asked = [Request("r", messages_from("hello"), Sampling(), None, ("A", "tie"))]
    with pytest.raises(InputError, match="choice 'tie' is 3 tokens"):
        list(engine.complete(asked))


def test_a_stop_text_ends_the_reply_and_is_not_part_of_it(engine, reference):
    whole = reference.decode(reference.greedy(PROMPTS[0], 24))
    stop = next(whole[i : i + 2] for i in range(6, 20) if whole[i : i + 2].isascii())
    found = answers(engine, [request(PROMPTS[0], temperature=0, max_tokens=24, stop=(stop,))])
    assert found[PROMPTS[0]].text == whole[: whole.index(stop)]
    assert found[PROMPTS[0]].finish_reason == "stop"


def test_the_end_token_ends_the_reply_and_is_counted_but_not_read(reference):
    first, second = reference.greedy(PROMPTS[0], 2)
    tokenizer, before = reference.tokenizer, reference.model.generation_config.eos_token_id
    # As many chat models: the generation config names an end that the tokenizer does not.
    reference.model.generation_config.eos_token_id = [before, second]
    try:
        engine = TransformersEngine(reference.model, tokenizer)
        (found,) = engine.complete([request(PROMPTS[0], temperature=0, max_tokens=24)])
    finally:
        reference.model.generation_config.eos_token_id = before
    assert first != second
    assert (found.text, found.finish_reason) == (tokenizer.decode([first]), "stop")
    assert found.completion_tokens == 2


def test_a_prompt_that_is_too_long_fails_alone(engine):
    long = "x" * CONTEXT
    found = answers(engine, [request(long), *sampled()])
    # Every letter is a token, and the template adds three.
    assert found[long].failure == f"prompt of {CONTEXT + 3} tokens does not fit in {CONTEXT}"
    assert found[long].finish_reason == "failed"
    assert all(found[r.request_id].finish_reason != "failed" for r in sampled())


def test_an_answer_ends_where_the_context_does(engine, reference):
    text = "y" * (CONTEXT - 7)
    found = answers(engine, [request(text, temperature=0, max_tokens=100)])[text]
    assert len(reference.prompt(text)) == CONTEXT - 4
    assert (found.completion_tokens, found.finish_reason) == (4, "length")


def test_padding_takes_no_position_in_a_model_with_absolute_ones(reference):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(reference.tokenizer), n_positions=CONTEXT, n_embd=32, n_layer=1, n_head=2,
        initializer_range=0.5, bos_token_id=None, eos_token_id=reference.tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    engine = TransformersEngine(model, reference.tokenizer)
    asked = [request(p, temperature=0, max_tokens=8) for p in PROMPTS[:4]]
    together = answers(engine, asked)
    for text in PROMPTS[:4]:
        tokens = torch.tensor([reference.prompt(text)])
        whole = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        answer = whole[0, tokens.shape[1] :].tolist()
        assert together[text].text == reference.decode(answer)


def test_a_shorter_context_may_be_asked_for(tiny_model):
    config = EngineConfig(engine="transformers", model=str(tiny_model), max_length=20)
    with open_engine(config, EngineRuntime()) as engine:
        (found,) = engine.complete([request("z" * 17)])
    assert found.failure == "prompt of 20 tokens does not fit in 20"


def test_an_adapter_changes_replies_as_peft_does(reference, tiny_model, tiny_adapter):
    with_adapter = Reference(tiny_model, tiny_adapter)
    config = EngineConfig(engine="transformers", model=str(tiny_model), adapter=str(tiny_adapter))
    with open_engine(config, EngineRuntime()) as engine:
        asked = [request(p, temperature=0, max_tokens=16) for p in PROMPTS[:4]]
        found = {c.request_id: c for c in engine.complete(asked)}
    for text in PROMPTS[:4]:
        tokens = with_adapter.greedy(text, 16)
        assert found[text].text == with_adapter.decode(tokens)
        assert tokens != reference.greedy(text, 16)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_stand_before_every_prompt(kind, reference, tiny_model, tmp_path):
    torch.manual_seed(2)
    config = getattr(peft, kind)(num_virtual_tokens=5, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(Reference(tiny_model).model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(str(tmp_path))
    alone = Reference(tiny_model, tmp_path)
    chosen = EngineConfig(engine="transformers", model=str(tiny_model), adapter=str(tmp_path))
    prompts = [*PROMPTS[:4], "y" * (CONTEXT - 5 - 7)]
    asked = [request(p, temperature=0, max_tokens=16) for p in prompts]
    choices = ("A", "B", "%")
    asked += [Request("choice", messages_from(PROMPTS[0]), Sampling(), None, choices)]
    with open_engine(chosen, EngineRuntime()) as engine:
        found = {c.request_id: c for c in engine.complete(asked)}
    for text in PROMPTS[:4]:
        tokens = alone.greedy(text, 16)
        assert found[text].text == alone.decode(tokens)
        assert found[text].logprob == pytest.approx(alone.logprob(text, tokens), abs=1e-3)
        assert tokens != reference.greedy(text, 16)
    # The context is shorter by the five: the prompt has 3 tokens more, which leaves 4.
    assert found[prompts[-1]].completion_tokens == 4
    probs = alone.logprobs(PROMPTS[0], [])[0].exp()
    expected = [float(probs[reference.tokenizer.encode(c)[0]]) for c in choices]
    assert found["choice"].choice_probs == pytest.approx(expected, abs=1e-5)


def test_an_adapter_that_peft_does_not_know_is_put_on_by_who_does(tiny_model, tiny_adapter):
    asked: list[Path] = []

    def put_on(model, folder):
        asked.append(folder)
        return peft.PeftModel.from_pretrained(model, folder)

    config = EngineConfig(engine="transformers", model=str(tiny_model), adapter=str(tiny_adapter))
    with open_engine(config, EngineRuntime(), put_on) as engine:
        assert len(list(engine.complete(sampled()[:1]))) == 1
    assert asked == [tiny_adapter]


def test_a_model_in_training_is_asked_without_dropout_and_goes_on_training(tiny_model):
    model = Reference(tiny_model).model
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    engine = TransformersEngine(model, Reference(tiny_model).tokenizer)
    twice = [answers(engine, sampled()[:4]) for _ in range(2)]
    assert twice[0] == twice[1]
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_folder_that_holds_no_model_is_an_error_that_names_it(tmp_path):
    config = EngineConfig(engine="transformers", model=str(tmp_path))
    with (
        pytest.raises(ServiceError, match=f"{tmp_path} does not load"),
        open_engine(config, EngineRuntime()),
    ):
        pass


def test_loading_prints_nothing(tiny_model, capfd):
    config = EngineConfig(engine="transformers", model=str(tiny_model))
    with open_engine(config, EngineRuntime()) as engine:
        list(engine.complete(sampled()[:2]))
    assert capfd.readouterr() == ("", "")
