"""A conversation as the model's tokens, and the one token that each choice is."""

from __future__ import annotations

from typing import Any

from preferences.errors import InputError
from preferences.records import Messages


class PromptRefused(ValueError):
    """The chat template cannot render this conversation, as one that opens with the assistant."""


class Chat:
    """Renders conversations with a tokenizer's chat template, ready for the assistant's turn."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"{model}: its tokenizer has no chat template; use an instruction-tuned model or "
                "put a chat_template.jinja into its folder"
            )
        self._tokenizer = tokenizer
        self._model = model
        self._choices: dict[tuple[str, ...], list[int]] = {}
        self._last: tuple[Messages, list[int]] = ((), [])

    def prompt(self, messages: Messages) -> list[int]:
        """The tokens up to where the assistant begins; raises PromptRefused."""
        # The samples of one prompt come one after the other.
        if self._last[0] != messages:
            text = self._render(messages)
            # The template writes the special tokens itself.
            self._last = messages, self._encode(text)
        return self._last[1]

    def choice_tokens(self, messages: Messages, choices: tuple[str, ...]) -> list[int]:
        """The token of each choice as the assistant's first, 'A' and not ' A'.

        Raises InputError for a choice that is not one token or not told apart from another.
        """
        if choices not in self._choices:
            text = self._render(messages)
            tokens = [self._choice_token(text, choice) for choice in choices]
            if len(set(tokens)) < len(tokens):
                raise InputError(f"choices {choices}: {self._model} does not tell them apart")
            self._choices[choices] = tokens
        return self._choices[choices]

    def _choice_token(self, prompt: str, choice: str) -> int:
        before = self._encode(prompt)
        after = self._encode(prompt + choice)
        # Where the tokenizer would merge it with the template's last token, it stands by itself:
        # a model that generates cannot take that token back.
        apart = after[: len(before)] == before
        tokens = after[len(before) :] if apart else self._encode(choice)
        if len(tokens) != 1:
            pieces = self._tokenizer.convert_ids_to_tokens(tokens)
            raise InputError(
                f"choice {choice!r} is {len(tokens)} tokens of {self._model} ({pieces}); "
                "name choices of one token each, as 'A' and 'B'"
            )
        return tokens[0]

    def _render(self, messages: Messages) -> str:
        from jinja2 import TemplateError

        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise PromptRefused(f"chat template: {error}") from error
        return str(text)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def too_long(prompt_tokens: int, context: int) -> str | None:
    """Why a prompt leaves no room for an answer, if it leaves none."""
    if prompt_tokens < context:
        return None
    return f"prompt of {prompt_tokens} tokens does not fit in {context}"
