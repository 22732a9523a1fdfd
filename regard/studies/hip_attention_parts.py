"""The parts of the study of HiP: ways to choose keys at one budget, a key asked for, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention import Context, HiP
from regard.attention.hip import HiPAttention, HiPMask
from regard.attention.hip.search import search, spans_of
from regard.attention.layout import Layout
from regard.attention.select import kept_mass, oracle_scores, recall, routing_scores, top_k
from regard.attention.swap import swap
from regard.models.tiny_llama import tiny_llama
from regard.runtime.call import Call
from regard.runtime.protocol import EVERYTHING, Lens, Wanted
from regard.runtime.verbs import watch
from regard.tasks.corpus import packaged
from regard.tasks.passkey import Passkey

VOCABULARY, ROWS, HEAVIEST, EVERY = 512, 256, 64, 3
Choose = Callable[[Tensor, Tensor, Layout, HiP], Tensor]


def subject(tiny: bool) -> tuple[Any, Any]:
    """Return SmolLM2, or a tiny random model in its place, and its tokenizer."""
    if tiny:
        torch.manual_seed(0)
        return tiny_llama(packaged(VOCABULARY))
    load: Any = import_module("regard").load
    model, tokenizer = load()
    return model.eval(), tokenizer


def by_chance(q: Tensor, k: Tensor, layout: Layout, spec: HiP) -> Tensor:
    """What the tree finds by scores of noise."""
    return search(torch.randn_like(q), torch.randn_like(k), layout, spec)


def by_oracle(q: Tensor, k: Tensor, layout: Layout, spec: HiP) -> Tensor:
    """The blocks of the span to which dense attention of a query block gives the most weight in all."""
    found = []
    ends, spans = layout.ends(spec.query_block)[0].tolist(), spans_of(layout, spec)[0].tolist()
    for number, (end, span) in enumerate(zip(ends, spans, strict=True)):
        rows = q[:, :, number * spec.query_block : (number + 1) * spec.query_block]
        places = torch.arange(end - rows.shape[2], end)[:, None]
        keys = torch.arange(end)
        scores = routing_scores(rows, k[:, :, :end], q.shape[-1] ** -0.5)
        weights = scores.masked_fill(keys > places, -torch.inf).softmax(-1)
        far = oracle_scores(weights * (keys <= places - spec.window), spec.key_block).sum(2)
        first = spec.sink // spec.key_block
        within = far[..., first : first + span]
        chosen = top_k(within, -(-spec.k // spec.key_block))
        found.append(torch.where(chosen < 0, -1, chosen + first))
    return torch.stack(found, 2)


def none(q: Tensor, k: Tensor, layout: Layout, spec: HiP) -> Tensor:
    """Nothing but window and first tokens."""
    return torch.empty(*q.shape[:2], -(-q.shape[2] // spec.query_block), 0, dtype=torch.int64)


CHOICES: dict[str, Choose] = {"random": by_chance, "oracle": by_oracle, "window": none}


class Chosen(HiPAttention):
    """HiP attention in which something else than the search chooses."""

    def __init__(self, spec: Choosing) -> None:
        super().__init__(spec)
        self.choose = CHOICES[spec.way]

    def chosen(self, q: Tensor, k: Tensor, ctx: Context, layout: Layout | None = None) -> Tensor:
        layout = layout or Layout.of(ctx, q.shape[2], k.shape[2], q.device)
        return self.choose(q, k, layout, self.spec)


@dataclass(frozen=True, kw_only=True)
class Choosing(HiP):
    """HiP whose key blocks are chosen in another way, one of `CHOICES`."""

    way: str

    def build(self, site: Any = None) -> Any:
        built = super().build(site)
        return Chosen(self) if isinstance(built, HiPAttention) else built


def spec_of(way: str, *, k: int, window: int, dense_layers: int) -> HiP:
    """Return the options of a way, all of one budget of keys a query."""
    spec: dict[str, Any] = {
        "k": k, "window": window, "sink": 16, "query_block": 32, "key_block": 2, "dense_layers": dense_layers
    }  # fmt: skip
    if way in ("tree", "refresh"):
        return HiP(**spec, refresh=8 if way == "refresh" else 1)
    return Choosing(**{**spec, "window": k + window if way == "window" else window}, way=way)


@contextmanager
def attending(model: Any, way: str, **options: Any) -> Iterator[None]:
    """Let a model attend in a way; "dense" leaves it as it is."""
    with nullcontext() if way == "dense" else swap(model, spec_of(way, **options)):
        yield


@torch.no_grad()
def exactness(model: Any, tokenizer: Any, length: int, seed: int) -> dict[str, float]:
    """Return how far logits are from the model's own where all is found, and where little is."""
    ids, _ = Passkey(length=length, depth=0.5, seed=seed).ids(tokenizer)
    expected = model(ids, use_cache=False).logits

    def off(spec: HiP) -> float:
        with swap(model, spec):
            return float((model(ids, use_cache=False).logits - expected).abs().max())

    whole = HiP(k=length, window=16, sink=16, query_block=32, dense_layers=0)
    return {"error": off(whole), "unlike": off(replace(whole, k=8))}


