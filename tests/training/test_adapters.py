"""Every kind of weights trains what it names, starts where it says, and comes back as it was."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from preferences.errors import InputError
from preferences.records import Message
from tests.training.conftest import COLOURS, THINGS, silent
from tests.training.test_dpo_loss import trained_loss, trainer_for
from training import models
from training.adapters import (
    BottleneckConfig,
    LoraConfig,
    WeightsConfig,
    parameter_counts,
    put_on,
    reference,
)
from training.dpo import DPOConfig, train
from training.evaluation import OwnAnswer, Policy, log_ratios
from training.run import TrainingResult, TrainingRuntime
from training.sampling import sample
from training.saved_adapters import load_adapters, load_trained

KINDS = get_args(models.Weights)
ADAPTED = [weights for weights in KINDS if models.has_adapter(weights)]
MOVED_AT_THE_START = ("prefix_tuning", "prompt_tuning")
"""Virtual tokens change the model before they have learnt anything."""

# The tiny model is 32 wide with a feed-forward layer of 64 and two blocks, each of the layers
# q, k, v, o (32 to 32), gate, up (32 to 64) and down (64 to 32).
LORA = 2 * (4 * 4 * (32 + 32) + 3 * 4 * (32 + 64))  # rank · (inputs + outputs)
LENGTHS = 2 * (4 * 32 + 2 * 64 + 32)  # one for each output
VOCABULARY = 9 + len(COLOURS) + len(THINGS)
TRAINABLE = {
    "full": 2 * VOCABULARY * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32,
    "lora": LORA,
    "dora": LORA + LENGTHS,
    "qlora": LORA,
    "qdora": LORA + LENGTHS,
    "prefix_tuning": 5 * 2 * (32 + 32),  # tokens · blocks · (a key and a value)
    "prompt_tuning": 5 * 32,
    "ia3": 2 * (32 + 32 + 64),  # keys, values and what goes into `down`
    "bottleneck": 2 * 2 * (32 * 8 + 8 + 8 * 32 + 32),  # behind o and down of both blocks
    "bitfit": LENGTHS,  # every one of these layers has a bias
    "ln_tuning": 2 * (32 + 32) + 32,
}

# Part of the name of every parameter that trains, and of none that does not.
NAMES = {
    "full": ("",),
    "lora": ("lora_A", "lora_B"),
    "dora": ("lora_A", "lora_B", "lora_magnitude_vector"),
    "qlora": ("lora_A", "lora_B"),
    "qdora": ("lora_A", "lora_B", "lora_magnitude_vector"),
    "prefix_tuning": ("prompt_encoder",),
    "prompt_tuning": ("prompt_encoder",),
    "ia3": ("ia3_l",),
    "bottleneck": ("bottleneck_down", "bottleneck_up"),
    "bitfit": ("proj.bias",),
    "ln_tuning": ("ln_tuning_layers",),
}


@pytest.fixture(scope="module")
def biased_model(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with a bias, drawn small, in every linear layer but the head."""
    import torch
    from transformers import AutoModelForCausalLM

    biased = AutoModelForCausalLM.from_pretrained(model, attention_bias=True, mlp_bias=True)
    torch.manual_seed(4)
    for name, parameter in biased.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    folder = tmp_path_factory.mktemp("biased")
    biased.save_pretrained(folder)
    models.load_tokenizer(model, None).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config_for(model: str, biased_model: str) -> Callable[..., DPOConfig]:
    def make(weights: str, **changes: Any) -> DPOConfig:
        values: dict[str, Any] = {
            "model": biased_model if weights == "bitfit" else model,
            "weights": weights,
            "lora": LoraConfig(rank=4),
            "bottleneck": BottleneckConfig(size=8),
            "virtual_tokens": 5,
            "learning_rate": 1e-2,
            "beta": 0.3,
            "batch_size": 4,
            "max_steps": 4,
            "max_length": 48,
            "dtype": "float32",
            "gradient_checkpointing": False,
            "schedule": "constant",
            "warmup_share": 0,
            "probe": None,
        }
        return DPOConfig(**{**values, **changes})

    return make


@dataclass(frozen=True)
class Trained:
    """A finished run, and the model as it was in memory when its weights were saved."""

    config: DPOConfig
    result: TrainingResult
    folder: Path
    policy: Any


def trained_with(config: DPOConfig, dataset: Path, output: Path) -> Trained:
    saved: list[Any] = []
    save = models.save_model

    def spy(policy: Any, *arguments: Any) -> None:
        saved.append(policy)
        save(policy, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "save_model", spy)
        result = train(config, dataset, output, TrainingRuntime(), progress=silent)
    return Trained(config, result, output / result.saved, saved[-1].eval())


RunOf = Callable[[str], Trained]


