"""The work behind `regard diff`: two sides over the same tokens, and the control beside them."""

from __future__ import annotations

import inspect as signatures
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from regard.cli import effects
from regard.cli.effects import EFFECTS, Effects, Flow
from regard.cli.looking import PROBE_LENSES, PROBE_SEED, Look
from regard.cli.parts import Places
from regard.errors import NothingObserved, RegardError
from regard.runtime.difference import Difference, difference, heads_of
from regard.runtime.protocol import Lens
from regard.weights.quiet import busy

PREDICTED = 256
SHORTEST = 8


@dataclass
class Side:
    """One model, or one model under changes, on the text and on the probe.

    Attributes:
        name: in words.
        size: layers, heads and class, in words.
        main, probe: results by lens.
        prediction: log-probabilities of the token after each of the last positions, [K, V]; None where
            the model predicts no tokens.
        flow: what heads attend to and give.
        generated: token ids that the model goes on with; None where not asked for.
    """

    name: str
    size: str
    main: dict[str, Any]
    probe: dict[str, Any]
    prediction: Tensor | None = None
    flow: Flow = field(default_factory=Flow)
    generated: list[int] | None = None


@dataclass
class Prediction:
    """How the next-token distributions of two sides differ, in nats, over the last positions of the text.

    Attributes:
        positions: how many.
        loss_before, loss_after: mean negative log-probability of the text's own next token.
        divergence: mean Kullback-Leibler divergence of after from before.
        agreement: share of positions with the same likeliest token.
    """

    positions: int
    loss_before: float
    loss_after: float
    divergence: float
    agreement: float


@dataclass
class Comparison:
    """Everything that `regard diff` found.

    Attributes:
        text: per lens, on the text; `probe`: likewise, on the random tokens.
        prediction: None where either side predicts no tokens.
        effects: attention by span, head outputs, next tokens, generated text.
    """

    before: Side
    after: Side
    text: dict[str, Difference]
    probe: dict[str, Difference] = field(default_factory=dict)
    prediction: Prediction | None = None
    effects: Effects = field(default_factory=lambda: Effects(None, None))

    @property
    def differences(self) -> dict[str, tuple[Difference, bool]]:
        """Each lens' difference, on the probe where it asks for it, and whether it is that."""
        return {name: (self.probe.get(name, d), name in self.probe) for name, d in self.text.items()}


def look_at(
    look: Look, lenses: dict[str, Lens], layers: list[int] | None, named: bool, name: str, go_on: int = 0
) -> Side:
    """Run the lenses over the text and the probe.

    Args:
        named: whether the user named the lenses: each must then have something to say.
        go_on: how many tokens to generate after the text.
    """
    main = look.at_text({**lenses, EFFECTS: effects.Flows()}, layers, named)
    flow = main.pop(EFFECTS)
    probe, prediction, generated = look.at_probe(lenses, layers), predict(look), None
    if go_on:
        with busy(f"Generating {go_on} tokens"):
            generated = effects.generate(look.model, look.ids, go_on)
    return Side(name, look.size, main, probe, prediction, flow, generated)


