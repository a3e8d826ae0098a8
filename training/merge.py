"""What a trained adapter is served as: with its base as one ordinary model, or beside others.

An adapter trained on 4 bits fits the rounded weights and no others. Into the original ones merged,
outputs are 9 % off the trained model's; merged and rounded again, the update is mostly lost. So the
rounded weights are made ordinary numbers first, the update is added to them in float32, and the sum
is kept in 16 bits, which is off by less than 0.5 %.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from preferences.errors import InputError
from preferences.fingerprint import fingerprint
from preferences.store import full_disk_explained
from preferences.tables import folder_fingerprint
from training import models
from training.adapters import NOT_MERGED
from training.models import TRAINED, Dtype, Weights
from training.run import model_fingerprint
from training.saved_adapters import ADAPTER_CONFIG, load_trained, saved_config

LINEAGE = "lineage.json"
"""In a merged model's folder: what it was made of."""


def merge(
    model: str,
    adapter: Path,
    output: Path,
    dtype: Dtype = "bfloat16",
    *,
    card: str,
    revision: str | None = None,
    weights: Weights | None = None,
) -> Path:
    """Write `model` with what the folder `adapter` has on it to `output`, as safetensors in `dtype`
    with tokenizer, chat template, generation config and `card` as README.md; returns `output`.

    `adapter` is a run's `adapter` folder, or its `model` folder, which is only written anew.
    `weights` is what an adapter from elsewhere was trained as; runs of ours have it written down.
    The folder appears whole or not at all. Called again, a finished one is left as it is and an
    unfinished one is made anew. Raises InputError where the adapter cannot be merged, does not fit
    the model, or `output` holds something else.
    """
    kind, trained, computed = _what(adapter, weights, dtype)
    models.require_libraries(trained, "none")
    lineage = {
        "model": model_fingerprint(model, revision),
        "adapter": folder_fingerprint(adapter),
        "weights": trained,
        "dtype": dtype,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.with_name(f".{output.name}.lock")):
        if _is_there(output, lineage):
            return output
        part = output.with_name(output.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        with models.quiet_libraries(), full_disk_explained(output, "nothing was written"):
            try:
                source = model
                if kind is None:
                    merged = models.load_model(str(adapter), None, "full", dtype)
                    source = str(adapter)
                else:
                    merged = _merged(model, revision, adapter, trained, computed, dtype)
                _write(merged, dtype, adapter, source, revision, part)
                (part / "README.md").write_text(card, encoding="utf-8")
                written = {"fingerprint": fingerprint(lineage), **lineage}
                (part / LINEAGE).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
                part.rename(output)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return output


def vllm_arguments(model: str, adapters: Mapping[str, Path]) -> list[str]:
    """For `vllm serve`: one base with several LoRA adapters, each of which a request asks for by
    its name as `model`.

    Raises InputError for what vLLM cannot put on, or would put on weights it was not trained on.
    """
    ranks = []
    for name, folder in adapters.items():
        kind, trained, _ = _what(folder, None, "bfloat16")
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")) if kind else {}
        if kind != "LORA" or config["use_dora"] or models.is_quantised(trained):
            raise InputError(
                f"{name}: vLLM takes adapters with weights: lora as they are, and this one has "
                f"{trained}; merge it and serve the merged model"
            )
        ranks.append(config["r"])
    # vLLM has room for these ranks only.
    rooms = [room for room in (8, 16, 32, 64, 128, 256, 320, 512) if room >= max(ranks)]
    if not rooms:
        raise InputError(f"rank {max(ranks)}: vLLM takes at most 512; merge that adapter")
    served = [f"{name}={folder}" for name, folder in adapters.items()]
    room = ["--max-loras", str(len(served)), "--max-lora-rank", str(rooms[0])]
    return [model, "--enable-lora", *room, "--lora-modules", *served]


def check_served(adapter: Path, engine: str) -> None:
    """Whether `vllm` or `transformers` can put on what a folder has, on weights like those that it
    was trained on. Raises InputError where not."""
    config, told = saved_config(adapter), _trained_as(adapter)
    name = str(config["peft_type"]).lower()
    if told is not None and models.is_quantised(told[0]):
        raise InputError(
            f"{adapter}: {told[0]} fits a base in 4 bits, and engines put it on one in 16; merge "
            "it and name the merged model"
        )
    if name == "bitfit":
        raise InputError(
            f"{adapter}: biases, which no engine puts on; merge it and name the merged model"
        )
    if engine == "vllm" and (name != "lora" or config.get("use_dora")):
        found = told[0] if told else "dora" if config.get("use_dora") else name
        cure = "say engine: transformers" if name in NOT_MERGED else "merge it and name that model"
        raise InputError(f"{adapter}: vLLM puts on LoRA alone, and this is {found}; {cure}")


def _what(
    adapter: Path, weights: Weights | None, dtype: Dtype
) -> tuple[str | None, Weights, Dtype]:
    """peft's name of an adapter's kind, or None for a whole model; what it was trained as; and the
    numbers it was trained in."""
    places = [adapter / name for name in (ADAPTER_CONFIG, "config.json")]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise InputError(f"{adapter}: neither an adapter nor a model; give a run's adapter folder")
    config = json.loads(found.read_text(encoding="utf-8"))
    made = " ".join(config.get("architectures") or [])
    if config.get("task_type") == "SEQ_CLS" or "SequenceClassification" in made:
        raise InputError(
            f"{adapter}: a reward model, and this writes language models; its run's model folder "
            "has it merged"
        )
    if found.name == "config.json":
        return None, "full", dtype
    kind = config["peft_type"]
    if kind.lower() in NOT_MERGED:
        putting_on = "training.saved_adapters.load_trained" if kind == "BOTTLENECK" else "peft"
        raise InputError(
            f"{adapter}: {kind.lower()} cannot be merged ({NOT_MERGED[kind.lower()]}); publish the "
            "adapter folder itself (hf upload), and serve the base model with it by transformers "
            f"and {putting_on}"
        )
    return kind, *(_trained_as(adapter) or (weights or "lora", dtype))


def _trained_as(adapter: Path) -> tuple[Weights, Dtype] | None:
    """What a run of ours says of the adapter it left; None of one from elsewhere."""
    told = adapter / TRAINED
    if not told.exists():
        return None
    trained = json.loads(told.read_text(encoding="utf-8"))
    return trained["weights"], trained["dtype"]


def _is_there(output: Path, lineage: dict[str, str]) -> bool:
    if not output.exists():
        return False
    try:
        found = json.loads((output / LINEAGE).read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError):
        found = None
    if found != fingerprint(lineage):
        raise InputError(f"{output}: already holds something else; name a new folder")
    return True


def _merged(
    model: str,
    revision: str | None,
    adapter: Path,
    trained: Weights,
    computed: Dtype,
    dtype: Dtype,
) -> Any:
    """The base with the adapter's update in its weights."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    from training.quantization import dequantised

    base = models.load_model(model, revision, trained, computed)
    if models.is_quantised(trained):
        base = dequantised(base)
    policy = load_trained(base, adapter)
    if trained == "bitfit":
        return policy
    # One layer at a time: all of them in float32 would need twice the memory of the result.
    for layer in policy.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.get_base_layer().to(torch.float32)
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:
                raise InputError(
                    f"{adapter}: its update is not finite ({error}); train again with a lower "
                    "learning_rate"
                ) from None
            layer.get_base_layer().to(getattr(torch, dtype))
    return policy.unload()


def _write(
    merged: Any, dtype: Dtype, adapter: Path, source: str, revision: str | None, part: Path
) -> None:
    import torch

    merged.to(getattr(torch, dtype)).save_pretrained(part)
    has_tokenizer = (adapter / "tokenizer_config.json").exists()
    tokenizer = (
        models.load_tokenizer(str(adapter), None, chats=False)
        if has_tokenizer
        else models.load_tokenizer(source, revision, chats=False)
    )
    tokenizer.save_pretrained(part)
