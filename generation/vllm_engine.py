"""vLLM itself, as it runs in the child process that `generation.vllm_process` starts.

The child is the leader of a session of its own, and kills all of it as soon as its connection or
its parent is gone, even if the parent was killed outright: no process and no GPU stays taken.

CPU and GPU builds run by the same code. vLLM is imported in this file only, and inside functions:
whoever imports the file does not wait for it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from generation.chat import Chat, PromptRefused, too_long
from generation.engine import (
    Completion,
    EngineConfig,
    EngineRuntime,
    Request,
    TokenCompletion,
    TokenRequest,
)
from generation.vllm_process import listen
from preferences.errors import InputError


def serve(descriptor: int, parent: int) -> None:
    """Answer what comes over the connection until it, or the parent, is gone."""
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, parent, inbox), daemon=True).start()
    server: _Server | None = None
    try:
        server = _Server(*inbox.get())
        connection.send(("ready", server.window))
        while True:
            message = inbox.get() if inbox.qsize() or server.is_idle else ()
            if message is None:
                break
            done: list[tuple[int, Completion]] = []
            if message:
                call, requests = message
                if requests is None:
                    server.abort(call)
                    continue
                try:
                    done = server.add(call, requests)
                except InputError as error:
                    server.abort(call)
                    connection.send(("refused", (call, str(error))))
                if inbox.qsize():
                    # As many requests as there are join the batch before its next step.
                    _tell(connection, done)
                    continue
            _tell(connection, done + server.step())
    except InputError as error:
        connection.send(("refused", (-1, str(error))))
    except Exception as error:
        import traceback

        traceback.print_exc()
        with suppress(OSError):
            connection.send(("down", f"{type(error).__name__}: {' '.join(str(error).split())}"))
    finally:
        with suppress(Exception):
            if server is not None:
                server.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os.killpg(0, signal.SIGKILL)


def _tell(connection: Connection, done: list[tuple[int, Completion]]) -> None:
    if done:
        connection.send(("done", done))


class _Server:
    """vLLM's engine, and which request of which call each of its requests is."""

    def __init__(self, config: EngineConfig, runtime: EngineRuntime) -> None:
        arguments: dict[str, Any] = {}
        if config.adapter is not None:
            arguments = {"enable_lora": True, "max_lora_rank": _lora_rank(config.adapter)}
        arguments |= {
            "model": config.model,
            "revision": config.revision,
            "tokenizer_revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
            "dtype": _dtype(config),
            "max_model_len": config.max_length,
            "tensor_parallel_size": runtime.tensor_parallel,
            "gpu_memory_utilization": runtime.memory_share,
            "disable_log_stats": True,
        }

        # After what can fail at once: this takes ten seconds.
        from vllm.engine.arg_utils import EngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        self._lora = LoRARequest("adapter", 1, config.adapter) if config.adapter else None
        if current_platform.is_cpu():
            arguments |= _on_cpu(runtime)
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS
        )
        self._chat = Chat(self._engine.get_tokenizer(), config.model)
        self._tokenizer = self._engine.get_tokenizer()
        self._context = int(self._engine.model_config.max_model_len)
        self._version = 0
        self._numbers = itertools.count()
        self._asked: dict[str, tuple[int, Request | TokenRequest, list[int]]] = {}
        self.window = 2 * int(self._engine.vllm_config.scheduler_config.max_num_seqs)

    @property
    def is_idle(self) -> bool:
        return not self._asked

    def add(
        self, call: int, requests: list[Request | TokenRequest]
    ) -> list[tuple[int, Completion]]:
        """Have the requests join the batch; returns those that failed at once.

        Raises InputError for choices that are not one token each.
        """
        failed = []
        for request in requests:
            failure = self._add(call, request)
            if failure is not None:
                failed.append((call, Completion(request.request_id, "", "failed", failure=failure)))
        return failed

    def step(self) -> list[tuple[int, Completion]]:
        """One token more for everything in the batch; returns what is finished by it."""
        if self.is_idle:
            return []
        done = []
        for output in self._engine.step():
            if output.finished:
                call, request, choices = self._asked.pop(output.request_id)
                done.append((call, self._completion(request, choices, output)))
        return done

    def abort(self, call: int) -> None:
        """Forget the requests of a call that nobody waits for any more."""
        dropped = [number for number, (of, _, _) in self._asked.items() if of == call]
        for number in dropped:
            del self._asked[number]
        self._engine.abort_request(dropped)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _add(self, call: int, request: Request | TokenRequest) -> str | None:
        if isinstance(request, TokenRequest):
            return self._start(
                call, request, [], request.tokens, _drawing(request), self._newest(request.version)
            )
        try:
            prompt = self._chat.prompt(request.messages)
        except PromptRefused as error:
            return str(error)
        failure = too_long(len(prompt), self._context)
        if failure is not None:
            return failure
        choices: list[int] = []
        if request.choices:
            choices = self._chat.choice_tokens(request.messages, request.choices)
        params = _sampling_params(request, choices)
        return self._start(call, request, choices, prompt, params, self._lora)

    def _newest(self, version: int) -> Any:
        """The adapter, as its folder holds it now: vLLM reads it whenever its number is new."""
        from vllm.lora.request import LoRARequest

        if self._lora is None:
            raise InputError("a request in tokens needs an engine with an adapter; name one")
        if version != self._version:
            self._version = version
            self._lora = LoRARequest(f"version {version}", version, self._lora.lora_path)
        return self._lora

    def _start(
        self,
        call: int,
        request: Request | TokenRequest,
        choices: list[int],
        prompt: Sequence[int],
        params: Any,
        lora: Any,
    ) -> str | None:
        from vllm.inputs.engine import tokens_input

        number = str(next(self._numbers))
        self._asked[number] = (call, request, choices)
        try:
            self._engine.add_request(number, tokens_input(list(prompt)), params, lora_request=lora)
        except ValueError as error:
            del self._asked[number]
            return " ".join(str(error).split())
        return None

    def _completion(
        self, request: Request | TokenRequest, choices: list[int], output: Any
    ) -> Completion:
        reply = output.outputs[0]
        tokens = list(reply.token_ids)
        if isinstance(request, TokenRequest):
            return TokenCompletion(
                request.request_id,
                "",
                reply.finish_reason if reply.finish_reason in ("stop", "length") else "failed",
                tokens=tuple(tokens),
            )
        text, reason, failure, probs = reply.text, reply.finish_reason, None, None
        if reason not in ("stop", "length"):
            text, reason, failure = "", "failed", f"vLLM gave up: {reason}"
        elif choices:
            text, reason = request.choices[choices.index(tokens[0])], "stop"
            first = reply.logprobs[0]
            probs = tuple(math.exp(first[token].logprob) for token in choices)
        elif not request.sampling.stop:
            # The end token belongs to the turn, not to the text.
            spoken = tokens[:-1] if reason == "stop" else tokens
            text = self._tokenizer.decode(spoken, skip_special_tokens=True)
        return Completion(
            request.request_id,
            text,
            reason,
            prompt_tokens=len(output.prompt_token_ids),
            completion_tokens=len(tokens),
            logprob=reply.cumulative_logprob,
            choice_probs=probs,
            failure=failure,
        )


