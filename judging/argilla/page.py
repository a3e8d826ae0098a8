"""What a labeller sees: the conversation, and below it the answers side by side.

Argilla shows a record in an `iframe`, laid out by `page.html`. It writes the whole record, as JSON,
into a script there, so any text of it could end that script and act as the labeller: all that is
put into a record is made by `content` or goes through `neutral`. Models write markdown, which is
rendered here, to HTML without scripts, links or images; and nothing that they wrote is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib import resources
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from judging.people import LETTERS, Question

FIELD = "comparison"
"""The field's name, by which `page.html` finds it in a record."""

FORMULA_LINES = 50
"""A longer formula is rendered as markdown. Without a bound, beginnings alone take forever."""

# What begins a tag; what JavaScript's `replace`, with which Argilla fills its page, takes for a
# command; and the places that it fills.
_ACTIVE = re.compile(r"<(?=[A-Za-z/!?])|\$(?=[$&`'])|#(?=(?:RECORD_OBJECT|TEMPLATE)#)")
_ENTITIES = {"$": "&dollar;", "#": "&num;"}
_JOINER = "\u2060"
"""Takes no room, but parts what it stands between."""
# Control characters but tab and line breaks, as the pictures that Unicode has of them.
_PICTURES = {n: 0x2400 + n for n in range(32) if chr(n) not in "\t\n\r"} | {0x7F: 0x2421}

# What a backslash stands before, and formulas, which are full of markdown's marks.
_AS_WRITTEN = re.compile(
    r"""\\\( .{1,1000}? \\\)
    | \\\[ .{1,1000}? \\\]
    | \$\$ .{1,1000}? \$\$
    | \$ (?![\s$]) [^$\n]{1,200} (?<!\s) \$ (?!\d)
    | \\ [!-/:-@\[-`{-~]""",
    re.DOTALL | re.VERBOSE,
)
_FORMULA_ENDS = {"$$": "$$", r"\[": r"\]"}
_MARKS = re.compile(r"[\s`*_~#>|=:.)-]+")
"""All that markdown may take out of a text."""


def field_settings() -> dict[str, Any]:
    """The settings of Argilla's field, as its API takes them."""
    template = resources.files("judging.argilla").joinpath("page.html").read_text(encoding="utf-8")
    return {"type": "custom", "template": template, "advanced_mode": False}


def content(question: Question) -> dict[str, Any]:
    """The field's value: each turn of the conversation and each answer, as HTML that is safe."""
    return {
        "turns": [
            {"role": neutral(turn.role.capitalize()), "html": _html(turn.content)}
            for turn in question.prompt.messages
        ],
        "answers": [
            {"label": label, "html": _html(candidate.response)}
            for label, candidate in zip(LETTERS, question.candidates, strict=False)
        ],
    }


def neutral(text: str) -> str:
    """The text, safe and valid anywhere in a record of Argilla; it reads the same to a person.

    Control characters become visible, and half a surrogate pair becomes `�`. Idempotent.
    """
    return _ACTIVE.sub(lambda match: match[0] + _JOINER, _valid(text))


def _valid(text: str) -> str:
    utf16 = text.encode("utf-16-le", "surrogatepass")
    return utf16.decode("utf-16-le", "replace").translate(_PICTURES)


def _html(text: str) -> str:
    """Markdown as HTML; the text as it stands where markdown would leave a part of it out."""
    written = _valid(text)
    if not written.strip():
        return "<p><i>(empty)</i></p>"
    tokens = _MARKDOWN.parse(written)
    if _MARKS.sub("", written) == _MARKS.sub("", "".join(_shown(tokens))):
        html: str = _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {})
    else:
        html = f"<pre>{escape(written, quote=False)}</pre>"
    return _ACTIVE.sub(lambda match: _ENTITIES.get(match[0], match[0]), html)


def _shown(tokens: Iterable[Token]) -> Iterator[str]:
    """The texts that are seen of what was parsed, the numbers of lists among them."""
    for token in tokens:
        yield token.info
        yield from _shown(token.children) if token.children else (token.content,)


def _as_written(state: StateInline, silent: bool) -> bool:
    found = _AS_WRITTEN.match(state.src, state.pos, state.posMax)
    if found is None:
        return False
    if not silent:
        state.pending += found[0]
    state.pos = found.end()
    return True


def _formula(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A formula from the beginning of a line to the end of one."""
    ends_with = _FORMULA_ENDS.get(_line(state, start)[:2])
    if ends_with is None or state.is_code_block(start):
        return False
    for line in range(start, min(end, start + FORMULA_LINES)):
        text = _line(state, line)[2 * (line == start) :]
        if state.sCount[line] < state.blkIndent:
            return False
        if text.endswith(ends_with):
            if not silent:
                token = state.push("formula", "", 0)
                token.content = state.getLines(start, line + 1, state.blkIndent, False)
                state.line = line + 1
            return True
    return False


def _line(state: StateBlock, line: int) -> str:
    return state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]].rstrip()


def _text_html(self: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    return escape(tokens[at].content, quote=False).replace("\n", "<br>\n")


def _formula_html(self: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    return f"<p>{_text_html(self, tokens, at, options, env)}</p>\n"


def _code_html(self: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    """A block of code, below what it is said to be."""
    info, code = (escape(text, quote=False) for text in (tokens[at].info, tokens[at].content))
    caption = f"<figcaption>{info.strip()}</figcaption>" if info.strip() else ""
    return f'<figure>{caption}<pre dir="ltr"><code>{code}</code></pre></figure>\n'


def _numbers_as_written(state: StateCore) -> None:
    """Where a model numbers all items 1, the second is not shown as 2."""
    for token in state.tokens:
        if token.type == "list_item_open" and token.info:
            token.attrSet("value", token.info)


def _markdown() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False, "breaks": True})
    made.enable(["table", "strikethrough"])
    # Links and images stay as they were written: addresses are to be read, not to be followed.
    made.disable(["link", "image", "autolink", "reference", "entity", "html_block", "html_inline"])
    made.inline.ruler.at("escape", _as_written)
    made.block.ruler.before("fence", "formula", _formula, {"alt": ["paragraph", "blockquote"]})
    made.core.ruler.push("numbers_as_written", _numbers_as_written)
    made.add_render_rule("text", _text_html)
    made.add_render_rule("formula", _formula_html)
    made.add_render_rule("fence", _code_html)
    made.add_render_rule("code_block", _code_html)
    return made


_MARKDOWN = _markdown()