@pytest.fixture(scope="module")
def run_of(
    config_for: Callable[..., DPOConfig],
    red_pairs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunOf:
    """A finished run of a kind, trained once."""

    @functools.cache
    def run(weights: str) -> Trained:
        output = tmp_path_factory.mktemp(weights) / "run"
        return trained_with(config_for(weights), red_pairs, output)

    return run


def rows(config: DPOConfig) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of several lengths, as tokens."""
    tokenizer = models.load_tokenizer(config.model, None)
    answers = ("red red", "blue green white black", "green", "white red blue")
    return [
        (
            tokenizer(f"<bos><user>paint thing{n}<end>\n<assistant>")["input_ids"],
            tokenizer(f"{answer}<end>")["input_ids"],
        )
        for n, answer in enumerate(answers)
    ]


def log_probs(model: Any, config: DPOConfig) -> list[float]:
    """Of each answer, in nats: the sum over its tokens, one sequence at a time."""
    import torch

    sums = []
    for prompt, answer in rows(config):
        tokens = torch.tensor([prompt + answer])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, config.dtype == "bfloat16"):
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0]
        # Virtual tokens stand before the others.
        table = logits[-len(prompt + answer) :].float().log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt + answer) - 1)
        sums.append(sum(float(table[i, tokens[0, i + 1]]) for i in places))
    return sums


def load_base(config: DPOConfig) -> Any:
    return models.load_model(config.model, None, config.weights, config.dtype).eval()


def load_again(run: Trained) -> Any:
    if run.config.weights == "full":
        return models.load_model(str(run.folder), None, "full", run.config.dtype).eval()
    return load_trained(load_base(run.config), run.folder)


@pytest.mark.parametrize("weights", KINDS)
def test_only_what_it_names_trains_and_changes(weights: str, run_of: RunOf) -> None:
    trained = run_of(weights)
    import torch

    base = load_base(trained.config).state_dict()
    moved = 0
    for name, parameter in trained.policy.named_parameters():
        named = any(part in name for part in NAMES[weights])
        assert parameter.requires_grad == named, name
        plain = name.removeprefix("base_model.model.").removeprefix("base_model.")
        before = base.get(plain.replace(".base_layer", ""))
        if before is not None and not named:
            assert torch.equal(before, parameter), name
        elif before is not None:
            moved += not torch.equal(before, parameter)
    if weights in ("full", "bitfit"):
        # All of them, but for the embeddings of words that no pair has.
        assert moved == len([n for n in base if any(part in n for part in NAMES[weights])])
    before, after = (
        log_probs(load_base(trained.config), trained.config),
        log_probs(trained.policy, trained.config),
    )
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-3


@pytest.mark.parametrize("weights", KINDS)
def test_the_number_that_trains_is_the_one_arithmetic_gives(weights: str, run_of: RunOf) -> None:
    trained = run_of(weights)
    assert trained.result.trainable_parameters == TRAINABLE[weights]
    counts = parameter_counts(trained.policy)
    assert counts.trainable == TRAINABLE[weights]
    copies = TRAINABLE[weights] if weights not in ("full", "bitfit") else 0
    biases = LENGTHS if weights == "bitfit" else 0
    # Of the base two 4-bit weights in a byte are two, and what is added counts as well.
    assert counts.total == TRAINABLE["full"] + biases + copies
    assert str(counts) == f"{counts.trainable:,} of {counts.total:,} parameters train"


@pytest.mark.parametrize("weights", KINDS)
def test_saved_and_loaded_again_it_gives_the_same_log_probs(weights: str, run_of: RunOf) -> None:
    trained = run_of(weights)
    assert log_probs(load_again(trained), trained.config) == log_probs(
        trained.policy, trained.config
    )


@pytest.mark.parametrize("weights", ADAPTED)
def test_the_reference_is_the_base_whatever_was_trained(weights: str, run_of: RunOf) -> None:
    trained = run_of(weights)
    with reference(trained.policy):
        found = log_probs(trained.policy, trained.config)
    assert found == log_probs(load_base(trained.config), trained.config)


@pytest.mark.parametrize("weights", [kind for kind in ADAPTED if not models.is_quantised(kind)])
def test_its_distance_from_the_base_is_what_the_two_say_of_answers(
    weights: str, run_of: RunOf
) -> None:
    trained = run_of(weights)
    texts = ("red red", "blue green white black", "green", "white red blue")  # as in `rows`
    answers = [
        OwnAnswer((Message("user", f"paint thing{n}"),), text, finished=True)
        for n, text in enumerate(texts)
    ]
    start = Policy(trained.config.model)
    found = log_ratios(replace(start, adapter=trained.folder), start, answers, "float32")
    ours, theirs = (
        log_probs(model, trained.config) for model in (trained.policy, load_base(trained.config))
    )
    assert found == pytest.approx([a - b for a, b in zip(ours, theirs, strict=True)], abs=1e-4)


@pytest.mark.parametrize("weights", KINDS)
def test_before_it_trains_it_answers_exactly_as_the_base(
    weights: str, config_for: Callable[..., DPOConfig]
) -> None:
    config = config_for(weights)
    fresh = log_probs(put_on(load_base(config), config).eval(), config)
    base = log_probs(load_base(config), config)
    assert (fresh == base) == (config.weights not in MOVED_AT_THE_START)


@pytest.mark.parametrize("weights", KINDS)
def test_the_loss_before_the_first_step_is_ln_2_where_the_start_is_the_base(
    weights: str, config_for: Callable[..., DPOConfig], red_pairs: Path, tmp_path: Path
) -> None:
    trainer = trainer_for(config_for(weights), red_pairs, tmp_path)
    loss = trained_loss(trainer, [trainer.train_dataset[i] for i in range(6)])
    if weights in MOVED_AT_THE_START:
        assert abs(loss - math.log(2)) > 1e-4
    else:
        # Policy and reference agree, so Δ = 0 and −log σ(0) = ln 2.
        assert loss == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("weights", sorted(set(KINDS) - {"full", "lora", "qlora"}))
def test_in_bfloat16_what_trains_is_float32_and_comes_back_as_it_was(
    weights: str, config_for: Callable[..., DPOConfig], red_pairs: Path, tmp_path: Path
) -> None:
    import torch

    config = config_for(
        weights,
        dtype="bfloat16",
        gradient_checkpointing=weights != "prefix_tuning",
        max_steps=2,
        learning_rate=1e-4,  # of a bfloat16 near 1 the smallest change is 0.004
    )
    run = trained_with(config, red_pairs, tmp_path / "run")
    trainable = [p for p in run.policy.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    again = load_again(run)
    saved = dict(again.named_parameters())
    for name, parameter in run.policy.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(saved[name], parameter), name
    if weights not in ("qdora",):  # whose norms and head are float32 in training
        assert log_probs(again, config) == log_probs(run.policy, config)


class Interrupted(Exception):
    """Ctrl-C in the middle."""


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(kind, marks=pytest.mark.slow) if kind in ("bitfit", "dora", "qdora") else kind
        for kind in sorted(set(KINDS) - {"full", "lora"})
    ],
)
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    weights: str, config_for: Callable[..., DPOConfig], red_pairs: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    def interrupt(step: int, *_: object) -> None:
        if step == 3:
            raise Interrupted

    config, each = config_for(weights, max_steps=4), TrainingRuntime(log_steps=1, save_steps=1)
    with pytest.raises(Interrupted):
        train(config, red_pairs, tmp_path / "cut", each, progress=interrupt)
    saved = []
    for name in ("cut", "whole"):
        train(config, red_pairs, tmp_path / name, each, progress=silent)
        saved.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    cut, whole = saved
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


@pytest.mark.parametrize("weights", MOVED_AT_THE_START)
def test_virtual_tokens_answer_a_padded_batch_as_they_answer_one_by_one(
    weights: str, config_for: Callable[..., DPOConfig]
) -> None:
    import torch

    config = config_for(weights)
    policy = put_on(load_base(config), config).eval()
    torch.manual_seed(2)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    tokenizer = models.load_tokenizer(config.model, None)
    prompts = [
        tokenizer(text)["input_ids"]
        for text in (
            "<bos><user>paint thing3<end>\n<assistant>",
            "<bos><user>paint thing4<end>\n<assistant>red<end>\n<user>paint<end>\n<assistant>",
        )
    ]
    options: dict[str, Any] = {"ends": {tokenizer.eos_token_id}, "max_tokens": 6, "temperature": 0}
    drawn = sample(
        policy, tokenizer, prompts, **options, seed=0, batch_size=2, bf16=config.dtype == "bfloat16"
    )
    for prompt, answer in zip(prompts, drawn, strict=True):
        tokens = list(prompt)
        for token in answer.ids:
            with torch.no_grad():
                assert int(policy(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()) == token
            tokens.append(token)


def test_a_prefix_fits_heads_of_their_own_size(config_for: Callable[..., DPOConfig]) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,  # not 32 / 4
    )
    adapted = put_on(Qwen3ForCausalLM(shape), config_for("prefix_tuning"))
    # Tokens · blocks · (a key and a value) · heads that have them · their size.
    assert parameter_counts(adapted).trainable == 5 * 3 * 2 * 2 * 24
    import torch

    assert adapted(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 50)


def test_pfeiffer_has_half_of_houlsby(config_for: Callable[..., DPOConfig]) -> None:
    config = config_for("bottleneck", bottleneck={"size": 8, "placement": "pfeiffer"})
    adapted = put_on(load_base(config), config)
    assert parameter_counts(adapted).trainable == TRAINABLE["bottleneck"] // 2
    behind = {n.split(".bottleneck_")[0] for n, p in adapted.named_parameters() if p.requires_grad}
    assert [name.rsplit(".", 1)[-1] for name in behind] == ["down_proj", "down_proj"]


def test_a_bottleneck_adds_what_the_paper_says(config_for: Callable[..., DPOConfig]) -> None:
    import torch

    config = config_for("bottleneck")
    adapted = put_on(load_base(config), config)
    layer: Any = adapted.base_model.model.model.layers[0].mlp.down_proj
    torch.manual_seed(5)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    inputs = torch.randn(3, 64)
    h = inputs @ layer.base_layer.weight.T
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    inner = h @ down.weight.T + down.bias
    gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    expected = h + gelu @ up.weight.T + up.bias
    assert torch.allclose(layer(inputs), expected, atol=1e-5)


@pytest.mark.parametrize("weights", ADAPTED)
def test_several_adapters_stand_on_one_base_and_are_switched_by_name(
    weights: str,
    run_of: RunOf,
    config_for: Callable[..., DPOConfig],
    red_pairs: Path,
    tmp_path: Path,
) -> None:
    trained = run_of(weights)
    # Another adapter of the same kind, trained further.
    config = config_for(weights, max_steps=6, seed=1)
    other = trained_with(config, red_pairs, tmp_path / "other")
    both = load_adapters(load_base(config), {"red": trained.folder, "redder": other.folder})
    expected = {
        "red": log_probs(trained.policy, config),
        "redder": log_probs(other.policy, config),
    }
    assert expected["red"] != expected["redder"]
    assert log_probs(both, config) == expected["red"]
    for name in ("redder", "red", "redder"):
        both.set_adapter(name)
        assert log_probs(both, config) == expected[name]
    with reference(both):
        assert log_probs(both, config) == log_probs(load_base(config), config)
    assert log_probs(both, config) == expected["redder"]


@pytest.mark.parametrize("name", ["layers", "a.b"])
def test_an_adapter_is_not_named_as_a_part_of_the_model(name: str, run_of: RunOf) -> None:
    trained = run_of("lora")
    with pytest.raises(InputError, match=f"{name}: an adapter cannot be called so"):
        load_adapters(load_base(trained.config), {name: trained.folder})


def test_a_model_without_biases_is_refused_by_name(
    config_for: Callable[..., DPOConfig], red_pairs: Path, model: str, tmp_path: Path
) -> None:
    config = config_for("bitfit", model=model)
    with pytest.raises(InputError, match=r"biases alone, and \S+ has none; say weights: ln_tuning"):
        train(config, red_pairs, tmp_path / "run", progress=silent)


def test_a_prefix_is_not_trained_past_checkpointed_layers(
    config_for: Callable[..., DPOConfig], red_pairs: Path, tmp_path: Path
) -> None:
    config = config_for("prefix_tuning", gradient_checkpointing=True)
    with pytest.raises(InputError, match="say gradient_checkpointing: false"):
        train(config, red_pairs, tmp_path / "run", progress=silent)


def test_what_a_model_does_not_have_cannot_be_adapted() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = GPTNeoXConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    # Its keys, queries and values are one layer.
    with pytest.raises(InputError, match="ia3 finds no keys and values of their own"):
        put_on(GPTNeoXForCausalLM(shape), WeightsConfig(weights="ia3"))
    fitting = put_on(GPTNeoXForCausalLM(shape), WeightsConfig(weights="bottleneck"))
    # Behind attention and feed-forward of its one block: 2·32·64 + 64 + 32 each.
    assert parameter_counts(fitting).trainable == 2 * (2 * 32 * 64 + 64 + 32)


@pytest.mark.parametrize("weights", ["lora", "bitfit"])
def test_an_adapter_of_another_model_is_refused(weights: str, run_of: RunOf) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_bias=True,
    )
    with pytest.raises(InputError, match="give the model that"):
        load_trained(LlamaForCausalLM(shape), run_of(weights).folder)


def test_a_folder_without_an_adapter_is_named(model: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no readable adapter_config\.json in it; give a run's"):
        load_trained(models.load_model(model, None, "lora", "float32"), tmp_path)


def test_adapters_of_two_kinds_do_not_share_a_base(run_of: RunOf) -> None:
    folders = {kind: run_of(kind).folder for kind in ("lora", "ia3")}
    with pytest.raises(InputError, match="of one kind of adapter; lora is lora, ia3 is ia3"):
        load_adapters(load_base(run_of("lora").config), folders)
