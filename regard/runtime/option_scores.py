"""Which of its options a model answers: the log-likelihood of each after the prompt.

Only the logits that options need are computed: those of the last position where each is one token, else those
of as many last positions as the longest has tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.errors import RegardError
from regard.runtime.progress import bar
from regard.runtime.prompt import Prompt, takes_chat
from regard.runtime.protocol import Edit
from regard.runtime.segments import Mark
from regard.runtime.spans import Spans


@dataclass(frozen=True, eq=False)
class OptionScores:
    """Log-likelihoods of options.

    Attributes:
        log_probs: of each option's tokens after the prompt, summed, float32 [N, options]; -inf where a prompt
            has fewer options than another.
        tokens: how many tokens each has, int64 [N, options].
        right: which is right, int64 [N]; None where a prompt does not say.
    """

    log_probs: Tensor
    tokens: Tensor
    right: Tensor | None

    def scores(self, per_token: bool = False) -> Tensor:
        """Return the log-likelihoods, [N, options], divided by the number of tokens if so wanted."""
        return self.log_probs / self.tokens.clamp(min=1) if per_token else self.log_probs

    def chosen(self, per_token: bool = False) -> Tensor:
        """Return which option is likeliest, int64 [N]."""
        return self.scores(per_token).argmax(-1)

    def correct(self, per_token: bool = False) -> Tensor:
        """Return whether the likeliest is the right one, bool [N]."""
        return self.chosen(per_token) == self._known()

    def margin(self, per_token: bool = False) -> Tensor:
        """Return by how much the right option is likelier than the best other one, nats, [N]."""
        right, scores = self._known()[:, None], self.scores(per_token)
        others = scores.scatter(-1, right, -torch.inf)
        return scores.gather(-1, right)[:, 0] - others.amax(-1)

    def log_loss(self, per_token: bool = False) -> Tensor:
        """Return minus the log-probability of the right option among the options, nats, [N]."""
        chances = self.scores(per_token).log_softmax(-1)
        return -chances.gather(-1, self._known()[:, None])[:, 0]

    def _known(self) -> Tensor:
        if self.right is None:
            raise RegardError("it is not known which options are right; give right= to each Prompt.")
        return self.right


class _Row(NamedTuple):
    """A text to feed, with which of the options is scored at its end: `option` None for all of them."""

    prompt: int
    option: int | None
    text: str
    marks: list[Mark]
    length: int


def score_options(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    chat: bool | None = None,
    edits: Sequence[Edit] = (),
    batch_size: int = 16,
) -> OptionScores:
    """Score what each prompt may be answered with.

    Args:
        model: a causal language model of transformers, in `eval()`.
        tokenizer: its fast tokenizer.
        prompts: with two `options` at least each.
        chat: by the tokenizer's chat template; default whether it has one.
        edits: in force meanwhile; they find the parts of the prompts, and the option as `answer`, in
            `run.spans`.
        batch_size: rows at a time, padded on the left and sorted by length. A row is a prompt where all
            options are single tokens, else a prompt with an option.

    Raises:
        RegardError: for fewer than two options, two options of the same tokens, an option that does not begin
            with a token of its own, and as `encode_prompts`.

    Example:
        >>> asked = Prompt(question="Paris is in", options=["France", "Spain"], right=0)
        >>> score_options(model, tokenizer, [asked], chat=False).correct()      # doctest: +SKIP
        tensor([True])
    """
    if batch_size < 1:
        raise RegardError(f"batch_size is {batch_size}; it must be 1 or more.")
    templated = takes_chat(tokenizer, prompts, chat)
    written = [prompt.rendered(tokenizer if templated else None) for prompt in prompts]
    ids = [
        _answers(tokenizer, prompt, text, not templated)
        for prompt, (text, _) in zip(prompts, written, strict=True)
    ]
    most = max(len(each) for each in ids)
    log_probs = torch.full((len(prompts), most), -torch.inf)
    rows = _rows(tokenizer, prompts, written, ids, not templated)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    with bar("Scoring options", len(batches)) as forward:
        for batch in batches:
            _score(model, tokenizer, batch, ids, log_probs, edits, not templated)
            forward(1)
    tokens = torch.tensor([[len(a) for a in each] + [0] * (most - len(each)) for each in ids])
    known = [prompt.right for prompt in prompts]
    right = torch.tensor(known) if all(r is not None for r in known) else None
    return OptionScores(log_probs, tokens, right)


def _score(
    model: nn.Module,
    tokenizer: Any,
    batch: Sequence[_Row],
    ids: Sequence[list[list[int]]],
    log_probs: Tensor,
    edits: Sequence[Edit],
    special: bool,
) -> None:
    """Write the log-probabilities of a batch's options into `log_probs`."""
    inputs, spans = Spans._tokenized(
        tokenizer, [row.text for row in batch], [row.marks for row in batch], "left", special
    )
    keep = max(1 if row.option is None else len(ids[row.prompt][row.option]) + 1 for row in batch)
    said = _log_probs(model, inputs, spans, edits, keep)
    for at, row in enumerate(batch):
        if row.option is None:
            for number, answer in enumerate(ids[row.prompt]):
                log_probs[row.prompt, number] = said[at, -1, answer[0]]
        else:
            wanted = torch.tensor(ids[row.prompt][row.option])
            before = said[at, -len(wanted) - 1 : -1]
            log_probs[row.prompt, row.option] = before.gather(-1, wanted[:, None]).sum()


