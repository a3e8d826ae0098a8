"""What is put into a record: nothing of it runs, and all that was written can be read."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judging.argilla.guidelines import guidelines
from judging.argilla.page import FIELD, content, field_settings, neutral
from judging.people import Question, question
from judging.rubric import load_rubric
from preferences.records import Candidate, Message, Prompt, prompt_identity
from tests.judging.argilla.hostile import HOSTILE, as_read

TAGS = {
    *("p", "br", "b", "i", "em", "strong", "s", "code", "pre", "figure", "figcaption"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "hr", "ul", "ol", "li", "blockquote"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {
    *(("dir", "ltr"), ("style", "text-align:left"), ("style", "text-align:center")),
    ("style", "text-align:right"),
}
MARKDOWN = st.text("ab1 \n*_`~#>|=:.)-+![]()<>&$\\\t{}\"'\u05d0", max_size=60)


def test_hostile_texts_are_shown_and_are_nothing_but_text() -> None:
    assert len(set(HOSTILE)) >= 200
    for text in HOSTILE:
        for html in shown_as(text):
            assert as_read(read(html)) == as_read(text), text


def test_no_text_of_a_record_ends_the_script_it_is_written_into() -> None:
    """As Argilla's page does: the record's JSON replaces a mark in a script of a template."""
    for text in HOSTILE:
        record = {FIELD: content(about(text, text, role=text)), "metadata": neutral(text)}
        written = json.dumps(record, ensure_ascii=False)
        written.encode()
        assert not re.search(r"(?ia)</?script|<!", written)
        assert not re.search(r"\$[$&`']|#(RECORD_OBJECT|TEMPLATE)#", written)
        assert "\0" not in str(record)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_neutral_text_reads_the_same(text: str) -> None:
    once = neutral(text)
    assert as_read(once) == as_read(text)
    assert neutral(once) == once


def test_an_ordinary_text_stays_as_it_is() -> None:
    for text in ("maths", "law & order", "a < b, x<3", "$5 and #1", "naïve 你好 שלום 🙂", "q0f3a"):
        assert neutral(text) == text


@given(MARKDOWN)
def test_nothing_that_was_written_is_left_out(text: str) -> None:
    """Letters, digits and all that is no mark of markdown's are there, in their order."""
    seen = read(shown_as(text)[0], numbered=True)
    wanted = re.findall(r"[^\s`*_~#>|=:.)-]", text)
    assert re.findall(r"[^\s`*_~#>|=:.)-]", seen) == (wanted if text.strip() else list("(empty"))


def test_what_markdown_would_swallow_is_there() -> None:
    for text in (
        "[1]: http://example.com 'title'",
        "|a|\n|-|\n|b|one cell too many|",
        "List<String> and Map<K, V>",
        "> " * 40 + "deep",
        "".join(f"{'  ' * n}- deep {n}\n" for n in range(40)),
        "&amp; &nbsp; &copy;",
    ):
        assert re.sub(r"[\s>|-]", "", read(shown_as(text)[0])) == re.sub(r"[\s>|-]", "", text)


def test_formulas_stay_as_they_are() -> None:
    for text in (
        r"\(a_1 * b_1 * c\)",
        r"$x_1 * y * z_1$ and \[ \alpha_1 \\ _b_ \]",
        "$$x*y*z$$",
        "\\[\nx = a \\\\\n- b\n+ c\n\\]",
        r"\begin{pmatrix} a & b \\ c \end{pmatrix}",
    ):
        assert read(shown_as(text)[0]).split() == text.split()
    assert "<em>" in shown_as("It costs $5 and *not* $6.")[0]


def test_markdown_is_rendered() -> None:
    text = "# Title\n\nA *b* **c** ~~d~~ `e`\nnext\n\n```py\nx < 1\n```\n\n|a|b|\n|-|-:|\n|1|2|\n"
    assert shown_as(text)[0].replace("\n", "") == (
        "<h1>Title</h1>"
        "<p>A <em>b</em> <strong>c</strong> <s>d</s> <code>e</code><br />next</p>"
        '<figure><figcaption>py</figcaption><pre dir="ltr"><code>x &lt; 1</code></pre></figure>'
        '<table><thead><tr><th>a</th><th style="text-align:right">b</th></tr></thead>'
        '<tbody><tr><td>1</td><td style="text-align:right">2</td></tr></tbody></table>'
    )


