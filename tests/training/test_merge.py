"""A merged model is the trained one, as an ordinary model that knows nothing of adapters."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preferences.errors import InputError, ServiceError
from tests.training.conftest import build_tokenizer, equal
from tests.training.test_adapters import (  # noqa: F401  # fixtures
    Trained,
    biased_model,
    config_for,
    load_base,
    rows,
    run_of,
    trained_with,
)
from training import models
from training.dpo import DPOConfig
from training.merge import merge, vllm_arguments

MERGED = ("full", "lora", "dora", "qlora", "qdora", "ia3", "ln_tuning", "bitfit")


def logits(model: Any, config: DPOConfig) -> Any:
    """Of every position of some conversations, (positions, vocabulary), in float32."""
    import torch

    found = []
    for prompt, answer in rows(config):
        with torch.no_grad():
            found.append(model.eval()(input_ids=torch.tensor([prompt + answer])).logits[0].float())
    return torch.cat(found)


def error(model: Any, trained: Any, config: DPOConfig) -> float:
    """Of a model's outputs, as a share of the trained one's."""
    right = logits(trained, config)
    return float((logits(model, config) - right).norm() / right.norm())


def load(folder: Path) -> Any:
    """As anybody would, computing in float32 so that only the weights differ."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("weights", MERGED)
def test_merged_it_gives_the_outputs_of_the_trained_model(
    weights: str,
    run_of: Callable[[str], Trained],  # noqa: F811
    tmp_path: Path,
) -> None:
    import torch
    from safetensors.torch import load_file

    run = run_of(weights)
    folder = merge(run.config.model, run.folder, tmp_path / "merged", card="# A model")
    assert error(load(folder), run.policy, run.config) < 0.005
    # Training did change them by more than that.
    assert error(load_base(run.config), run.policy, run.config) > 0.02
    # It is the base's shape in bfloat16 and says nothing of 4 bits.
    merged = load_file(folder / "model.safetensors")
    base = load_file(Path(run.config.model) / "model.safetensors")
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in base.items()}
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    shape = json.loads((folder / "config.json").read_text())
    assert shape["dtype"] == "bfloat16"
    assert "quantization_config" not in shape


