"""One text, one model and one number of its output: what all explanations of a comparison are about.

    F(e)    a number of the model's output as a function of the token embeddings e [n, d]

A classifier's F is the probability or the logit of a class; a causal language model's, at the last token, of
a next token, or the difference of two next tokens. Padding is taken out before anything is computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from regard.errors import RegardError, UnsupportedModel, first_sentence

OUTPUTS = ("probability", "logit")
TOKENS_A_BATCH = 1024
HALVES = (torch.float16, torch.bfloat16)
Target = Any
"""`"predicted"`, a class or token by number or name, or two tokens whose logits are subtracted."""


class Scored(nn.Module):
    """F as a module: embeddings [B, n, d] to numbers [B].

    Args:
        model: takes `inputs_embeds`, and `attention_mask` where it knows it.
        chosen: ids of the class or token, or of two to be subtracted.
        of: "logit" or "probability".
    """

    def __init__(self, model: nn.Module, chosen: Sequence[int], of: str) -> None:
        super().__init__()
        self.model, self.chosen, self.of = model, tuple(chosen), of

    def logits(self, e: Tensor) -> Tensor:
        """Return the logits that F is taken of, [B, classes or vocabulary]."""
        return read_logits(self.model, e)

    def forward(self, e: Tensor) -> Tensor:
        logits = self.logits(e)
        if self.of == "probability":
            logits = logits.softmax(-1)
        picked = logits[:, list(self.chosen)]
        return picked[:, 0] if len(self.chosen) == 1 else picked[:, 0] - picked[:, 1]


@dataclass(frozen=True, eq=False)
class Subject:
    """What is explained.

    Attributes:
        score: F, as a module of embeddings [B, n, d].
        ids: int64 [1, n], without padding.
        tokens: the text of each.
        embedded: e, [1, n, d].
        baseline: e0, the embedding of the baseline at every position, [1, n, d].
        special: which tokens the tokenizer put around the text, bool [n].
        target: F in words.
        predicted: what the model predicts, in words.
        value, value_baseline: F(e) and F(e0).
        causal: whether it is a language model.
    """

    score: Scored
    ids: Tensor
    tokens: tuple[str, ...]
    embedded: Tensor
    baseline: Tensor
    special: tuple[bool, ...]
    target: str
    predicted: str
    value: float
    value_baseline: float
    causal: bool

    @property
    def model(self) -> nn.Module:
        return self.score.model

    @property
    def rows(self) -> int:
        """How many copies of the text share a forward."""
        return max(1, TOKENS_A_BATCH // len(self.tokens))

    def values(self, kept: Tensor) -> Tensor:
        """Return F where only some tokens keep their embedding and others have the baseline's.

        Args:
            kept: bool [N, n].

        Returns:
            float64 [N]; computed a few rows at a time, without gradients.
        """
        with torch.no_grad():
            found = [
                self.score(torch.where(part[..., None], self.embedded, self.baseline)).double().cpu()
                for part in kept.to(self.embedded.device).split(self.rows)
            ]
        return torch.cat(found)


def subject_of(
    model: nn.Module,
    tokenizer: Any,
    text: Any,
    target: Target = "predicted",
    *,
    baseline: Any = "pad",
    of: str | None = None,
) -> Subject:
    """Return what a text, a model and a target make.

    Args:
        model: in evaluation mode, float32 or float64; a classifier of sequences (logits [B, C]) or a causal
            language model (logits [B, T, V]) that takes `inputs_embeds`.
        tokenizer: of transformers; None where `text` is ids.
        text: words, or token ids [n].
        target: "predicted"; a class by number or by its name in the model's config; a next token by id or by
            its text, which must be one token; or two of these, whose scores are subtracted.
        baseline: what a token is replaced by: "pad", "zero", a token by id or text, or an embedding [d].
        of: "probability", the default of classifiers (as in the paper), or "logit", that of language models.

    Raises:
        UnsupportedModel: for a model that does not take embeddings, or whose logits are neither.
        RegardError: for a text that is empty or too long, an unknown target, and where there is no [PAD] and
            no other baseline was given.
    """
    _check_model(model)
    ids, special = _tokenized(tokenizer, text, model)
    embedding = _embedding(model)
    with torch.no_grad():
        embedded = embedding(ids)
        base = _baseline(embedding, tokenizer, baseline, model).to(embedded).expand_as(embedded)
        first, causal = _first(model, ids, embedded)
        of = of or ("logit" if causal else "probability")
        if of not in OUTPUTS:
            raise RegardError(f"of is {of!r}; it must be one of {', '.join(OUTPUTS)}.")
        best = int(first.argmax(-1))
        chosen = _targets(target, best, first.shape[-1], tokenizer, model, causal)
        score = Scored(model, chosen, of)
        value, value_baseline = score(torch.cat([embedded, base])).double().tolist()
    names = [_name(c, tokenizer, model, causal) for c in (*chosen, best)]
    return Subject(
        score, ids, _words(tokenizer, ids), embedded, base, special, f"{of} of {' - '.join(names[:-1])}",
        names[-1], value, value_baseline, causal,
    )  # fmt: skip


def read_logits(model: nn.Module, e: Tensor) -> Tensor:
    """Return the logits of embeddings [B, n, d] that stand for the whole text: [B, C].

    Those of a language model are at the last position.
    """
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    options = {name: value for name, value in options.items() if name in known}
    if "attention_mask" in known:
        options["attention_mask"] = torch.ones(e.shape[:2], dtype=torch.long, device=e.device)
    out = model(inputs_embeds=e, **options)
    logits = out if isinstance(out, Tensor) else out.logits
    return logits[:, -1] if logits.ndim == 3 else logits


def _check_model(model: nn.Module) -> None:
    name = type(model).__name__
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(
            f"{name} does not take inputs_embeds, and explanations replace embeddings of tokens."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; explain takes classifiers and causal models.")
    if model.training:
        raise RegardError(f"{name} is in training mode, so dropout would change its output; call .eval().")
    if any(p.dtype in HALVES for p in model.parameters()):
        raise RegardError(f"{name} is in half precision, where gradients underflow; load it in float32.")


def _tokenized(tokenizer: Any, text: Any, model: nn.Module) -> tuple[Tensor, tuple[bool, ...]]:
    device = next(model.parameters()).device
    if isinstance(text, str):
        if tokenizer is None:
            raise RegardError("words need a tokenizer; give one, or token ids.")
        if not text.strip():
            raise RegardError("the text is empty; give at least two tokens.")
        coded = tokenizer(text)
        ids = torch.tensor(coded["input_ids"], dtype=torch.long)
        if "attention_mask" in coded:
            ids = ids[torch.tensor(coded["attention_mask"], dtype=torch.bool)]
    else:
        ids = torch.as_tensor(text, dtype=torch.long).reshape(-1)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if len(ids) < 2:
        raise RegardError(f"the text has {len(ids)} token{'s' * (len(ids) != 1)}; give at least two.")
    if isinstance(longest, int) and len(ids) > longest:
        raise RegardError(f"the text has {len(ids)} tokens, and {type(model).__name__} takes {longest}.")
    marks = set(getattr(tokenizer, "all_special_ids", ()) or ())
    return ids[None].to(device), tuple(int(i) in marks for i in ids)


def _embedding(model: nn.Module) -> nn.Module:
    find = getattr(model, "get_input_embeddings", None)
    found = find() if callable(find) else None
    if not isinstance(found, nn.Module):
        raise UnsupportedModel(f"{type(model).__name__} has no get_input_embeddings() that gives a module.")
    return found


def _baseline(embedding: nn.Module, tokenizer: Any, given: Any, model: nn.Module) -> Tensor:
    """The embedding that stands for "no token", [d]."""
    table = cast(Tensor, embedding.weight)
    if isinstance(given, Tensor) and given.is_floating_point():
        if given.shape != table.shape[1:]:
            raise RegardError(f"baseline has shape {list(given.shape)}; embeddings are [{table.shape[1]}].")
        return given
    if given == "zero":
        return torch.zeros(table.shape[1])
    if given == "pad":
        given = getattr(tokenizer, "pad_token_id", None)
        if given is None:
            given = getattr(getattr(model, "config", None), "pad_token_id", None)
        if given is None:
            raise RegardError(
                "there is no [PAD] token to replace others by; give baseline=, such as 'zero' or a token."
            )
    token = _token(given, tokenizer, "baseline")
    if not 0 <= token < len(table):
        raise RegardError(f"baseline is token {token}; the model knows tokens 0 to {len(table) - 1}.")
    return embedding(torch.tensor(token, device=table.device))


def _token(given: Any, tokenizer: Any, what: str) -> int:
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    if not isinstance(given, str) or tokenizer is None:
        raise RegardError(f"{what} is {given!r}; give a token by its id, or by its text with a tokenizer.")
    if given in tokenizer.get_vocab():
        return int(tokenizer.get_vocab()[given])
    ids = tokenizer(given, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise RegardError(f"{what} is {given!r}, which is {len(ids)} tokens; give one token.")
    return int(ids[0])


def _first(model: nn.Module, ids: Tensor, embedded: Tensor) -> tuple[Tensor, bool]:
    """The logits [C] of the text as it is, and whether they are of next tokens; refuse what is neither."""
    name = type(model).__name__
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    try:
        out = model(input_ids=ids, **options)
        again = read_logits(model, embedded)[0]
    except RegardError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UnsupportedModel(
            f"{name} does not run on token ids alone ({first_sentence(error)})."
        ) from error
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        raise UnsupportedModel(f"{name} gives no logits [B, C] or [B, T, V], so there is nothing to explain.")
    causal = logits.ndim == 3
    generates = getattr(model, "can_generate", None)
    if causal and not (callable(generates) and generates()):
        raise UnsupportedModel(f"{name} gives logits at every token and does not generate; explain takes "
                               "classifiers of whole texts and causal language models.")  # fmt: skip
    row = logits[0, -1] if causal else logits[0]
    if not torch.allclose(row, again, rtol=1e-3, atol=1e-3 * float(row.abs().max())):
        raise UnsupportedModel(f"{name} gives other logits for embeddings than for the tokens they are of.")
    return row, causal


def _targets(
    target: Target, best: int, count: int, tokenizer: Any, model: nn.Module, causal: bool
) -> tuple[int, ...]:
    pair = isinstance(target, list | tuple)
    if pair and len(target) != 2:
        raise RegardError(f"target names {len(target)} outputs; give one, or two to be subtracted.")
    found = []
    for one in target if pair else (target,):
        if isinstance(one, str) and one == "predicted":
            number = best
        elif causal or isinstance(one, int):
            number = _token(one, tokenizer, "target")
        else:
            number = _class(one, model)
        if not 0 <= number < count:
            raise RegardError(f"target is {number}; the model's outputs are 0 to {count - 1}.")
        found.append(number)
    return tuple(found)


def _labels(model: nn.Module) -> dict[int, str]:
    return dict(getattr(getattr(model, "config", None), "id2label", None) or {})


def _class(name: Any, model: nn.Module) -> int:
    known = {label: number for number, label in _labels(model).items()}
    if name not in known:
        raise RegardError(
            f"target is {name!r}; give 'predicted', a number, or one of {', '.join(known) or 'no names'}."
        )
    return int(known[name])


def _name(number: int, tokenizer: Any, model: nn.Module, causal: bool) -> str:
    if not causal:
        return str(_labels(model).get(number, f"class {number}"))
    return repr(tokenizer.decode([number])) if tokenizer is not None else f"token {number}"


def _words(tokenizer: Any, ids: Tensor) -> tuple[str, ...]:
    if tokenizer is None:
        return tuple(f"#{int(i)}" for i in ids[0])
    return tuple(str(tokenizer.decode([int(i)])) for i in ids[0])
