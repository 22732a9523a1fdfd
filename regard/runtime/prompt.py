"""Prompts in parts: it stays known which tokens are what, after the chat template and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError
from regard.runtime import segments
from regard.runtime.segments import Mark

if TYPE_CHECKING:
    from torch import Tensor

    from regard.runtime.spans import Spans

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Prompt:
    """A prompt of named parts, written a part a line in this order; parts left empty are not written.

    Its spans are `system`, `instruction`, `facts`, `question`, `options`, and each fact and option by its
    number, `facts.0` and `options.2`; labels and line breaks between parts belong to none.

    Attributes:
        system: who the model is; the system's turn of a chat, where its template has one.
        instruction: what it shall do.
        facts: what it is told; one text, or several that have their own spans.
        question: what it is asked.
        options: what may be the answer, from which `score_options` chooses.
        labels: one for each option, `"ABCD"`: options are listed as `(A) cat`, and a label is the answer.
            None does not list them: the answer is the option itself.
        right: which option is right, counted from 0; None where that is unknown.
        begun: what begins the answer, such as `Answer:`; in a chat the first words of the model's turn.

    Raises:
        RegardError: where nothing is asked, an option is empty, labels are not as many as options, or no
            option is `right`.

    Example:
        >>> asked = Prompt(facts="The sky was green.", question="What was the sky?", begun="The sky was")
        >>> print(asked.text)
        The sky was green.
        What was the sky?
        The sky was
    """

    system: str = ""
    instruction: str = ""
    facts: str | Sequence[str] = ()
    question: str = ""
    options: Sequence[str] = ()
    labels: Sequence[str] | None = None
    right: int | None = None
    begun: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", (self.facts,) if isinstance(self.facts, str) else tuple(self.facts))
        object.__setattr__(self, "options", tuple(self.options))
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(self.labels))
        if not any((self.instruction, *self.facts, self.question)):
            raise RegardError("a prompt needs an instruction, a fact or a question; all of them are empty.")
        if not all(self.answers):
            raise RegardError("an option, or its label, is empty.")
        if self.labels is not None and len(self.labels) != len(self.options):
            raise RegardError(f"a prompt has {len(self.labels)} labels for {len(self.options)} options.")
        if self.right is not None and not 0 <= self.right < len(self.options):
            raise RegardError(f"option {self.right} is said to be right, of {len(self.options)} options.")

    @property
    def answers(self) -> tuple[str, ...]:
        """What the model may answer: the labels, or the options where they have none."""
        return tuple(self.options if self.labels is None else self.labels)

    @property
    def pieces(self) -> list[tuple[str, str]]:
        """The parts but for the system's and the answer's beginning, as (name, text), "" between them."""
        lines: list[list[tuple[str, str]]] = []
        if self.instruction:
            lines.append([("instruction", self.instruction)])
        lines += [[(f"facts.{number}", fact)] for number, fact in enumerate(self.facts) if fact]
        if self.question:
            lines.append([("question", self.question)])
        for number, (label, option) in enumerate(zip(self.labels or (), self.options, strict=False)):
            lines.append([("", f"({label}) "), (f"options.{number}", option)])
        return [piece for i, line in enumerate(lines) for piece in ([("", "\n")] if i else []) + line]

    @property
    def text(self) -> str:
        """The prompt without a chat template; it ends where the answer goes on."""
        return self.rendered()[0]

    def rendered(self, tokenizer: Any = None) -> tuple[str, list[Mark]]:
        """Return the prompt as text, and where each part stands in it, in characters.

        Args:
            tokenizer: of transformers, to write it as a chat by its template; None for plain text. A template
                that takes no system's turn gets what it says at the head of the user's.

        Raises:
            RegardError: where the template changes a part.
        """
        system = [("system", self.system), ("", "\n")] if self.system else []
        if tokenizer is None:
            pieces = [*system, *self.pieces, *([("", f"\n{self.begun}")] if self.begun else [])]
            return "".join(text for _, text in pieces), _grouped(segments.marks_of(pieces))
        turns = [{"role": "user", "content": self.pieces}]
        if system and _takes_system(tokenizer):
            turns.insert(0, {"role": "system", "content": system[:1]})
        elif system:
            turns[0]["content"] = [*system, *self.pieces]
        text, marks = segments.rendered(tokenizer, turns, True)
        own = {name for name, _ in [*system, *self.pieces]}
        return text + self.begun, _grouped([mark for mark in marks if mark.name in own])


def _takes_system(tokenizer: Any) -> bool:
    """Whether a chat template writes what the system says, in a turn of its own."""
    from jinja2 import TemplateError

    turns = [{"role": "system", "content": "\ue000"}, {"role": "user", "content": "\ue001"}]
    try:
        return "\ue000" in str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError:
        return False


def _grouped(marks: Sequence[Mark]) -> list[Mark]:
    """Marks, and for those numbered such as `facts.0` one more of the name without its number."""
    return [m for mark in marks if mark.name for m in (
        [mark, mark._replace(name=mark.name.split(".")[0])] if "." in mark.name else [mark]
    )]  # fmt: skip


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    chat: bool | None = None,
    padding_side: str | None = "left",
) -> tuple[dict[str, Tensor], Spans]:
    """Tokenize prompts as a batch, and tell which tokens are which part.

    Args:
        tokenizer: a fast tokenizer of transformers, which knows the offsets of its tokens.
        prompts: which.
        chat: by the tokenizer's chat template; default whether it has one.
        padding_side: `left`, to generate from, or `right`; None for the tokenizer's.

    Returns:
        The model's inputs, int64 [B, S], and the spans, bool [B, S] by name, to give to `watch` or `steer`.

    Raises:
        RegardError: without prompts, for a chat without a template, for a slow tokenizer or one that cannot
            pad, and where the template changes a part.

    Example:
        >>> inputs, spans = encode_prompts(tokenizer, prompts)                  # doctest: +SKIP
        >>> with regard.steer(model, ScoreBias(1.0, span="facts"), spans=spans):          # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    from regard.runtime.spans import Spans

    templated = takes_chat(tokenizer, prompts, chat)
    written = [prompt.rendered(tokenizer if templated else None) for prompt in prompts]
    texts, marks = (list(each) for each in zip(*written, strict=True))
    return Spans._tokenized(tokenizer, texts, marks, padding_side, not templated)


def takes_chat(tokenizer: Any, prompts: Sequence[Prompt], chat: bool | None) -> bool:
    """Return whether prompts are written by the chat template.

    Raises:
        RegardError: without prompts, and for a chat without a template.
    """
    if not prompts:
        raise RegardError("there are no prompts.")
    has = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has:
        raise RegardError(f"{type(tokenizer).__name__} has no chat template; give chat=False.")
    return has if chat is None else chat
