"""vLLM as it really runs. A start takes ten seconds and more, so there are three."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from generation.engine import Completion, EngineConfig, EngineRuntime, Request, Sampling
from generation.opening import open_engine
from generation.vllm_process import VLLMEngine
from preferences.errors import InputError, ServiceError
from preferences.records import messages_from
from tests.generation.tiny_model import CONTEXT, Reference

pytest.importorskip("vllm")

RUNTIME = EngineRuntime(cpu_cache_gib=0.25)
# Together more tokens than vLLM computes in one step, so that some prompts have to wait.
PROMPTS = [f"{i}: " + "write of the thing " * (3 + i % 7) for i in range(120)]


def request(text: str, seed: int | None = None, **sampling: object) -> Request:
    return Request(text, messages_from(text), Sampling.model_validate(sampling), seed)


def sampled(count: int) -> list[Request]:
    return [request(text, seed, max_tokens=12) for seed, text in enumerate(PROMPTS[:count])]


def answers(engine: VLLMEngine, requests: list[Request]) -> dict[str, Completion]:
    return {c.request_id: c for c in engine.complete(requests)}


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Reference:
    return Reference(tiny_model)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[VLLMEngine]:
    with open_engine(EngineConfig(model=str(tiny_model)), RUNTIME) as opened:
        assert isinstance(opened, VLLMEngine)
        yield opened
    assert is_gone(opened.pid)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, and with it all of the session that it leads."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, after_name = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, session = after_name.split()[:4]
        if int(session) == pid and state != "Z":
            return False
    return True


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return is_gone(pid)


def test_importing_the_engine_module_imports_none_of_the_heavy_packages():
    code = (
        "import sys, generation.engine, generation.opening, generation.vllm_engine;"
        "print({'torch', 'vllm', 'openai', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_a_seed_gives_the_same_reply_in_another_batch_and_order(engine):
    all_at_once = answers(engine, sampled(120))
    assert len({c.text for c in all_at_once.values()}) > 110
    few = answers(engine, sampled(120)[:9][::-1])
    alone = answers(engine, sampled(120)[5:6])
    for other in (few, alone):
        for request_id, completion in other.items():
            assert completion.text == all_at_once[request_id].text
            assert completion.logprob == pytest.approx(all_at_once[request_id].logprob, abs=1e-3)


def test_seeds_and_not_places_in_the_batch_make_the_noise(engine):
    same_seed = [Request(str(i), messages_from("go"), Sampling(max_tokens=12), 7) for i in range(3)]
    texts = {c.text for c in engine.complete(same_seed)}
    assert len(texts) == 1
    without = [Request(str(i), messages_from("go"), Sampling(max_tokens=12)) for i in range(8)]
    # One reply in eight is empty, so that some may be equal; with shared noise all would be.
    assert len({c.text for c in engine.complete(without)}) > 2


def test_greedy_replies_are_those_of_transformers(engine, reference):
    found = answers(engine, [request(p, temperature=0, max_tokens=24) for p in PROMPTS[:6]])
    for text in PROMPTS[:6]:
        tokens = reference.greedy(text, 24)
        completion = found[text]
        assert completion.text == reference.decode(tokens)
        assert completion.logprob == pytest.approx(reference.logprob(text, tokens), abs=2e-3)
        assert completion.prompt_tokens == len(reference.prompt(text))
        assert completion.completion_tokens == len(tokens)


def test_the_log_probability_is_the_models_own_at_any_temperature(engine, reference):
    hot = {"temperature": 2.0, "top_p": 0.9, "max_tokens": 1}
    asked = [request(p, seed, **hot) for seed, p in enumerate(PROMPTS[:60])]
    table = {p: reference.logprobs(p, [])[0] for p in PROMPTS[:60]}
    checked = 0
    for text, completion in answers(engine, asked).items():
        tokens = reference.tokenizer.encode(completion.text)
        if len(tokens) == 1 and completion.text.isascii():
            assert completion.logprob == pytest.approx(float(table[text][tokens[0]]), abs=1e-3)
            checked += 1
    assert checked > 10


def test_a_stop_text_ends_the_reply_and_is_not_part_of_it(engine, reference):
    whole = reference.decode(reference.greedy(PROMPTS[0], 24))
    stop = next(whole[i : i + 2] for i in range(6, 20) if whole[i : i + 2].isascii())
    found = answers(engine, [request(PROMPTS[0], temperature=0, max_tokens=24, stop=(stop,))])
    assert found[PROMPTS[0]].text == whole[: whole.index(stop)]
    assert found[PROMPTS[0]].finish_reason == "stop"


def test_choice_probabilities_are_the_models_own_also_far_from_the_top(engine, reference):
    choices = ("A", "B", "C", "%")
    asked = [
        Request(p, messages_from(p), Sampling(temperature=1.5), 3, choices) for p in PROMPTS[:8]
    ]
    # In one batch with requests of the other kind.
    found = answers(engine, asked + sampled(30)[20:])
    for text in PROMPTS[:8]:
        probs = reference.logprobs(text, [])[0].exp()
        expected = [float(probs[reference.tokenizer.encode(c)[0]]) for c in choices]
        assert found[text].choice_probs == pytest.approx(expected, abs=1e-4)
        assert found[text].text == choices[expected.index(max(expected))]
        assert found[text].finish_reason == "stop"


def test_a_choice_of_two_tokens_is_named_and_the_engine_goes_on(engine):
    asked = [Request("r", messages_from("hello"), Sampling(), None, ("A", "tie"))]
    with pytest.raises(InputError, match="choice 'tie' is 3 tokens"):
        list(engine.complete(sampled(20) + asked))
    assert len(answers(engine, sampled(3))) == 3


def test_a_prompt_that_is_too_long_fails_alone(engine):
    long = "x" * CONTEXT
    found = answers(engine, [request(long), *sampled(3)])
    # Every letter is a token, and the template adds three.
    assert found[long].failure == f"prompt of {CONTEXT + 3} tokens does not fit in {CONTEXT}"
    assert found[long].finish_reason == "failed"
    assert all(found[r.request_id].finish_reason != "failed" for r in sampled(3))


def test_an_answer_ends_where_the_context_does(engine, reference):
    text = "y" * (CONTEXT - 7)
    found = answers(engine, [request(text, temperature=0, max_tokens=100)])[text]
    assert len(reference.prompt(text)) == CONTEXT - 4
    assert (found.completion_tokens, found.finish_reason) == (4, "length")


def test_replies_come_when_they_are_ready_and_not_at_the_end(engine):
    short, long = request("short", 1, max_tokens=1), request("long", 1, max_tokens=200)
    assert [c.request_id for c in engine.complete([long, short])] == ["short", "long"]


def test_a_call_that_is_given_up_does_not_hinder_the_next(engine):
    given_up = engine.complete([request(f"{i}", i, max_tokens=200) for i in range(300)])
    next(given_up)
    given_up.close()
    started = time.monotonic()
    assert len(answers(engine, sampled(2))) == 2
    assert time.monotonic() - started < 5


def test_calls_from_several_threads_share_the_engine(engine):
    alone = answers(engine, sampled(40))
    found: list[dict[str, Completion]] = []
    shares = [sampled(40)[i::4] for i in range(4)]
    threads = [
        threading.Thread(target=lambda share=share: found.append(answers(engine, share)))
        for share in shares
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = {k: c.text for part in found for k, c in part.items()}
    assert together == {k: c.text for k, c in alone.items()}


@dataclass
class AdaptedRun:
    greedy: dict[str, Completion]
    death: str
    after_death: str


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tiny_adapter: Path) -> AdaptedRun:
    """What an engine with an adapter said, and what became of it when its child was killed."""
    config = EngineConfig(model=str(tiny_model), adapter=str(tiny_adapter))
    with open_engine(config, RUNTIME) as engine:
        assert isinstance(engine, VLLMEngine)
        greedy = answers(engine, [request(p, temperature=0, max_tokens=24) for p in PROMPTS[:6]])
        interrupted = engine.complete([request(f"{i}", i, max_tokens=200) for i in range(300)])
        next(interrupted)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(ServiceError) as death:
            list(interrupted)
        with pytest.raises(ServiceError) as after_death:
            list(engine.complete(sampled(1)))
    return AdaptedRun(greedy, str(death.value), str(after_death.value))


def test_an_adapter_changes_replies_as_peft_does(adapted, reference, tiny_model, tiny_adapter):
    with_adapter = Reference(tiny_model, tiny_adapter)
    for text in PROMPTS[:6]:
        tokens = with_adapter.greedy(text, 24)
        assert adapted.greedy[text].text == with_adapter.decode(tokens)
        assert tokens != reference.greedy(text, 24)


def test_a_child_that_is_killed_is_an_error_with_its_exit_code(adapted):
    assert "exit code -9" in adapted.death
    assert "run again" in adapted.death
    assert adapted.after_death == adapted.death


def test_a_folder_without_an_adapter_is_named(tiny_model, tmp_path):
    config = EngineConfig(model=str(tiny_model), adapter=str(tmp_path))
    with pytest.raises(InputError, match=r"no adapter_config\.json"), open_engine(config, RUNTIME):
        pass


def test_a_model_that_does_not_load_is_an_error_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text("{")
    config = EngineConfig(model=str(tmp_path))
    with pytest.raises(ServiceError, match="not a valid JSON"), open_engine(config, RUNTIME):
        pass


PARENT = """
import json, sys
from generation.engine import EngineConfig, EngineRuntime
from generation.opening import open_engine
from tests.generation.test_vllm_engine import RUNTIME, request, sampled

