from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig, LlamaForCausalLM

from preferences.errors import InputError
from training import memory, rehearsal
from training.adapters import LoraConfig
from training.dpo import DPOConfig
from training.kto import KTOConfig
from training.memory import (
    Examples,
    Memory,
    largest_batch,
    nf4_bytes,
    training_memory,
    weight_bytes,
)
from training.models import Weights
from training.orpo import ORPOConfig
from training.passes import pass_of
from training.ppo import PPOConfig
from training.ranked import RankedDPOConfig
from training.rehearsal import LiveMemory, Pass, fused_head, rehearse, shared_head
from training.reward import RewardConfig
from training.settings import TrainingConfig
from training.sft import SFTConfig
from training.shape import shape_of


def llama(layers: int = 4, **other: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return LlamaConfig(**{**sizes, "vocab_size": 512, "num_hidden_layers": layers, **other})


def held_by(config: TrainingConfig, model: Any | None = None) -> Memory:
    model = model or llama()
    return training_memory(config, model, shape_of(model))


def sft(**values: Any) -> SFTConfig:
    return SFTConfig(**{"model": "m", "batch_size": 2, "max_length": 64, **values})


def test_what_lives_at_once_is_counted_and_what_is_dropped_is_not() -> None:
    with LiveMemory([]) as live:
        first = torch.zeros(250)  # 1,000 bytes
        second = first + 1  # 1,000 more
        del first
        third = second[:10]  # a view is no new memory
        del second
        live.next_part()
        assert live.live == 1000
        del third
        fourth = torch.zeros(125)
        live.next_part()
    assert live.peaks == [2000, 1000]
    assert live.live == 500
    del fourth


@pytest.mark.parametrize("double", [False, True])
def test_a_packed_layer_takes_what_bitsandbytes_takes(double: bool) -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(96, 1000)  # neither kind of block divides it
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    tensors = [packed, state.absmax, state.code]
    if double:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    taken = sum(t.numel() * t.element_size() for t in tensors)
    assert nf4_bytes(weight.numel(), double) == taken


def test_double_quantisation_saves_0_373_bits_a_weight() -> None:
    # A scale of 32 bits for 64 weights, or one of 8 and for 256 of them another of 32.
    saved = 32 / 64 - 8 / 64 - 32 / (64 * 256)
    assert saved == pytest.approx(0.373, abs=5e-4)
    found = (nf4_bytes(2**30, double=False) - nf4_bytes(2**30)) * 8 / 2**30
    assert found == pytest.approx(saved, rel=1e-4)


def test_only_linear_layers_are_packed() -> None:
    shape = shape_of(llama())
    each = [64 * 64] * 4 + [64 * 128] * 3
    packed = sum(nf4_bytes(n) for n in each) * 4
    rest = 2 * 512 * 64 + 9 * 64  # embeddings, head, norms
    assert weight_bytes(shape, "bfloat16", quantised=True) == packed + 2 * rest
    assert weight_bytes(shape, "bfloat16", quantised=False) == 2 * shape.total


def test_full_weights_take_16_bytes_a_parameter() -> None:
    found = held_by(sft(weights="full"))
    total = shape_of(llama()).total
    assert found.weights + found.gradients + found.optimizer == 16 * total
    assert found.adapter == 0


def test_a_prepared_4_bit_base_holds_the_rest_in_float32() -> None:
    found = held_by(sft(weights="qlora"))
    shape = shape_of(llama())
    packed = weight_bytes(shape, "bfloat16", quantised=True) - 2 * (shape.total - shape.linear)
    assert found.weights == packed + 4 * (shape.total - shape.linear)
    assert found.load < found.weights


@pytest.mark.parametrize(
    ("optimizer", "each"),
    [("adamw", 8), ("adamw_8bit", 2), ("paged_adamw_8bit", 0), ("adafactor", 0)],
)
def test_optimiser_states_go_with_what_trains(optimizer: str, each: int) -> None:
    found = held_by(sft(optimizer=optimizer, lora={"rank": 8}))
    # Two matrices a layer: 8 numbers for each of its inputs and of its outputs.
    trained = 4 * 8 * (4 * (64 + 64) + 3 * (64 + 128))
    assert found.gradients == found.adapter == 4 * trained
    assert found.optimizer == each * trained


def test_each_checkpointed_layer_keeps_its_input_and_its_adapters_copy() -> None:
    six, ten = (held_by(sft(), llama(layers)).activations for layers in (6, 10))
    layer_input = 2 * 64 * 64 * 2  # rows, tokens, width, bytes
    # Autocast keeps bfloat16 copies of the float32 adapter until the forward pass is over.
    copy = 2 * 16 * (4 * (64 + 64) + 3 * (64 + 128))
    assert ten - six == 4 * (layer_input + copy)


def test_what_a_frozen_llama_layer_keeps_is_counted_by_hand() -> None:
    weights = sft(lora={"target_modules": ("o_proj",), "rank": 8})
    shown = Pass(1, 64, checkpointing=False, autocast=False, adapter_float32=False)
    six, ten = (
        rehearse(llama(layers), weights, shown, fused_head, "bfloat16").activations
        for layers in (6, 10)
    )
    width, inner, heads, rank = 64, 128, 4, 8
    norms = 2 * (4 * width + 4)  # the input in float32, and one over its length
    attention = 2 * 4 * width + 4 * heads  # queries, keys, values, result; a number a head
    feed_forward = 2 * 3 * inner  # gate, its activation, and what that is multiplied with
    adapter = 2 * rank  # between its matrices; its input is attention's result
    assert ten - six == 4 * 64 * (norms + attention + feed_forward + adapter)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weights", ["full", "lora", "qlora", "dora", "ia3"])
def test_a_few_layers_tell_what_all_hold(
    monkeypatch: pytest.MonkeyPatch, weights: str, checkpointing: bool
) -> None:
    config = sft(weights=weights, gradient_checkpointing=checkpointing)
    few = held_by(config, llama(12))
    monkeypatch.setattr(rehearsal, "DEPTHS", (12, 12))
    every = held_by(config, llama(12))
    assert few.activations == pytest.approx(every.activations, rel=0.01)
    assert few.gradients == every.gradients


def test_a_padded_pair_is_two_sequences() -> None:
    pairs = ORPOConfig(model="m", batch_size=2, max_length=64)
    assert held_by(pairs).activations == held_by(sft(batch_size=4)).activations


def passing(config: TrainingConfig, examples: Examples, model: Any | None = None) -> Pass:
    return pass_of(config, model or llama(), examples)[0]


def test_a_shared_pair_is_its_prompt_once_and_both_answers() -> None:
    pairs = DPOConfig(model="m", batch_size=2, max_length=64)
    shown = passing(pairs, Examples(2, answer=16))
    assert shown.segments is not None
    # Each prompt has 64 − 16 tokens, and the rejected answer sees them in the chosen one's row.
    assert shown.segments.own == (64, 16, 64, 16)
    assert shown.segments.shared == (0, 48, 0, 48)
    assert (shown.rows, shown.tokens, shown.padded) == (1, 2 * (48 + 16 + 16), False)
    # Where nothing is known of the answers, nearly all of a row may be one.
    assert passing(pairs, Examples(2)).tokens == 2 * (1 + 63 + 63)
    few = training_memory(pairs, llama(), shape_of(llama()), Examples(2, answer=16))
    assert few.activations < held_by(pairs).activations


def test_a_list_has_its_prompt_once_and_likes_have_one_each() -> None:
    lists = RankedDPOConfig(model="m", batch_size=3, max_length=64)
    assert passing(lists, Examples(4, answer=16)).tokens == 3 * (48 + 4 * 16)
    likes = KTOConfig(model="m", batch_size=3, max_length=64)
    assert passing(likes, Examples(1, answer=16)).tokens == 3 * 64


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (DPOConfig(model="m", lora=LoraConfig(dropout=0.1)), llama()),
        (DPOConfig(model="m", weights="prompt_tuning"), llama()),
        (DPOConfig(model="m"), GPTNeoXConfig(hidden_size=64, num_attention_heads=4)),
        (RewardConfig(model="m", packing=False), llama()),
        (ORPOConfig(model="m"), llama()),
    ],
    ids=["dropout", "virtual tokens", "architecture", "reward unpacked", "orpo"],
)
def test_where_tokens_are_not_shared_rows_are_padded(config: TrainingConfig, model: Any) -> None:
    shown = passing(config, Examples(2, answer=16), model)
    assert (shown.segments, shown.padded) == (None, True)
    assert (shown.rows, shown.tokens) == (2 * 8, 1024)