def control(
    look: Look, lenses: dict[str, Lens], layers: list[int] | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return results on the two halves of the text, and on two probes: how much a change of text does."""
    half = look.tokens // 2
    lenses = {name: lens for name, lens in lenses.items() if name != "report"}
    if half < SHORTEST:
        return {}, {}, {}, {}
    halves = [
        look.run(ids, lenses, layers, "Reading a half, as a control", False)
        for ids in (look.ids[:, :half], look.ids[:, half : 2 * half])
    ]
    probes = [look.at_probe(lenses, layers, seed) for seed in (PROBE_SEED, PROBE_SEED + 1)]
    return halves[0], halves[1], probes[0], probes[1]


def predict(look: Look) -> Tensor | None:
    """Return the log-probabilities of what comes after each of the last positions, [K, V] on the CPU."""
    parameters = signatures.signature(look.model.forward).parameters
    options: dict[str, Any] = {name: False for name in ("use_cache",) if name in parameters}
    if "logits_to_keep" in parameters:
        options["logits_to_keep"] = PREDICTED
    with torch.no_grad():
        logits = getattr(look.model(input_ids=look.ids, **options), "logits", None)
    if logits is None or logits.ndim != 3:
        return None
    return logits[0, -PREDICTED:].float().log_softmax(-1).cpu()


def compare(
    before: Side, after: Side, look: Look, texts: tuple[dict[str, Any], ...], places: Places
) -> Comparison:
    """Compare two sides.

    Args:
        look: the text, and the tokenizer.
        texts: what `control` gave.
        places: the spans of the text.

    Raises:
        NothingObserved: where no lens has numbers per head on both sides.
    """
    found = _differences(before.main, after.main, texts[0], texts[1])
    if not found:
        raise NothingObserved("None of the lenses has numbers per head on both sides; name another --lens.")
    probe = {
        name: d
        for name, d in _differences(before.probe, after.probe, texts[2], texts[3]).items()
        if name in PROBE_LENSES
    }
    told = _effects(before, after, look, places)
    return Comparison(before, after, found, probe, _prediction(before, after, look.ids), told)


def _effects(before: Side, after: Side, look: Look, places: Places) -> Effects:
    found = Effects(*effects.flows_changed(before.flow, after.flow, places))
    first, second = before.prediction, after.prediction
    if first is not None and second is not None and first.shape == second.shape:
        found.next_tokens, found.divergence = effects.next_tokens(first, second, look.tokenizer)
        found.turns = effects.turns(first, second, look.ids, look.tokenizer)
    if before.generated is not None and after.generated is not None:
        pairs = zip(before.generated, after.generated, strict=False)
        found.shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        found.generated = (
            look.tokenizer.decode(before.generated), look.tokenizer.decode(after.generated),
        )  # fmt: skip
    return found


def check_alike(first: Look, second: Look) -> None:
    """Refuse two models that cannot be compared head by head, over the same tokens.

    Raises:
        RegardError: saying how they differ.
    """
    if first.ids.shape != second.ids.shape or not torch.equal(first.ids.cpu(), second.ids.cpu()):
        raise RegardError(
            f"The tokenizers of {first.name} and {second.name} cut the text into other tokens "
            f"({first.tokens} and {second.tokens}), so their heads do not see the same input."
        )
    heads = [{s.alias: s.heads for s in look.anatomy.sites} for look in (first, second)]
    if heads[0] != heads[1]:
        raise RegardError(
            f"{first.name} has {first.size} and {second.name} {second.size}; diff compares head by head, "
            "so both must have the same layers and heads."
        )


def _differences(
    before: dict[str, Any], after: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> dict[str, Difference]:
    found = {}
    for name, result in before.items():
        sides = (heads_of(result), heads_of(after.get(name)))
        if sides[0] is None or sides[1] is None:
            continue
        texts = (heads_of(first.get(name)), heads_of(second.get(name)))
        noise = (texts[0], texts[1]) if texts[0] is not None and texts[1] is not None else None
        found[name] = difference(sides[0], sides[1], noise)
    return found


def _prediction(before: Side, after: Side, ids: Tensor) -> Prediction | None:
    first, second = before.prediction, after.prediction
    if first is None or second is None or first.shape != second.shape:
        return None
    told = ids[0, 1:].cpu()[-(len(first) - 1) :] if len(first) > 1 else ids[0, :0].cpu()
    losses = [-side[: len(told)].gather(1, told[:, None]).mean() for side in (first[:-1], second[:-1])]
    return Prediction(
        positions=len(first),
        loss_before=float(losses[0]),
        loss_after=float(losses[1]),
        divergence=float((first.exp() * (first - second)).sum(-1).mean()),
        agreement=float((first.argmax(-1) == second.argmax(-1)).float().mean()),
    )