def _sampling_params(request: Request, choices: list[int]) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    common: dict[str, Any] = {
        "output_kind": RequestOutputKind.FINAL_ONLY,
        # It is made for this request alone.
        "skip_clone": True,
    }
    if choices:
        # vLLM masks after it has taken these log-probabilities, so they are the model's own,
        # also those of choices far from the top.
        return SamplingParams(
            temperature=0,
            max_tokens=1,
            allowed_token_ids=choices,
            logprob_token_ids=choices,
            detokenize=False,
            **common,
        )
    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop),
        # vLLM wants 64 bits, and takes -1 for none.
        seed=None if request.seed is None else request.seed % 2**63,
        # The sampled token's log-probability and no other. Kept flat, and with the text decoded
        # once at the end, it costs nothing that can be measured; as dicts and with every token
        # decoded by itself it halves the speed of a small model.
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        **common,
    )


def _drawing(request: TokenRequest) -> Any:
    """From the whole distribution, whatever the model's own files say of ends."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=request.sampling.temperature,
        max_tokens=request.sampling.max_tokens,
        seed=request.seed % 2**63,
        stop_token_ids=list(request.ends),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def _on_cpu(runtime: EngineRuntime) -> dict[str, Any]:
    if runtime.tensor_parallel == 1:
        # This process is the engine's own already; another inside it starts 20 s later.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(runtime.cpu_cache_gib * 2**30),
        # When a prompt is computed in parts, vLLM samples after each part, throws the token away
        # and turns the request's random generator back by an offset, which a CPU generator has
        # not ("CPU Generator does not use offset", gpu_model_runner._bookkeeping_sync). Whole
        # prompts never need that; they need a batch with room for the longest one, which
        # vLLM then makes by itself.
        "enable_chunked_prefill": False,
    }


def _dtype(config: EngineConfig) -> str:
    """The numbers to compute with: vLLM's own `auto` would take bfloat16 for a float32 model."""
    if config.dtype != "auto":
        return config.dtype
    from transformers import PretrainedConfig

    named, _ = PretrainedConfig.get_config_dict(config.model, revision=config.revision)
    named = named.get("text_config", {}) | named
    dtype = named.get("dtype") or named.get("torch_dtype")
    return str(dtype) if dtype in ("float32", "float16", "bfloat16") else "auto"


def _lora_rank(adapter: str) -> int:
    """The smallest rank vLLM has room for that holds the adapter's."""
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        raise InputError(f"{adapter}: no adapter_config.json; name a folder with a LoRA adapter")
    config = json.loads(path.read_text())
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    for room in (8, 16, 32, 64, 128, 256, 320, 512):
        if max(ranks) <= room:
            return room
    raise InputError(f"{adapter}: rank {max(ranks)}; vLLM takes at most 512, so merge it")
