"""Loading what training starts from, and saying what is wrong with it before hours are spent."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from preferences.errors import InputError, MissingExtra
from training import processes

Weights = Literal[
    "full",
    "lora",
    "dora",
    "qlora",
    "qdora",
    "prefix_tuning",
    "prompt_tuning",
    "ia3",
    "bottleneck",
    "bitfit",
    "ln_tuning",
]
"""What trains; `training.adapters` says how, docs/weights.md when to take which."""
Dtype = Literal["float32", "bfloat16", "float16"]

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")

TRAINED = "trained.json"
"""In a folder with an adapter: what it was trained on, which its own files do not tell."""


def has_adapter(weights: Weights) -> bool:
    """Whether what trains can be switched off, so that the model then is its own reference.

    Where it cannot, the reference's log-probabilities are computed before training.
    """
    return weights not in ("full", "bitfit")


def is_quantised(weights: Weights) -> bool:
    """Whether the base model is held in 4 bits."""
    return weights in ("qlora", "qdora")


def saved_folder(weights: Weights) -> str:
    """The folder inside a run's that the trained weights go to: a whole `model`, or an `adapter`,
    which is what has to be put onto the base model."""
    return "model" if weights == "full" else "adapter"


def require_libraries(weights: Weights, report_to: str) -> None:
    """Raises MissingExtra if a library that this run needs is not installed."""
    needed = (*LIBRARIES, "bitsandbytes") if is_quantised(weights) else LIBRARIES
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise MissingExtra(
            f"report_to: {report_to} needs: pip install {report_to}; or say report_to: none"
        )
    if missing:
        raise MissingExtra(
            f"{weights} training needs {', '.join(missing)}: pip install pairwright[train]"
        )


def require_dtype(dtype: Dtype, method: str, weights: Weights) -> None:
    """Raises InputError if `method` cannot train `weights` in `dtype` here.

    With float16, what trains is held in float32 and the loss is scaled, or its gradients would be
    too small for the numbers that there are.
    """
    import torch

    if dtype != "float16":
        return
    if method in processes.WITH_ROLLOUTS:
        raise InputError(
            f"dtype: float16 needs a scaled loss, and {method} has none; say bfloat16 or float32"
        )
    if weights in ("bitfit", "ln_tuning"):
        raise InputError(
            f"dtype: float16 cannot be sampled with weights: {weights}, which are float32 amid the "
            "base's; say bfloat16 or float32"
        )
    if not torch.cuda.is_available():
        raise InputError("dtype: float16 trains on a GPU alone; say bfloat16 or float32")


def load_tokenizer(model: str, revision: str | None, chats: bool = True) -> Any:
    """The model's tokenizer, able to pad and, with `chats`, to render a conversation."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: no tokenizer can be loaded ({_first_line(error)})") from None
    if chats and not tokenizer.chat_template:
        raise InputError(
            f"{model}: its tokenizer has no chat template, so conversations cannot become tokens; "
            "start from a model fine-tuned on chats, or put chat_template.jinja beside the weights"
        )
    if tokenizer.pad_token is None:
        # Padding is masked by length wherever it is used here, so the end token may fill the gaps.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_tokens(model: str, revision: str | None, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's and those of the model's generation config."""
    from transformers import GenerationConfig

    ends = {tokenizer.eos_token_id}
    try:
        more = GenerationConfig.from_pretrained(model, revision=revision or "main").eos_token_id
    except OSError:
        more = None  # old models have no generation config
    ends |= set(more) if isinstance(more, list) else {more}
    ends.discard(None)
    if not ends:
        raise InputError(f"{model}: neither tokenizer nor generation config names an end token")
    return frozenset(ends)


