"""PPO steps against those of TRL 1.12, the last version that had a PPOTrainer.

    pip install --no-deps --target trl-1.12 trl==1.12.0
    OMP_NUM_THREADS=1 python benchmarks/ppo_speed.py trl-1.12

A step is all of it: answers sampled, policy, reference, reward model and critic read, advantages,
and four passes with their updates. Both start from the same files: a policy of ten million random
weights in the shape of `dpo_speed.py`, with a LoRA of rank 16 on all linear layers, and a reward
model that is another such LoRA. Ours holds one base, with both adapters and a critic on the
policy's trunk. TRL's holds what its own example script gives it: the policy with the adapter, which
is the reference with the adapter off, and the reward model and the critic as models of their own,
the latter with all its weights training. Whichever token comes last, the policy ends its answer
with about the same chance, so answers have geometric lengths up to a limit.

Each contender is a process of its own; they take their steps in turn. Seconds are the process's.
Memory is the most a process held, less what it held after its imports.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_speed import SHAPE, SPREAD, over, spread
from table import peak_gib, write_table

ROLLOUTS, BATCH, PASSES = 16, 4, 4
PROMPTS = 512
TEMPERATURE = 0.7
RATE = 3e-5
PAD, END = SHAPE["pad_token_id"], SHAPE["eos_token_id"]


@dataclass(frozen=True)
class Workload:
    """Prompts and answers of so many tokens on average, and the limit of answers."""

    prompt: int
    answer: int
    limit: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.answer}, at most {self.limit}"

    def prompts(self) -> list[list[int]]:
        """Lengths are lognormal, as in `dpo_speed.py`."""
        chance = random.Random(str(self))
        lengths = [
            max(1, round(chance.lognormvariate(math.log(self.prompt) - SPREAD**2 / 2, SPREAD)))
            for _ in range(PROMPTS)
        ]
        return [[chance.randrange(3, SHAPE["vocab_size"]) for _ in range(n)] for n in lengths]


WORKLOADS = (Workload(128, 32, 64), Workload(32, 64, 96))


def make_models(folder: Path, workload: Workload) -> None:
    """The policy, the reward model as an adapter on it, and the same merged."""
    import peft
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from training import reward_head

    words = {"<pad>": PAD, "<bos>": 1, "<end>": END}
    words |= {f"w{i}": i for i in range(3, SHAPE["vocab_size"])}
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<end>",
    )
    tokenizer.chat_template = "{{ messages }}"  # never asked
    torch.manual_seed(0)
    shape: dict[str, Any] = SHAPE
    make: Any = LlamaForCausalLM
    policy = make(LlamaConfig(**shape))
    end_with(policy, 1 / workload.answer)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")

    judge = reward_head.load(str(folder / "policy"), None, "lora", "float32", 0)
    lora = peft.LoraConfig(
        r=16,
        target_modules="all-linear",
        task_type="SEQ_CLS",
        modules_to_save=["score"],
        init_lora_weights=False,
    )
    adapter = folder / "reward" / "adapter"
    adapted: Any = peft.get_peft_model(judge, lora)
    adapted.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    (adapter / "trained.json").write_text(json.dumps({"weights": "lora"}))
    reward_head.publish(
        str(folder / "policy"), None, "lora", "float32", adapter, folder / "published"
    )


def end_with(policy: Any, chance: float) -> None:
    """Make the end token come with about that chance, at the temperature, whatever came before.

    Of every token but that one the embedding's first number is the same, so that the first number
    of the last state is nearly the same too, and the end token's row of the head reads only it.
    """
    import torch

    embedding = policy.get_input_embeddings().weight
    with torch.no_grad():
        embedding[:, 0] = 0.2
        embedding[END] = 0
        ids = torch.randint(3, SHAPE["vocab_size"], (8, 64))
        states = policy.model(input_ids=ids).last_hidden_state
        logits = policy.lm_head(states) / TEMPERATURE
        total = logits.logsumexp(-1).mean()
        wanted = TEMPERATURE * (total + math.log(chance / (1 - chance)))
        embedding[END, 0] = wanted / states[..., 0].mean()


def held_mib() -> float:
    """What this process holds now, from where its peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    return 1024 * peak_gib()


