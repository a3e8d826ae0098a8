"""Make the miniature: its prompts, its policy and its judge.

    python recipes/miniature/make.py [--out DIR] [--seed N]

About ten minutes on two quiet cores, without network. The same seed, machine and library versions
give the same models.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from judge import train_judge
from policy import train_policy
from world import Task, tasks


def main() -> None:
    """Write the prompt files and train both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--only", choices=("prompts", "policy", "judge"), help="make one part; judge needs policy/"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    parts = {arguments.only} if arguments.only else {"prompts", "policy", "judge"}

    out.mkdir(parents=True, exist_ok=True)
    if "prompts" in parts:
        write_prompts(out / "prompts.jsonl", tasks(held_out=False))
        write_prompts(out / "test_prompts.jsonl", tasks(held_out=True))
    if "policy" in parts:
        seconds = train_policy(out / "policy", seed=arguments.seed)
        print(f"policy: {out / 'policy'} in {seconds:.0f} s")
    if "judge" in parts:
        seconds = train_judge(out / "judge", out / "policy", seed=arguments.seed)
        print(f"judge: {out / 'judge'} in {seconds:.0f} s")


def write_prompts(path: Path, chosen: Iterable[Task]) -> None:
    """One JSON object a line: id, prompt, and the action as its category."""
    with path.open("w", encoding="utf-8") as file:
        for task in chosen:
            row = {
                "id": f"{task.action}-{task.object}-{task.phrasing}",
                "prompt": task.prompt,
                "category": task.action,
            }
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