def load_model(model: str, revision: str | None, weights: Weights, dtype: Dtype) -> Any:
    """The causal language model to train, on this process's device.

    Full weights are held in float32 whatever `dtype` computes in: an update of one millionth of a
    weight is lost in bfloat16, which keeps three digits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if torch.cuda.device_count() > 1 and processes.count() == 1:
        raise InputError(
            f"{torch.cuda.device_count()} GPUs are visible and training runs on one; say "
            f"processes: {torch.cuda.device_count()}, or set CUDA_VISIBLE_DEVICES to the one to use"
        )
    if torch.cuda.is_available() and dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise InputError("dtype: this GPU has no bfloat16; say dtype: float16")
    options: dict[str, Any] = {"dtype": torch.float32 if weights == "full" else dtype}
    if is_quantised(weights):
        from training.quantization import nf4

        # The process's own GPU, which `processes.join` made the current one.
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        options |= {"quantization_config": nf4(dtype), "device_map": {"": device}}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, revision=revision, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: cannot be loaded ({_first_line(error)})") from None
    _keep_generation_config(loaded)
    return loaded


def save_model(policy: Any, tokenizer: Any, weights: Weights, dtype: Dtype, folder: Path) -> None:
    """What trained (with full weights the whole model) and tokenizer, whole or not at all.

    All processes call it, each with its part of the weights, and the main one writes.
    """
    state = _state(policy, weights)
    if processes.is_main():
        _write_model(policy, state, tokenizer, weights, dtype, folder)
    processes.wait()


def _state(policy: Any, weights: Weights) -> dict[str, Any] | None:
    """All weights, or what trains of a model that is divided, or None: peft knows which. Where the
    model is divided, each tensor is put together, for the main process alone."""
    divided = any(processes.is_part(p) for p in policy.parameters())
    if not divided:
        return dict(policy.state_dict()) if weights == "full" else None
    train = {name for name, p in policy.named_parameters() if p.requires_grad}
    state = {}
    for name, tensor in policy.state_dict().items():
        if weights == "full" or name in train:
            put_together = processes.whole(tensor)
            if processes.is_main():
                state[name] = put_together.cpu()
    return state


def _write_model(
    policy: Any,
    state: dict[str, Any] | None,
    tokenizer: Any,
    weights: Weights,
    dtype: Dtype,
    folder: Path,
) -> None:
    import torch

    from training.saved_adapters import save_biases

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    if weights == "full":
        assert state is not None
        # Computed in `dtype`, published in it: the float32 digits only mattered to the updates.
        kind = getattr(torch, dtype)
        rounded = {name: tensor.to(kind) for name, tensor in state.items()}
        policy.save_pretrained(part, state_dict=rounded)
    else:
        if weights == "bitfit":
            save_biases(policy, part)
        else:
            policy.save_pretrained(part, save_embedding_layers=False, state_dict=state)
        trained = {"weights": weights, "dtype": dtype}
        (part / TRAINED).write_text(json.dumps(trained) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, transformers, trl and datasets say only what is an error.

    Their bars and hints would bury our one line per log; what matters of them is checked or counted
    by our own code. Usage pings to the Hub are off as well.
    """
    import datasets
    import transformers
    from huggingface_hub import constants

    log: Any = transformers.logging
    verbosity = log.get_verbosity()
    bars = log.is_progress_bar_enabled()
    dataset_bars = datasets.are_progress_bars_disabled()
    telemetry = constants.HF_HUB_DISABLE_TELEMETRY
    log.set_verbosity_error()
    log.disable_progress_bar()
    datasets.disable_progress_bars()
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        with warnings.catch_warnings():
            # peft looks for the base model's config on the Hub each time it saves, and says so.
            warnings.filterwarnings("ignore", message="Could not find a config file in")
            # It says so of every normalisation layer, all of which it copies well.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            # Virtual tokens: `training.adapters` numbers the positions that peft drops.
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
        if not dataset_bars:
            datasets.enable_progress_bars()
        constants.HF_HUB_DISABLE_TELEMETRY = telemetry


def _keep_generation_config(model: Any) -> None:
    """Let the model be saved with the generation config it was published with.

    transformers loads one that sets a temperature and no sampling, as many models do, and refuses
    to save it: at the first checkpoint, or when hours of training are done.
    """
    from transformers import GenerationConfig

    class AsPublished(GenerationConfig):
        def validate(self, *_: Any, **__: Any) -> None:
            """Every value was somebody's choice."""

    if model.generation_config is not None:
        model.generation_config.__class__ = AsPublished


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