@pytest.mark.parametrize("weights", ["qlora", "qdora"])
def test_merged_in_float32_it_is_the_trained_model_and_in_other_ways_it_is_not(
    weights: str,
    run_of: Callable[[str], Trained],  # noqa: F811
    tmp_path: Path,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from training.models import load_model

    run = run_of(weights)
    folder = merge(run.config.model, run.folder, tmp_path / "merged", "float32", card="")
    assert error(load(folder), run.policy, run.config) < 1e-5
    # Into the weights that were never rounded, to which the update does not belong.
    original = AutoModelForCausalLM.from_pretrained(run.config.model)
    into_original: Any = PeftModel.from_pretrained(original, str(run.folder))
    assert error(into_original.merge_and_unload(), run.policy, run.config) > 0.02
    # Rounded to 4 bits again.
    rounded: Any = PeftModel.from_pretrained(
        load_model(run.config.model, None, "qlora", "float32"), str(run.folder)
    )
    assert error(rounded.merge_and_unload(), run.policy, run.config) > 0.02


def test_what_belongs_to_the_model_comes_along(
    run_of: Callable[[str], Trained],  # noqa: F811
    model: str,
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    base = tmp_path / "base"
    shutil.copytree(model, base)
    # As published models have it, though transformers finds it odd: a temperature without sampling.
    generation = json.loads((base / "generation_config.json").read_text())
    generation |= {"do_sample": False, "temperature": 0.6, "eos_token_id": [3, 0]}
    (base / "generation_config.json").write_text(json.dumps(generation))
    folder = merge(str(base), run_of("lora").folder, tmp_path / "merged", card="# A model\n")
    assert (folder / "README.md").read_text() == "# A model\n"
    found = GenerationConfig.from_pretrained(folder)
    assert (found.eos_token_id, found.temperature) == ([3, 0], 0.6)
    ours, theirs = AutoTokenizer.from_pretrained(folder), build_tokenizer()
    asked = [{"role": "user", "content": "paint thing3"}]
    assert ours.chat_template == theirs.chat_template
    assert ours.apply_chat_template(asked) == theirs.apply_chat_template(asked)
    # Nothing of this machine.
    texts = [path.read_text() for path in folder.glob("*.json")] + ["# A model"]
    assert not any(str(tmp_path) in text for text in texts)


def test_a_merge_that_breaks_off_leaves_nothing_and_is_made_anew(
    run_of: Callable[[str], Trained],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, output = run_of("lora"), tmp_path / "merged"
    with monkeypatch.context() as patch:

        def fails(*_: Any, **__: Any) -> None:
            assert (tmp_path / "merged.part" / "model.safetensors").exists()  # it was half done
            raise OSError(28, "No space left on device")

        patch.setattr(models, "load_tokenizer", fails)
        with pytest.raises(ServiceError, match="no space left on the disk; free some"):
            merge(run.config.model, run.folder, output, card="")
    assert [path.name for path in tmp_path.iterdir()] == [".merged.lock"]
    # What a kill leaves behind.
    (tmp_path / "merged.part").mkdir()
    (tmp_path / "merged.part" / "model-00002-of-00009.safetensors").write_bytes(b"half")
    merge(run.config.model, run.folder, output, card="")
    assert not (output / "model-00002-of-00009.safetensors").exists()
    assert error(load(output), run.policy, run.config) < 0.005


def test_a_finished_merge_is_left_as_it_is_and_nothing_else_is_overwritten(
    run_of: Callable[[str], Trained],  # noqa: F811
    tmp_path: Path,
) -> None:
    run, output = run_of("lora"), tmp_path / "merged"
    merge(run.config.model, run.folder, output, card="one")
    written = (output / "model.safetensors").stat().st_mtime_ns
    merge(run.config.model, run.folder, output, card="one")
    assert (output / "model.safetensors").stat().st_mtime_ns == written
    for adapter, dtype in ((run_of("dora").folder, "bfloat16"), (run.folder, "float32")):
        with pytest.raises(InputError, match="already holds something else; name a new folder"):
            merge(run.config.model, adapter, output, dtype, card="one")  # type: ignore[arg-type]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="already holds something else"):
        merge(run.config.model, run.folder, tmp_path / "notes", card="")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("weights", ["prefix_tuning", "prompt_tuning", "bottleneck"])
def test_what_cannot_be_merged_is_refused_with_the_way_out(
    weights: str,
    run_of: Callable[[str], Trained],  # noqa: F811
    tmp_path: Path,
) -> None:
    run = run_of(weights)
    with pytest.raises(InputError, match=f"{weights}.* cannot be merged .*serve the base model"):
        merge(run.config.model, run.folder, tmp_path / "merged", card="")
    assert not list(tmp_path.iterdir())


def test_an_update_that_is_not_finite_is_not_published(
    run_of: Callable[[str], Trained],  # noqa: F811
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file, save_file

    run = run_of("lora")
    shutil.copytree(run.folder, tmp_path / "broken")
    weights = load_file(run.folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, tmp_path / "broken" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="its update is not finite"):
        merge(run.config.model, tmp_path / "broken", tmp_path / "merged", card="")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_from_elsewhere_says_what_it_was_trained_as(
    run_of: Callable[[str], Trained],  # noqa: F811
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file

    run = run_of("qlora")
    shutil.copytree(run.folder, tmp_path / "foreign")
    (tmp_path / "foreign" / "trained.json").unlink()
    merged = [
        load_file(
            merge(run.config.model, adapter, tmp_path / name, "float32", card="", **told)
            / "model.safetensors"
        )
        for name, adapter, told in (
            ("ours", run.folder, {}),
            ("told", tmp_path / "foreign", {"weights": "qlora"}),
            ("untold", tmp_path / "foreign", {}),
        )
    ]
    assert equal(merged[0], merged[1])
    assert not equal(merged[0], merged[2])


def test_a_reward_model_is_not_written_as_a_language_model(model: str, tmp_path: Path) -> None:
    for name, config in (
        ("adapter_config.json", {"peft_type": "LORA", "task_type": "SEQ_CLS"}),
        ("config.json", {"architectures": ["LlamaForSequenceClassification"]}),
    ):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        (folder / name).write_text(json.dumps(config))
        with pytest.raises(InputError, match="a reward model, and this writes language models"):
            merge(model, folder, tmp_path / "merged", card="")


def test_a_folder_that_is_neither_adapter_nor_model_is_named(model: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither an adapter nor a model; give a run's adapter"):
        merge(model, tmp_path, tmp_path / "merged", card="")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A model that vLLM can serve, and two LoRA adapters whose weights were drawn."""
    from tests.generation.tiny_model import write_adapter, write_model

    base = write_model(tmp_path_factory.mktemp("served"))
    names = {"brief": 1, "kind": 2}
    return base, {
        name: write_adapter(tmp_path_factory.mktemp(name), base, seed)
        for name, seed in names.items()
    }


PROMPTS = ["Write of the thing.", "Say it, please.", "And now something else, at length."]


@pytest.mark.slow
def test_vllm_serves_a_merged_model_as_transformers_does(
    served: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    from generation.engine import EngineConfig, EngineRuntime, Request, Sampling
    from generation.opening import open_engine
    from preferences.records import messages_from
    from tests.generation.tiny_model import Reference

    base, adapters = served
    merged = merge(
        str(base), adapters["brief"], tmp_path / "merged", "float32", card="", weights="qlora"
    )
    greedy = Sampling(temperature=0, max_tokens=24)
    requests = [Request(text, messages_from(text), greedy, None) for text in PROMPTS]
    with open_engine(EngineConfig(model=str(merged)), EngineRuntime(cpu_cache_gib=0.25)) as engine:
        found = {c.request_id: c.text for c in engine.complete(requests)}
    by_transformers, unmerged = Reference(merged), Reference(base)
    for text in PROMPTS:
        tokens = by_transformers.greedy(text, 24)
        assert found[text] == by_transformers.decode(tokens)
        assert tokens != unmerged.greedy(text, 24)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_vllm_switches_adapters_on_one_base_by_name(
    served: tuple[Path, dict[str, Path]],
) -> None:
    pytest.importorskip("vllm")
    from tests.generation.tiny_model import Reference

    base, adapters = served
    models = {str(base): Reference(base)}
    models |= {name: Reference(base, adapter) for name, adapter in adapters.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    options += ["--kv-cache-memory-bytes", str(2**28)]
    # As `vllm serve`, which the build for CPUs does not start.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*server, *vllm_arguments(str(base), adapters), *options],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        )
        try:
            while not is_up(port):
                log.seek(0)
                assert process.poll() is None, log.read()[-3000:].decode()
                time.sleep(1)
            for text in PROMPTS:
                said = {
                    name: greedy_tokens(port, name, model.prompt(text))
                    for name, model in models.items()
                }
                expected = {name: model.greedy(text, 24) for name, model in models.items()}
                assert said == expected
                assert len(set(map(tuple, said.values()))) == 3
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def greedy_tokens(port: int, model: str, prompt: list[int]) -> list[int]:
    # Not the text, whose last character may want another byte.
    body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0}
    body["return_token_ids"] = True
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked) as reply:
        return list(json.loads(reply.read())["choices"][0]["token_ids"])


def test_what_vllm_would_serve_wrongly_is_not_handed_to_it(
    run_of: Callable[[str], Trained],  # noqa: F811
    model: str,
) -> None:
    lora = run_of("lora").folder
    arguments = vllm_arguments(model, {"a": lora, "b": lora})
    assert arguments[0] == model
    # Rank 4 fits into the smallest room that vLLM has.
    assert " ".join(arguments[1:6]) == "--enable-lora --max-loras 2 --max-lora-rank 8"
    assert arguments[6:] == ["--lora-modules", f"a={lora}", f"b={lora}"]
    for weights in ("dora", "qlora", "ia3"):
        with pytest.raises(InputError, match=f"odd: vLLM takes .* this one has {weights}; merge"):
            vllm_arguments(model, {"fits": lora, "odd": run_of(weights).folder})
