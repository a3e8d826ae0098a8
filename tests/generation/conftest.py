from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.generation.tiny_model import write_adapter, write_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only get in each other's way with a model as small as ours."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of random weights, its tokenizer and chat template."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a LoRA adapter for the tiny model."""
    return write_adapter(tmp_path_factory.mktemp("adapter"), tiny_model)