def test_a_budget_of_tokens_bounds_a_batch() -> None:
    # A pair has at most 48 + 16 + 16 = 80 tokens shared, and 2 · 64 padded.
    budget = {"model": "m", "batch_size": 32, "max_length": 64, "batch_tokens": 320}
    assert passing(DPOConfig(**budget), Examples(2, answer=16)).tokens == 4 * 80
    padded = DPOConfig(**budget, lora=LoraConfig(dropout=0.1))
    assert passing(padded, Examples(2, answer=16)).rows == 2 * 3  # 320 / 128, rounded up
    small = DPOConfig(**{**budget, "batch_tokens": 10})
    assert passing(small, Examples(2, answer=16)).tokens == 80


def test_what_a_shared_pass_keeps_is_what_autograd_keeps() -> None:
    """Counted on the real model and its real forward pass, on a CPU: within 10 %."""
    from trl.trainer.utils import add_fused_lm_head

    from training.adapters import put_on
    from training.shared_prefix import IGNORED, share, shared

    weights = sft(lora={"rank": 4})
    shape = llama(vocab_size=4096, num_key_value_heads=2, pad_token_id=0)
    model = LlamaForCausalLM(shape)
    adapted = put_on(model, weights)
    add_fused_lm_head(model)
    share(model, answers=2)
    prompts, answers = (20, 60, 40), ((30, 50), (9, 10), (64, 5))
    pairs = list(zip(prompts, answers, strict=True))
    rows = [(p, a[side], n) for side in range(2) for n, (p, a) in enumerate(pairs)]
    ids = torch.zeros(6, 104, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, answer, number) in enumerate(rows):
        ids[row, :prompt] = 1 + number
        ids[row, prompt : prompt + answer] = 10 + row
        mask[row, : prompt + answer] = 1
        labels[row, prompt : prompt + answer] = 10 + row
    known = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        scored = adapted(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    assert scored.log_probs.requires_grad
    segments = shared(ids, mask, 2).segments
    assert sum(segments.own) == sum(prompts) + sum(map(sum, answers))
    shown = Pass(
        1,
        sum(segments.own),
        checkpointing=False,
        autocast=False,
        segments=segments,
        on_gpu=False,
    )
    head = shared_head(sum(map(sum, answers)), None, on_gpu=False)
    found = rehearse(shape, weights, shown, head, "float32")
    assert found.kept == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("weights", get_args(Weights))
def test_every_kind_of_weights_has_an_estimate(weights: str) -> None:
    model = llama(mlp_bias=True)  # BitFit wants some
    values = {"weights": weights, "gradient_checkpointing": weights != "prefix_tuning"}
    found = held_by(DPOConfig(model="m", batch_size=2, max_length=64, **values), model)
    assert found.training > found.activations > 0


def test_virtual_tokens_are_rows_of_their_own_before_every_row() -> None:
    def activations(tokens: int) -> float:
        values = {"weights": "prompt_tuning", "virtual_tokens": tokens}
        return held_by(sft(gradient_checkpointing=False, **values)).activations

    # At least what goes into each of 4 layers: 2 rows, 64 numbers of 2 bytes.
    assert activations(32) - activations(1) > 31 * 4 * 2 * 64 * 2


def test_four_bit_layers_that_keep_their_inputs_hold_more() -> None:
    shown = Pass(1, 64, checkpointing=False, autocast=False)
    kept = Pass(1, 64, checkpointing=False, autocast=False, keeps_inputs=True)
    less, more = (
        rehearse(llama(), sft(weights="qlora"), each, fused_head, "bfloat16").activations
        for each in (shown, kept)
    )
    assert more > less


def test_ppo_on_full_weights_holds_a_frozen_copy_and_on_an_adapter_none() -> None:
    def run(weights: str) -> Memory:
        return held_by(
            PPOConfig.model_construct(
                **{**PPO, "weights": weights, "lora": sft().lora},
            )
        )

    full, lora = run("full"), run("lora")
    assert full.copies == full.weights == 4 * shape_of(llama()).total
    assert lora.copies == 0
    assert lora.sampling >= 2 * 64 * shape_of(llama()).kv_size * 2


PPO: dict[str, Any] = {
    "model": "m",
    "batch_size": 2,
    "max_length": 64,
    "max_tokens": 16,
    "dtype": "bfloat16",
}


@pytest.mark.slow
def test_the_largest_batch_fits_and_a_tenth_more_does_not() -> None:
    model, config, room = llama(), sft(), 1.2e9
    shape = shape_of(model)
    batch = largest_batch(config, model, shape, held_by(config), room)
    assert batch is not None
    fitting = config.model_copy(update={"batch_size": int(batch * 0.9)})
    too_much = config.model_copy(update={"batch_size": int(batch * 1.1)})
    assert held_by(fitting).device <= room < held_by(too_much).device


def test_nothing_fits_into_less_than_the_weights() -> None:
    model, config = llama(), sft()
    assert largest_batch(config, model, shape_of(model), held_by(config), 1e8) is None


def test_the_cure_fits() -> None:
    model = llama(hidden_size=1024, intermediate_size=4096, num_attention_heads=8)
    config = sft(weights="full", batch_size=8)
    room = 1.6e9
    assert held_by(config, model).device > room
    said = memory.cure(config, model, shape_of(model), room)
    changes = "batch_size: 1 with accumulation: 8, which trains the same, optimizer: adamw_8bit"
    assert said == f"say {changes}"
    changed = {"batch_size": 1, "accumulation": 8, "optimizer": "adamw_8bit"}
    assert held_by(config.model_copy(update=changed), model).device <= room


def test_there_is_no_cure_for_a_model_that_is_too_large() -> None:
    model = llama()
    found = memory.cure(sft(), model, shape_of(model), 1e8)
    assert found == "no setting is enough: take a smaller model or a larger GPU"


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("22.5 GiB", 22.5 * 2**30), ("80gb", 80e9)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: float) -> None:
    assert memory.memory_of_device(text) == size


@pytest.mark.parametrize("text", ["", "24", "-1GB", "GB", "big"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write it as 24GB"):
        memory.memory_of_device(text)


@pytest.mark.slow
def test_published_figures_are_met() -> None:
    file = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    sys.path.insert(0, str(file.parent))
    try:
        spec = importlib.util.spec_from_file_location("memory_benchmark", file)
        assert spec is not None
        assert spec.loader is not None
        benchmark = importlib.util.module_from_spec(spec)
        sys.modules["memory_benchmark"] = benchmark
        spec.loader.exec_module(benchmark)
    finally:
        sys.path.remove(str(file.parent))
    rows = [*benchmark.litgpt(), *benchmark.torchtune(), *benchmark.arithmetic()]
    missed = [row.what for row in rows if benchmark.told(row)[6].endswith("no")]
    assert missed == []
