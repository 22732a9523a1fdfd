"""`regard run` of the two systems of adversarial attention: how a trained classifier bears perturbations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.cli.request import Request, SystemParser

LONGEST = 256


def labelled_command(parser: SystemParser) -> None:
    """Attack the attention of a trained classifier on texts with labels, and print how its accuracy falls
    with the length of the perturbation, beside random ones, and what its attention is like.
    """
    _shared(parser)
    add = parser.add_argument
    add(
        "--labelled",
        required=True,
        metavar="FILE|FOLDER",
        help=".csv, .tsv or .jsonl, or a folder of classes",
    )
    add("--text-column", default="text", metavar="NAME", help="(default: text)")
    add("--label-column", default="label", metavar="NAME", help="(default: label)")
    add("--held-out", type=float, default=0.2, metavar="SHARE", help="of each class, read (default: 0.2)")
    add("--lexicon", metavar="FILE", help="words that matter, one a line, to hold attention against")
    parser.set_defaults(run=attack)


def virtual_command(parser: SystemParser) -> None:
    """Perturb the attention of a trained classifier on texts without labels, and print how far its
    predictions move with the length: in the direction of virtual adversarial training, and at random.
    """
    _shared(parser)
    parser.add_argument(
        "--unlabelled", required=True, metavar="FILE", help="texts: .txt, a line each, or .csv, .tsv, .jsonl"
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="(default: text)")
    parser.add_argument("--power-steps", type=int, default=1, metavar="N", help="(default: 1)")
    parser.set_defaults(run=move)


def _shared(parser: SystemParser) -> None:
    parser.takes("model", "seed")
    parser.add_argument("--eps", metavar="LIST", help="lengths (default: 0,0.5,1,2,5,10)")
    parser.add_argument("--longest", type=int, default=LONGEST, metavar="N", help="tokens of a text (256)")


def attack(request: Request) -> dict[str, Any]:
    """Print the curve, and return it."""
    from regard.cli.attending_shown import judged, lines_of, parse_lengths
    from regard.tasks.text_files import read_labelled, read_lexicon

    options = request.options
    lengths = parse_lengths(options.eps)
    data = read_labelled(
        options.labelled, text=options.text_column, label=options.label_column, held_out=options.held_out,
        seed=options.seed,
    )  # fmt: skip
    words = frozenset() if options.lexicon is None else read_lexicon(options.lexicon)
    model = _classifier(request)
    _check_classes(model, data.names)
    told = judged(
        model, request.tokenizer, data, eps=lengths, words=words, longest=options.longest, seed=options.seed
    )
    for line in lines_of(told):
        request.say(line)
    return {"model": request.source.name, "data": options.labelled, **told}


def move(request: Request) -> dict[str, Any]:
    """Print how far predictions move, and return it."""
    from regard.cli.attending_shown import MOST, parse_lengths
    from regard.objectives.schedule import check_count
    from regard.tasks.text_files import read_unlabelled

    options = request.options
    lengths = [size for size in parse_lengths(options.eps) if size > 0]
    check_count("power-steps", options.power_steps, 1)
    texts = read_unlabelled(options.unlabelled, text=options.text_column).texts[:MOST]
    if not texts:
        raise RegardError(f"{options.unlabelled} has no text.")
    rows, still = _moved(_classifier(request), request, texts, lengths)
    request.say(f"  eps     KL, nats    at random   predictions changed   at random   ({len(texts)} texts)")
    for row in rows:
        request.say(
            f"{row['eps']:5g} {row['divergence']:12.4g} {row['random_divergence']:12.4g} "
            f"{row['changed']:18.1%} {row['random_changed']:13.1%}"
        )
    if still:
        request.say(f"{still} texts are not moved at all: of a single token, or told too surely.")
    return {"model": request.source.name, "texts": len(texts), "still": still, "moved": rows}


def _moved(
    model: Any, request: Request, texts: Sequence[str], lengths: Sequence[float]
) -> tuple[list[dict[str, float]], int]:
    """Rows by length, and how many texts no power step moves."""
    import torch

    from regard.cli.attending_shown import BATCH
    from regard.objectives.adversarial import AttentionVirtualAdversary, reach
    from regard.objectives.texts import coded

    port, options = reach(model), request.options
    sums = {size: [0.0] * 4 for size in lengths}
    still = 0
    batches = coded(request.tokenizer, [(text, 0) for text in texts], BATCH, options.longest)
    with request.progress("Perturbing", len(batches)) as advance:
        for batch in batches:
            inputs = {name: x.to(model.device) for name, x in batch.items() if name != "labels"}
            valid, logits_of = port.valid(inputs["attention_mask"]), port.reader(**inputs)
            with torch.no_grad():
                held = logits_of(tuple(torch.zeros(m.shape, device=m.device) for m in valid)).float()
            for at, size in enumerate(lengths):
                for place, variant in ((0, "vat"), (1, "random")):
                    adversary = AttentionVirtualAdversary(
                        eps=size, steps=options.power_steps, variant=variant,  # type: ignore[arg-type]
                    )  # fmt: skip
                    _, told = adversary(logits_of, valid, held)
                    with torch.no_grad():
                        now = logits_of(told.perturbation).argmax(1)
                    sums[size][place] += float(told.divergence.sum())
                    sums[size][place + 2] += int((now != held.argmax(1)).sum())
                    still += told.still if at == place == 0 else 0
            advance(1)
    names = ("divergence", "random_divergence", "changed", "random_changed")
    rows = [
        {"eps": size, **{n: v / len(texts) for n, v in zip(names, of, strict=True)}}
        for size, of in sums.items()
    ]
    return rows, still


def _classifier(request: Request) -> Any:
    import torch

    from regard.weights.classifier import check_classifier

    if request.options.model is None:
        raise RegardError(
            "--model is missing: a classifier that `regard train --labelled` wrote, or another."
        )
    check_classifier(request.model, request.source.name)
    torch.manual_seed(request.options.seed)
    return request.model


def _check_classes(model: Any, names: Sequence[str]) -> None:
    """Refuse data whose classes are not those of the model."""
    own = [model.config.id2label[number] for number in range(model.config.num_labels)]
    if own != list(names):
        raise RegardError(f"the model tells {', '.join(own)} apart, and the data has {', '.join(names)}.")