def turns() -> Any:
    """A callback that waits for its turn, takes a step, and tells the parent what it took."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        """Lines of JSON go out, and a line comes in for each step."""

        started = 0.0
        before = held_mib()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """Everything is loaded."""
            self.wait({})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """A step is over."""
            took = time.process_time() - self.started
            self.wait({"seconds": took, "mib": 1024 * peak_gib() - self.before})

        def wait(self, told: Mapping[str, float]) -> None:
            """Say what there is to say, and go on or end when told so."""
            print(json.dumps(told), flush=True)
            if not sys.stdin.readline():
                os._exit(0)
            self.started = time.process_time()

    return Turns()


def ours(folder: Path, prompts: list[list[int]], workload: Workload) -> None:
    """Steps of ours until nobody asks for more."""
    from training.data import HeldOutPrompt, SplitCounts
    from training.ppo import PPOConfig
    from training.ppo_trainer import PPOTrainer
    from training.prompts import Prompts
    from training.run import TrainingRuntime

    turn = turns()
    config = PPOConfig(
        model=str(folder / "policy"),
        reward_model=str(folder / "reward"),
        temperature=TEMPERATURE,
        max_tokens=workload.limit,
        max_length=4096,
        rollouts=ROLLOUTS,
        sampling_batch_size=ROLLOUTS,
        batch_size=BATCH,
        accumulation=ROLLOUTS // BATCH,
        passes=PASSES,
        reward_samples=ROLLOUTS,
        learning_rate=RATE,
        dtype="float32",
        gradient_checkpointing=False,
        max_steps=1000,
        probe=None,
    )
    asked = tuple(HeldOutPrompt(f"p{i}", (), tuple(ids)) for i, ids in enumerate(prompts))
    counts = SplitCounts(len(asked), len(asked), {}, 0, 0)
    runtime = TrainingRuntime(log_steps=1000, save_steps=1000)
    trainer = PPOTrainer(config, runtime, folder / "run", Prompts(asked, counts, ()))
    trainer.add_callback(turn)
    trainer.train()


def theirs(folder: Path, prompts: list[list[int]], workload: Workload) -> None:
    """Steps of TRL's until nobody asks for more."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    turn = turns()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    kept: dict[str, Any] = {"dtype": torch.float32}
    arguments = PPOConfig(
        output_dir=str(folder / "trl"),
        learning_rate=RATE,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ROLLOUTS // BATCH,
        num_mini_batches=1,
        num_ppo_epochs=PASSES,
        local_rollout_forward_batch_size=ROLLOUTS,
        total_episodes=1000 * ROLLOUTS,
        response_length=workload.limit,
        temperature=TEMPERATURE,
        stop_token="eos",
        missing_eos_penalty=1.0,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", **kept),
        ref_model=None,
        reward_model=AutoModelForSequenceClassification.from_pretrained(
            folder / "published", **kept
        ),
        value_model=AutoModelForSequenceClassification.from_pretrained(
            folder / "published", **kept
        ),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[turn],
    )
    trainer.train()


CONTENDERS = {"ours": ours, "TRL 1.12": theirs}


@dataclass
class Running:
    """A contender's process, and its figures."""

    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    """Of a sample."""
    mib: list[float] = field(default_factory=list)
    """The most it has held by then."""

    def told(self) -> dict[str, float]:
        """The next thing it says."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(('{"', "{}")):  # not a report of TRL's
                found: dict[str, float] = json.loads(line)
                return found
        raise SystemExit("a contender ended early; its reason is above")

    def step(self) -> dict[str, float]:
        """Take one."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.told()


def start(name: str, workload: int, folder: Path, trl: str) -> Running:
    """A contender's process, with all loaded."""
    command = [sys.executable, __file__, trl, "--contender", name]
    command += ["--workload", str(workload), "--folder", str(folder)]
    root = str(Path(__file__).parents[1])
    path = [trl, root] if CONTENDERS[name] is theirs else [root]
    running = Running(
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        )
    )
    running.told()
    return running


def measure(workload: int, repeats: int, trl: str) -> list[Running]:
    """All contenders in turn, after a step each that is not counted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, WORKLOADS[workload])
        running = [start(one, workload, folder, trl) for one in CONTENDERS]
        for repeat in range(repeats + 1):
            for one in running:
                told = one.step()
                if repeat:
                    one.seconds.append(told["seconds"] / ROLLOUTS)
                one.mib = [told["mib"]]
        for one in running:
            one.process.communicate()
    return running


def rows_of(workload: Workload, running: list[Running]) -> list[list[str]]:
    """Rows of the table."""
    return [
        [f"{workload}: {what}", spread(first), spread(second), over(second, first)]
        for what, (first, second) in (
            ("s a sample", [one.seconds for one in running]),
            ("MiB at the peak", [one.mib for one in running]),
        )
    ]


def main() -> None:
    """Measure; the table is written after each workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trl", help="a folder with trl 1.12")
    parser.add_argument("--repeats", type=int, default=2, help="steps of each contender")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--workload", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contender is not None:
        import torch

        torch.set_num_threads(1)
        workload = WORKLOADS[given.workload]
        CONTENDERS[given.contender](given.folder, workload.prompts(), workload)
        return
    rows: list[list[str]] = []
    for number, workload in enumerate(WORKLOADS):
        rows += rows_of(workload, measure(number, given.repeats, given.trl))
        tell(rows, given.repeats)


def tell(rows: list[list[str]], repeats: int) -> None:
    """Write the table of what is measured so far."""
    note = (
        f"Medians of {repeats} steps of {ROLLOUTS} samples, with the least and the most; ratios "
        f"are a step's own. {BATCH} samples at a time forward and backward, {PASSES} updates a "
        f"step. Lengths of prompts are lognormal with the mean given and σ {SPREAD}, those of "
        "answers geometric up to the limit; all are sampled at once. TRL is 1.12.0; the other "
        "libraries are the same."
    )
    header = ["prompt/answer", *CONTENDERS, "TRL 1.12 / ours"]
    write_table("ppo_speed", header, rows, note)


if __name__ == "__main__":
    main()
