"""Short texts with a label each, to train small classifiers on: made reviews, and sentences of two novels.

Reviews are made of clauses. One decides: it praises or blames plainly, by a negation, or against what was
expected; the others tell nothing. Sentences are of Pride and Prejudice (label 0) and The Adventures of
Sherlock Holmes (1), the held-out ones of the last tenth of each, names left out. Status: our choice.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regard.errors import RegardError
from regard.tasks.corpus import novels

GOOD = (
    "wonderful", "moving", "clever", "charming", "bright", "superb", "honest", "gripping", "lovely", "fresh",
    "funny", "graceful",
)  # fmt: skip
BAD = (
    "dreadful", "dull", "clumsy", "tiresome", "bleak", "awful", "shallow", "tedious", "ugly", "stale",
    "sloppy", "lifeless",
)  # fmt: skip
THINGS = (
    "film", "plot", "music", "cast", "ending", "script", "acting", "story", "dialogue", "opening", "camera",
    "editing",
)  # fmt: skip
FILLERS = (
    "we saw it on a rainy tuesday", "the cinema was half full", "it runs for two hours",
    "my brother drove us home", "the tickets cost nine pounds", "it was made in france",
    "the director is from rome", "we sat near the back", "it opened last week", "they sell tea in the hall",
)  # fmt: skip
DECIDING = (
    ("the {thing} was {same}", "plain"),
    ("i found the {thing} {same}", "plain"),
    ("we all thought the {thing} was {same}", "plain"),
    ("it has such a {same} {thing}", "plain"),
    ("the {thing} was not {other}", "negated"),
    ("nobody could call the {thing} {other}", "negated"),
    ("i expected a {other} {thing} but it was {same}", "contrast"),
    ("it looked {other} at first and turned out {same}", "contrast"),
)  # fmt: skip
FRAME = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
NAME = re.compile(r"^(?:[A-Z][a-z]+)$")
SHORTEST, LONGEST = 8, 30


@dataclass(frozen=True)
class Labelled:
    """Texts with labels.

    Attributes:
        train, held_out: (text, label) each.
        names: of the labels.
    """

    train: tuple[tuple[str, int], ...]
    held_out: tuple[tuple[str, int], ...]
    names: tuple[str, ...]


def reviews(train: int = 2000, held_out: int = 200, *, seed: int = 0) -> Labelled:
    """Return made reviews, `bad` (0) or `good` (1), half of each.

    Example:
        >>> reviews(2, 1).train[0]
        ('the director is from rome . the music was not charming . the tickets cost nine pounds .', 0)
    """
    if train < 1 or held_out < 1:
        raise RegardError(f"train is {train} and held_out {held_out}; both must be at least 1.")
    source = random.Random(f"reviews/{seed}")
    made = [(_review(source, number % 2), number % 2) for number in range(train + held_out)]
    return Labelled(tuple(made[:train]), tuple(made[train:]), ("bad", "good"))


def _review(source: random.Random, label: int) -> str:
    template, _ = source.choice(DECIDING)
    words = {"same": source.choice(GOOD if label else BAD), "other": source.choice(BAD if label else GOOD)}
    clauses = [*source.sample(FILLERS, 2), template.format(thing=source.choice(THINGS), **words)]
    source.shuffle(clauses)
    return " . ".join(clauses) + " ."


def sentences(train: int = 4000, held_out: int = 400, *, seed: int = 0) -> Labelled:
    """Return sentences of 8 to 30 words of the two packaged novels, as many of each as there are at most."""
    parts: dict[str, list[tuple[str, int]]] = {"train": [], "held_out": []}
    source = random.Random(f"sentences/{seed}")
    for label, text in enumerate(novels().values()):
        cut = text.rfind("\n", 0, round(0.9 * len(text)))
        for name, part, count in (("train", text[:cut], train), ("held_out", text[cut:], held_out)):
            found = [s for s in map(_plain, re.split(r"(?<=[.!?;])\s+", part)) if _fits(s)]
            source.shuffle(found)
            parts[name] += [(s, label) for s in found[: count // 2]]
    for found_ in parts.values():
        source.shuffle(found_)
    return Labelled(tuple(parts["train"]), tuple(parts["held_out"]), ("Austen", "Doyle"))


def _plain(sentence: str) -> str:
    """Lower-case words, without names: words written large where no sentence begins."""
    words = re.findall(r"[A-Za-z']+", sentence)
    kept = [w for at, w in enumerate(words) if at == 0 or w == "I" or not NAME.match(w)]
    return " ".join(kept).lower()


def _fits(sentence: str) -> bool:
    return SHORTEST <= sentence.count(" ") + 1 <= LONGEST


def word_tokenizer(texts: Sequence[str], size: int = 2000, *, framed: bool = True) -> Any:
    """Return a tokenizer of transformers whose tokens are the commonest words of some texts.

    Args:
        texts: words between spaces.
        size: tokens at most, the four of the frame among them: [PAD] is 0.
        framed: whether a text is put between [CLS] and [SEP].

    Example:
        >>> found = word_tokenizer(["a b a", "c"], 7)
        >>> found("a c z")["input_ids"], found.pad_token_id
        ([2, 4, 6, 1, 3], 0)
    """
    from tokenizers import normalizers, pre_tokenizers

    words = (word for text in texts for word in text.lower().split())
    known = _commonest(Counter(words), size)
    return _tokenizer(known, normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit(), framed)


def text_tokenizer(texts: Sequence[str], size: int = 20_000, least: int = 2) -> Any:
    """Return a tokenizer of transformers of the words and signs of any texts.

    Words are lower-cased and digits become `qqq`, as in Kitada and Iyatomi (2020); there is no [CLS].

    Args:
        texts: of any kind.
        size: tokens at most, four of them special: [PAD] is 0.
        least: how many texts must have a word.

    Example:
        >>> found = text_tokenizer(["Good, in 1999!", "good in 7 ways!"])
        >>> found.convert_ids_to_tokens(found("Good? In 20!")["input_ids"])
        ['good', '[UNK]', 'in', 'qqq', '!']
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    normal = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\d+"), "qqq")])
    split = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update({word for word, _ in split.pre_tokenize_str(normal.normalize_str(text))})
    often = Counter({word: count for word, count in counts.items() if count >= least})
    return _tokenizer(_commonest(often, size), normal, split, framed=False)


def _commonest(counts: Counter[str], size: int) -> list[str]:
    return sorted(counts, key=lambda word: (-counts[word], word))[: size - len(FRAME)]


def _tokenizer(words: list[str], normal: Any, split: Any, framed: bool) -> Any:
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    known = {word: number for number, word in enumerate((*FRAME, *words))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.normalizer = normal
    tokenizer.pre_tokenizer = split
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
