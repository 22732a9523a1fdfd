"""Prompts in a model's own template, and the instruction that a prompt in it carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.errors import RegardError

EXPLAIN = 'Explain the "{}" within one short paragraph.'
GUESS = '"{}" is related to what?'
PLAIN = "{}\nAnswer:"
SLOT = "SLOT-OF-THE-INSTRUCTION"


@dataclass(frozen=True)
class Template:
    """How an instruction is put to a model.

    Attributes:
        tokenizer: of the model.
        kind: "chat" for the tokenizer's chat template, "plain" for the instruction, a new line and "Answer:",
            or a function from an instruction to the text of the prompt.
    """

    tokenizer: Any
    kind: str | Callable[[str], str]

    def __post_init__(self) -> None:
        if self.kind == "chat" and not getattr(self.tokenizer, "chat_template", None):
            raise RegardError('the tokenizer has no chat template; give template="plain" or a function.')
        if not callable(self.kind) and self.kind not in ("chat", "plain"):
            raise RegardError(f"template is {self.kind!r}; it must be chat, plain or a function.")

    @property
    def name(self) -> str:
        """What a file calls it."""
        return self.kind if isinstance(self.kind, str) else getattr(self.kind, "__name__", "function")

    def text(self, instruction: str) -> str:
        """Return the prompt as text."""
        if self.kind == "chat":
            return self._chat([{"role": "user", "content": instruction}])
        return PLAIN.format(instruction) if isinstance(self.kind, str) else self.kind(instruction)

    def ids(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt's text; a chat template brings its own special tokens."""
        found = self.tokenizer(prompt, add_special_tokens=self.kind != "chat")["input_ids"]
        return [int(token) for token in found]

    def instruction_of(self, ids: list[int]) -> str:
        """Return the instruction in a prompt: the last turn of a chat, else the text as it stands.

        Args:
            ids: of the prompt, without padding.
        """
        text = str(self.tokenizer.decode(ids))
        before, _, after = self.text(SLOT).partition(SLOT)
        openings = [before] if text.startswith(before) else []
        if self.kind == "chat":
            turns = [("user", "FIRST"), ("assistant", "REPLY"), ("user", SLOT)]
            whole = self._chat([{"role": role, "content": content} for role, content in turns])
            openings.append(whole.partition("REPLY")[2].partition(SLOT)[0])
        starts = [
            text.rfind(opening) + len(opening) if opening else 0 for opening in openings if opening in text
        ]
        if starts and text.rstrip().endswith(after.rstrip()):
            return text[max(starts) :].rstrip().removesuffix(after.rstrip()).strip()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _chat(self, turns: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
