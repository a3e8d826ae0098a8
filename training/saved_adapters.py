"""What a run saved of an adapter, and putting it onto a base again: one, or several by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preferences.errors import InputError
from training.adapters import biases, count_positions_by_mask

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def load_trained(model: Any, folder: Path) -> Any:
    """A loaded base with what a run saved in its `adapter` folder, as the run left it."""
    if saved_config(folder)["peft_type"] == "BITFIT":
        return _with_biases(model, folder)
    return load_adapters(model, {"default": folder})


def load_adapters(model: Any, folders: Mapping[str, Path]) -> Any:
    """One base with several adapters of one kind, of which the first is on.

    `model.set_adapter("name")` switches to another, and `reference(model)` to none.
    """
    import peft
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    import training.bottleneck  # noqa: F401  # makes the kind known to peft

    base_names = {part for name, _ in model.named_parameters() for part in name.split(".")}
    kinds = {name: saved_config(folder)["peft_type"] for name, folder in folders.items()}
    if "BITFIT" in kinds.values() or len(set(kinds.values())) > 1:
        found = ", ".join(f"{name} is {kind.lower()}" for name, kind in kinds.items())
        raise InputError(f"adapters on one base have to be of one kind of adapter; {found}")
    if "PROMPT_TUNING" in kinds.values():
        count_positions_by_mask(model)
    adapted: Any = None
    for name, folder in folders.items():
        if "." in name or name in base_names:
            raise InputError(f"{name}: an adapter cannot be called so here; choose another name")
        config: Any = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        if adapted is None:
            adapted = peft.get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
        # Before the weights come: a layer that peft copied from a bfloat16 base would round them.
        for parameter in _of_adapter(adapted, name).values():
            parameter.data = parameter.data.float()
        saved = load_peft_weights(str(folder), device=str(model.device))
        if len(saved) != len(_of_adapter(adapted, name)):
            raise InputError(
                f"{folder}: its {ADAPTER_FILE} does not fit this base model; give the model that "
                "the adapter was trained on"
            )
        set_peft_model_state_dict(adapted, saved, adapter_name=name)
    adapted.set_adapter(next(iter(folders)))
    return adapted.requires_grad_(False).eval()


def save_biases(model: Any, folder: Path) -> None:
    """The biases alone, by their names in the model; what BitFit changed."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: bias.detach().cpu().contiguous() for name, bias in biases(model).items()}
    save_file(kept, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = {"peft_type": "BITFIT", "base_model_name_or_path": model.name_or_path}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _with_biases(model: Any, folder: Path) -> Any:
    from safetensors.torch import load_file

    saved = load_file(folder / ADAPTER_FILE)
    ours = biases(model)
    if {n: b.shape for n, b in ours.items()} != {n: b.shape for n, b in saved.items()}:
        raise InputError(
            f"{folder}: its biases are not those of this base model; give the model that they were "
            "trained on"
        )
    for name, bias in ours.items():
        bias.data = saved[name].to(bias.device)
    return model.requires_grad_(False).eval()


def saved_config(folder: Path) -> dict[str, Any]:
    """peft's description of what is in a folder; raises InputError where there is none."""
    try:
        config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{folder}: no readable {ADAPTER_CONFIG} in it; give a run's adapter folder"
        ) from None
    return config


def _of_adapter(model: Any, name: str) -> dict[str, Any]:
    return {n: p for n, p in model.named_parameters() if f".{name}." in f".{n}."}