if sys.argv[2] == "loading":
    import subprocess
    start = subprocess.Popen
    def announce(*arguments, **options):
        child = start(*arguments, **options)
        print(json.dumps({"pid": child.pid}), flush=True)
        return child
    subprocess.Popen = announce
with open_engine(EngineConfig(model=sys.argv[1]), RUNTIME) as engine:
    texts = {c.request_id: c.text for c in engine.complete(sampled(20))}
    print(json.dumps({"pid": engine.pid, "texts": texts}), flush=True)
    for _ in engine.complete(request(f"{i}", i, max_tokens=200) for i in range(5000)):
        pass
"""


def run_and_kill_parent(model: Path, when: str) -> dict[str, object]:
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model), when],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stderr is not None
    try:
        line = parent.stdout.readline()
        if not line:
            pytest.fail(parent.stderr.read())
        time.sleep(0.5)
    finally:
        parent.kill()
        parent.communicate()
    said: dict[str, object] = json.loads(line)
    return said


def test_a_killed_parent_leaves_no_child_and_a_restart_gives_the_same_replies(engine, tiny_model):
    said = run_and_kill_parent(tiny_model, "sampling")
    assert isinstance(said["pid"], int)
    assert wait_until_gone(said["pid"], 15)
    assert said["texts"] == {k: c.text for k, c in answers(engine, sampled(20)).items()}


def test_a_parent_killed_while_vllm_loads_leaves_no_child(tiny_model):
    said = run_and_kill_parent(tiny_model, "loading")
    assert isinstance(said["pid"], int)
    assert wait_until_gone(said["pid"], 15)
