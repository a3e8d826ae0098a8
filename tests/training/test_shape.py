from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from preferences.errors import InputError
from training.shape import Shape, model_config, shape_of


def shape(kind: str, **sizes: Any) -> Shape:
    return shape_of(getattr(transformers, f"{kind}Config")(**sizes))


def sizes(hidden: int, inner: int, layers: int, heads: int, kv: int, words: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": words,
    }


TIED = {"tie_word_embeddings": True}

# As the weights on the Hub have them.
PUBLISHED = [
    ("Llama-2-7B", "Llama", sizes(4096, 11008, 32, 32, 32, 32000), 6_738_415_616),
    ("Llama-2-13B", "Llama", sizes(5120, 13824, 40, 40, 40, 32000), 13_015_864_320),
    ("Llama-3.1-8B", "Llama", sizes(4096, 14336, 32, 32, 8, 128256), 8_030_261_248),
    ("Mistral-7B", "Mistral", sizes(4096, 14336, 32, 32, 8, 32000), 7_241_732_096),
    ("Qwen2.5-0.5B", "Qwen2", sizes(896, 4864, 24, 14, 2, 151936) | TIED, 494_032_768),
    (
        "Qwen3-0.6B",
        "Qwen3",
        sizes(1024, 3072, 28, 16, 8, 151936) | TIED | {"head_dim": 128},
        596_049_920,
    ),
    (
        "Gemma-2-2B",
        "Gemma2",
        sizes(2304, 9216, 26, 8, 4, 256000) | TIED | {"head_dim": 256},
        2_614_341_888,
    ),
    (
        "Phi-3-mini",
        "Phi3",
        sizes(3072, 8192, 32, 32, 32, 32064) | {"pad_token_id": 0},
        3_821_079_552,
    ),
    ("OLMo-2-1B", "Olmo2", sizes(2048, 8192, 16, 16, 16, 100352), 1_484_916_736),
]


@pytest.mark.parametrize(("kind", "values", "published"), [p[1:] for p in PUBLISHED])
def test_parameters_are_those_that_were_published(
    kind: str, values: dict[str, Any], published: int
) -> None:
    found = shape(kind, **values)
    assert found.total == published
    assert found.active == published


def test_of_eight_experts_a_token_passes_through_two() -> None:
    found = shape("Mixtral", **sizes(4096, 14336, 32, 32, 8, 32000))
    assert found.total == 46_702_792_704
    # 6 of 8 experts idle, each three matrices of 4096 × 14336 in 32 layers.
    assert found.active == 46_702_792_704 - 32 * 6 * 3 * 4096 * 14336


def test_parts_of_a_small_llama_are_counted_by_hand() -> None:
    found = shape("Llama", **sizes(32, 48, 2, 4, 2, 100))
    # Queries and output 32×32, keys and values 32×16, three of the feed-forward layer 32×48.
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert found.linear == linear
    assert found.head == 32 * 100
    assert found.other == 32 * 100 + 5 * 32  # embeddings; two norms a layer and the last
    assert sum(found.quantised_layers) == linear
    assert found.kv_size == 2 * 2 * 2 * 8  # keys and values, layers, heads, numbers of a head


def test_a_head_that_is_the_embeddings_counts_once() -> None:
    apart = shape("Llama", **sizes(32, 48, 2, 4, 2, 100))
    tied = shape("Llama", **sizes(32, 48, 2, 4, 2, 100), **TIED)
    assert tied.head == 0
    assert apart.total - tied.total == 32 * 100


def test_biases_are_never_packed() -> None:
    plain = shape("Llama", **sizes(32, 48, 2, 4, 2, 100))
    biased = shape("Llama", **sizes(32, 48, 2, 4, 2, 100), attention_bias=True)
    assert biased.linear == plain.linear
    assert biased.other - plain.other == 2 * (32 + 16 + 16 + 32)


def test_a_folder_without_a_configuration_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no configuration can be read .*config\.json"):
        model_config(str(tmp_path), None)


def test_a_configuration_is_enough_and_weights_need_not_be_there(tmp_path: Path) -> None:
    values = {"model_type": "llama", **sizes(32, 48, 2, 4, 2, 100)}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert shape_of(model_config(str(tmp_path), None)).layers == 2
