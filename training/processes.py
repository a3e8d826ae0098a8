"""Training in several processes, one a GPU: all run the same code and take the same steps.

Each finds its place in the environment, by the names that torchrun gives. Accelerate wraps the
model and averages gradients; here is what it leaves open: the first process, the main one, writes
the run's folder, finds out what does not follow from the weights alone, and tells the others.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from preferences.config import Config
from preferences.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from training.run import TrainingRuntime
    from training.settings import TrainingConfig

Found = TypeVar("Found")
Given = ParamSpec("Given")

WITH_ROLLOUTS = ("ppo", "rloo", "grpo")
"""Methods that learn from answers of their own and train in one process."""

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: a judge may be slow, and one that dies ends them all."""

FROM_THE_RECIPE = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}
"""What DeepSpeed's configuration says again: transformers fills it in."""


class FSDPConfig(Config):
    """How weights, gradients and the optimizer's state are divided among processes by FSDP2."""

    reshard_after_forward: bool = True
    """Gather each layer's weights anew for the backward pass; false keeps them from the forward
    pass on, which is faster and takes the memory of the whole weights."""
    cpu_offload: bool = False
    """Keep what a process holds in the host's memory while it is not used."""


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and decides; true where there is but one."""
    return int(os.environ.get("RANK", "0")) == 0


def why_not(config: TrainingConfig, runtime: TrainingRuntime) -> str | None:
    """Why several processes cannot train this to the weights that one would, with a cure; None
    where they can."""
    processes = runtime.processes
    if runtime.fsdp is not None and runtime.deepspeed is not None:
        return "fsdp and deepspeed both divide the model; give one"
    if processes == 1:
        if runtime.fsdp is not None or runtime.deepspeed is not None:
            key = "fsdp" if runtime.fsdp is not None else "deepspeed"
            return f"{key} divides a model among processes, and processes is 1; say how many"
        return None
    if config.method in WITH_ROLLOUTS:
        return f"processes: {processes}, but {config.method} trains in one; say processes: 1"
    if config.batch_size % processes:
        nearest = -(-config.batch_size // processes) * processes
        return (
            f"processes: {processes} cannot share out batches of {config.batch_size}; say "
            f"batch_size: {nearest}"
        )
    if getattr(config, "loss", "").startswith("aot"):
        return "processes: the loss aot sorts a whole batch, which one process has to hold; say 1"
    if config.batch_tokens is not None:
        return "processes: each would cut other batches by batch_tokens; leave one of the two out"
    if runtime.fsdp is not None and config.weights not in ("full", "lora", "dora"):
        return f"fsdp: weights: {config.weights} cannot be divided; leave fsdp out, or say lora"
    stage = (runtime.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)
    if stage == 3:
        return "deepspeed: ZeRO-3 is not known here; fsdp: {} divides the same"
    return None


def join(config: TrainingConfig, runtime: TrainingRuntime) -> None:
    """Meet the other processes, where there are any.

    Raises InputError or MissingExtra where they cannot train this together here.
    """
    reason = why_not(config, runtime)
    if reason is not None:
        raise InputError(reason)
    if count() != runtime.processes:
        raise InputError(
            f"processes: {runtime.processes}, and {count()} started; `pairwright run` starts them, "
            f"and so does torchrun --nproc-per-node {runtime.processes}"
        )
    if runtime.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        raise MissingExtra("deepspeed needs: pip install deepspeed; or say fsdp: {} in its place")
    if count() == 1:
        return
    import torch

    gpus = torch.cuda.device_count()
    require_gpus(runtime, gpus)
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if gpus else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE)


def require_gpus(runtime: TrainingRuntime, gpus: int) -> None:
    """Raises InputError if so many GPUs are too few for the processes of this machine; none at all
    is the CPU."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count()))
    if 0 < gpus < here:
        raise InputError(f"processes: {here}, and {gpus} GPUs are visible; each needs one")
    if not gpus and runtime.sharding != "ddp":
        # Accelerate would go on without a word, and divide nothing.
        raise InputError("fsdp and deepspeed need GPUs; leave them out to train on the CPU")


def from_main(find: Callable[[], Found]) -> Found:
    """What `find` gives in the main process; the others do not call it and are told."""
    if count() == 1:
        return find()
    import torch

    told: list[Any] = [find() if is_main() else None]
    torch.distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    found: Found = told[0]
    return found


def by_main(write: Callable[Given, None]) -> Callable[Given, None]:
    """`write`, which in the other processes does nothing."""

    @functools.wraps(write)
    def written(*args: Given.args, **values: Given.kwargs) -> None:
        if is_main():
            write(*args, **values)

    return written


def wait() -> None:
    """Until every process has come here."""
    if count() > 1:
        import torch

        torch.distributed.barrier()


def arguments(runtime: TrainingRuntime) -> dict[str, Any]:
    """For transformers' TrainingArguments, as keywords; nothing where one process trains."""
    found: dict[str, Any] = {}
    if runtime.fsdp is not None:
        again, offload = runtime.fsdp.reshard_after_forward, runtime.fsdp.cpu_offload
        told = {"version": 2, "reshard_after_forward": again, "cpu_offload": offload}
        found |= {"fsdp": True, "fsdp_config": told}
    if runtime.deepspeed is not None:
        found["deepspeed"] = {**FROM_THE_RECIPE, **runtime.deepspeed}
    return found


def is_part(tensor: Any) -> bool:
    """Whether every process holds a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """A tensor of which every process may hold a part; all of them have to ask for it."""
    return tensor.full_tensor() if is_part(tensor) else tensor
