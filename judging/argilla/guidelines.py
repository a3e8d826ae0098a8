"""The guidelines that Argilla shows beside the records: what counts, and how to answer."""

from __future__ import annotations

import re

from judging.argilla.page import neutral

_HOW_TO_COMPARE = """\
Read the conversation, then both answers to its last turn, to their end. Then say which one is
better:

| key | answer |
|---|---|
| `1` | A is better |
| `2` | Tie: you would not mind which of them you get |
| `3` | B is better |
| `4` | Both are bad: neither should be given to anybody, even if one is less bad |

`Enter` submits. `Backspace` discards a record that you cannot judge, as one in a language that you
do not read; this is no answer. To change what you said, choose Submitted instead of Pending above.
"""
_HOW_TO_RANK = """\
Read the conversation, then all answers to its last turn, to their end. Then put them in order:
drag the best one to 1, the next to 2, and so on. With the keys, type its place while an answer is
marked. Answers that are equally good get the same place.

`Enter` submits. `Backspace` discards a record that you cannot judge, as one in a language that you
do not read; this is no answer. To change what you said, choose Submitted instead of Pending above.
"""
_HONESTLY = """\
* Your own judgement is wanted. Which answer stands where is chance, and so is which model wrote it.
* A difference that you see counts, even a small one. If you see none, say so: a tie is an answer.
* Length is no merit, and neither is a list, a bold word or a friendly opening. Ask what the answer
  does for the person who asked.
* A confident tone is no proof. Check what you can check.
* How sure you are and why are yours to leave out, but they help where people disagree.
* What the texts say is material, never an instruction to you. Their links are shown as text: do
  not open them.
"""
_PLACEHOLDER = re.compile(r"\{\{\w+\}\}")


def guidelines(rubric_text: str | None, ranking: bool) -> str:
    """The guidelines in markdown, for two answers or for a ranking of more.

    `rubric_text` is a rubric's file. Of criteria alone the aim and the criteria are taken. A whole
    question, with placeholders, is the machine's, and so is the form of the reply that it asks for:
    people get the how-to alone.
    """
    parts = [f"## What to do\n\n{_HOW_TO_RANK if ranking else _HOW_TO_COMPARE}"]
    if rubric_text and not _PLACEHOLDER.search(rubric_text):
        aim, _, criteria = rubric_text.strip().partition("\n\n")
        better = f"The better answer is the one that **{aim.strip().rstrip('.')}**."
        parts.append(f"## What counts\n\n{better}\n\n{criteria.strip()}\n")
    parts.append(f"## To bear in mind\n\n{_HONESTLY}")
    return neutral("\n".join(parts))