def _answers(tokenizer: Any, prompt: Prompt, text: str, special: bool) -> list[list[int]]:
    """Return the tokens of each answer where it stands, after a space if it needs one."""
    if len(prompt.answers) < 2:
        raise RegardError(f"a prompt has {len(prompt.answers)} options; a choice needs 2 at least.")
    front = tokenizer(text, add_special_tokens=special)["input_ids"]
    found = []
    for answer in prompt.answers:
        whole = tokenizer(text + _gap(text) + answer, add_special_tokens=special)["input_ids"]
        own = whole[len(front) :]
        if whole[: len(front)] != front or not own:
            raise RegardError(
                f"the option {answer!r} does not begin with a token of its own after {text[-20:]!r}."
            )
        found.append(own)
    if len({tuple(own) for own in found}) < len(found):
        raise RegardError(f"two of the options {', '.join(map(repr, prompt.answers))} are the same tokens.")
    return found


def _gap(text: str) -> str:
    return "" if text.endswith("(") or text[-1:].isspace() else " "


def _rows(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    written: Sequence[tuple[str, list[Mark]]],
    ids: Sequence[list[list[int]]],
    special: bool,
) -> list[_Row]:
    """Return what to feed, the shortest first."""
    rows = []
    single = all(len(answer) == 1 for each in ids for answer in each)
    for number, (prompt, (text, marks)) in enumerate(zip(prompts, written, strict=True)):
        if single:
            rows.append(_Row(number, None, text, marks, len(text)))
            continue
        for option, answer in enumerate(prompt.answers):
            whole = text + _gap(text) + answer
            mark = Mark("answer", len(whole) - len(answer), len(whole))
            rows.append(_Row(number, option, whole, [*marks, mark], len(whole)))
    return sorted(rows, key=lambda row: row.length)


def _log_probs(
    model: nn.Module, inputs: dict[str, Tensor], spans: Spans, edits: Sequence[Edit], keep: int
) -> Tensor:
    """Return the log-probabilities after the last `keep` positions, float32 [B, keep, V]."""
    from regard.runtime.verbs import steer

    device = next(model.parameters()).device
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": keep}
    fed = {name: value.to(device) for name, value in inputs.items() if name in known}
    fed.update({name: value for name, value in options.items() if name in known})
    with torch.no_grad():
        if edits:
            with steer(model, *edits, spans=dict(spans)):
                logits = model(**fed).logits
        else:
            logits = model(**fed).logits
    return logits[:, -keep:].float().log_softmax(-1).cpu()