@torch.no_grad()
def asked(
    model: Any,
    tokenizer: Any,
    key: Passkey,
    way: str,
    *,
    k: int,
    window: int,
    dense_layers: int,
    kept: Sequence[str],
) -> dict[str, Any]:
    """Ask for a key in a way, "dense" or one of `spec_of`, and return what came out, as `answered` does.

    Args:
        kept: ways of which is told what they keep of the model's attention, in every third layer: `kept` and
            `recall`, way -> a number a layer.
    """
    prompt, answer = key.ids(tokenizer)
    options = {"k": k, "window": window, "dense_layers": dense_layers}
    keeping = Keeping(specs={name: spec_of(name, **options) for name in kept}, first=dense_layers)
    looking = watch(model, keeping) if kept else nullcontext()
    with attending(model, way, **options), looking:
        found: dict[str, Any] = answered(model, prompt, answer)
    if kept:
        for place, what in enumerate(("kept", "recall")):
            found[what] = {name: [told[place] for told in seen] for name, seen in keeping.seen.items()}
    return found


def answered(model: Any, prompt: Tensor, answer: Tensor) -> dict[str, float]:
    """Generate an answer from a prompt, and return how that went.

    Returns:
        `key`, the mean log-probability of the answer's tokens, each after those before it; `right`, whether
        each is the likeliest; `loss`, the loss on the later half of the prompt.
    """
    states: list[Tensor] = []

    def read(module: Any, given: Any, out: Any) -> None:
        states.append(out.last_hidden_state)

    def only(batch: int, ids: Tensor) -> list[int]:
        return [int(answer[0, len(ids) - prompt.shape[1]])]

    hook = model.base_model.register_forward_hook(read)
    try:
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=answer.shape[1], do_sample=False,
            eos_token_id=None, pad_token_id=0, prefix_allowed_tokens_fn=only, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    finally:
        hook.remove()
    logits = torch.stack(out.logits, 1)[0].float()  # [A, vocabulary]
    at = torch.arange(len(logits))
    half = prompt.shape[1] // 2
    late = model.get_output_embeddings()(states[0][0, half:-1]).float()
    return {
        "key": float(logits.log_softmax(-1)[at, answer[0]].mean()),
        "right": float((logits.argmax(-1) == answer[0]).all()),
        "loss": float(F.cross_entropy(late, prompt[0, half + 1 :])),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class Keeping(Lens):
    """Measures what ways to choose keep of dense attention, in every third layer from `first` on."""

    specs: dict[str, HiP]
    first: int
    seen: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def wants(self, call: Call) -> Wanted | None:
        after = call.site.layer - self.first
        return EVERYTHING if call.query_length > 1 and after >= 0 and after % EVERY == 0 else None

    def inputs(self, call: Call) -> None:
        for name, spec in self.specs.items():
            self.seen.setdefault(name, []).append(what_is_kept(call.q, call.k, spec))


def what_is_kept(q: Tensor, k: Tensor, spec: HiP) -> tuple[float, float]:
    """Return the share of dense attention that a way keeps, and of the heaviest far keys that it finds.

    Args:
        q: [1, H, T, D], k [1, Hkv, T, D]. The last `ROWS` queries are asked, and all heads. Keys are far
            that are neither among the last quarter nor the first tokens of a sequence.
    """
    length, rows = q.shape[2], min(ROWS, q.shape[2])
    ctx = Context.of(q, k)
    layout = Layout.of(ctx, length, length, q.device)
    index = spec.build().chosen(q, k, ctx, layout)
    seen = HiPMask(index, layout, spec).to_dense()[:, :, -rows:]
    i, j = torch.arange(length - rows, length)[:, None], torch.arange(length)
    scores = routing_scores(q[:, :, -rows:], k, q.shape[-1] ** -0.5).masked_fill_(j > i, -torch.inf)
    weights = scores.softmax(-1)
    far = (j >= spec.sink) & (i - j >= length // 4)
    return float(kept_mass(weights, seen).mean()), float(recall(weights, seen, HEAVIEST, far).mean())