def test_items_keep_the_numbers_they_were_given() -> None:
    assert re.findall(r'<li value="(\d+)">', shown_as("3. a\n3. b\n7. c")[0]) == ["3", "3", "7"]


def test_a_record_holds_the_turns_and_the_answers_as_shown() -> None:
    messages = (Message("system", "Be brief."), Message("user", "Hello"), Message("tool", "1"))
    prompt = Prompt(prompt_identity(messages), messages, "test")
    answers = [Candidate(f"c{n}", prompt.prompt_id, "m", f"text {n}", "complete") for n in range(6)]
    asked = question(prompt, answers, "ask")
    held = content(asked)
    assert [(t["role"], read(t["html"])) for t in held["turns"]] == [
        ("System", "Be brief."),
        ("User", "Hello"),
        ("Tool", "1"),
    ]
    assert [a["label"] for a in held["answers"]] == list("ABCDEF")
    assert [read(a["html"]) for a in held["answers"]] == [c.response for c in asked.candidates]


def test_an_empty_answer_is_said_to_be_empty() -> None:
    assert read(shown_as(" \n")[0]) == "(empty)"


def test_the_field_is_one_that_argilla_fills_itself() -> None:
    settings = field_settings()
    assert (settings["type"], settings["advanced_mode"]) == ("custom", False)
    assert f"record.fields.{FIELD}.answers" in settings["template"]
    # Argilla's `replace` would take these for commands in the template, too.
    assert not re.search(r"\$[$&`']", settings["template"])
    # In the frame, these are of the frame's height, which follows from them.
    assert not re.search(r"\dvh|max-height", settings["template"])


def test_guidelines_tell_the_criteria_and_the_keys() -> None:
    rubric = "is kinder\n\n- Does it listen?\n- Does it insult?\n"
    pair, ranking = guidelines(rubric, ranking=False), guidelines(rubric, ranking=True)
    for text in (pair, ranking):
        assert "the one that **is kinder**" in text
        assert "- Does it listen?\n- Does it insult?" in text
    assert "`4` | Both are bad" in pair
    assert "Both are bad" not in ranking
    assert "What counts" not in guidelines(None, ranking=False)


def test_guidelines_leave_out_what_is_said_to_machines() -> None:
    asked = load_rubric("helpful").text  # the whole question, with its placeholders
    assert guidelines(asked, ranking=False) == guidelines(None, ranking=False)


def about(prompt_text: str, *answers: str, role: str = "user") -> Question:
    messages = (Message(role, prompt_text),)
    prompt = Prompt(prompt_identity(messages), messages, "test")
    candidates = [
        Candidate(f"c{n}", prompt.prompt_id, "m", text, "complete")
        for n, text in enumerate(answers or ("x",))
    ]
    return question(prompt, candidates, "ask")


def shown_as(text: str) -> tuple[str, str]:
    """A text as the HTML of a turn and of an answer."""
    held = content(about(text, text))
    return held["turns"][0]["html"], held["answers"][0]["html"]


class Reader(HTMLParser):
    """Reads HTML as a browser does; tags and attributes are only those that are known."""

    def __init__(self, numbered: bool) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []
        self._numbered = numbered

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        for name, value in attributes:
            if name in ("start", "value"):
                assert re.fullmatch(r"\d+", value or "")
                if self._numbered and name == "value":
                    self.texts.append(value or "")
            else:
                assert (name, value) in ATTRIBUTES

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def read(html: str, numbered: bool = False) -> str:
    """The text of HTML, the numbers of list items before them if that is wanted."""
    reader = Reader(numbered)
    reader.feed(html)
    reader.close()
    return "".join(reader.texts).strip()
