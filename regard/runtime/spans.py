"""Which positions of a batch are what: system, facts, question, options, image, generated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.errors import NoSuchSite, RegardError, ShapeMismatch
from regard.runtime import segments
from regard.runtime.segments import Mark

if TYPE_CHECKING:
    from regard.engines.rows import RowBlock
    from regard.runtime.run import Run

Range = tuple[int, int]
IMAGE_IDS = ("image_token_id", "image_token_index")
VIDEO_IDS = ("video_token_id", "video_token_index")
GENERATED = "generated"


class Spans(Mapping[str, Tensor]):
    """Named sets of positions, each bool [B, S], over what is fed in the prefill, padding included.

    Given to `watch` or `steer` as `spans=`, they are found in `run.spans`, follow the beams, and stay
    where they are while `generate()` appends tokens; those are the span `generated`.

    Args:
        masks: name -> bool [B, S], or [S] for a single sequence.

    Raises:
        ShapeMismatch: where masks are not of one shape.

    Example:
        >>> mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
        >>> spans = Spans.from_ranges({"facts": [(0, 2)], "question": [(2, 4)]}, mask)
        >>> spans["facts"].int().tolist()
        [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks: dict[str, Tensor] = {}
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim not in (1, 2):
                found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
                raise ShapeMismatch(f"span {name!r} is {found}; it must be bool [B, S].")
            self._masks[name] = mask if mask.ndim == 2 else mask[None]
        shapes = {name: tuple(mask.shape) for name, mask in self._masks.items()}
        if len(set(shapes.values())) > 1:
            raise ShapeMismatch(f"spans must all be of one shape, and these are {shapes}.")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._masks:
            raise NoSuchSite(f"There is no span {name!r}; there are {', '.join(self._masks) or 'none'}.")
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def get(self, name: str, default: Any = None) -> Any:
        return self._masks.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __or__(self, other: Mapping[str, Tensor]) -> Spans:
        """Join with more spans of the same batch; a name that both have is the union."""
        joined = dict(self._masks)
        for name, mask in other.items():
            joined[name] = joined[name] | mask if name in joined else mask
        return Spans(joined)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {mask.sum(1).tolist()}" for name, mask in self.items())
        return f"Spans({sizes})"

    @classmethod
    def from_ranges(
        cls,
        ranges: Mapping[str, Sequence[Range] | Sequence[Sequence[Range]]],
        attention_mask: Tensor,
    ) -> Spans:
        """Build spans from ranges of absolute positions, the first real token 0, whatever the padding.

        Args:
            ranges: name -> list of `(start, stop)` for every sequence, or one such list a sequence.
            attention_mask: [B, S], 0 where padded on either side; `torch.ones_like(input_ids)` for none.

        Raises:
            RegardError: for a range outside the real tokens of a sequence.
        """
        valid = attention_mask.bool()
        order = valid.long().cumsum(1) - 1
        masks = {}
        for name, given in ranges.items():
            each = _per_sequence(name, given, len(valid))
            mask = torch.zeros_like(valid)
            for row, pieces in enumerate(each):
                length = int(valid[row].sum())
                for start, stop in pieces:
                    if not 0 <= start <= stop <= length:
                        raise RegardError(
                            f"span {name!r}: range ({start}, {stop}) in a sequence of {length} tokens."
                        )
                    mask[row] |= valid[row] & (order[row] >= start) & (order[row] < stop)
            masks[name] = mask
        return cls(masks)

    @classmethod
    def from_text(
        cls,
        tokenizer: Any,
        samples: Sequence[Sequence[tuple[str, str]]],
        *,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
    ) -> tuple[dict[str, Tensor], Spans]:
        """Tokenize texts given in named pieces, and tell which tokens are which piece.

        A token that crosses a boundary belongs to the piece of its first character that is no space.

        Args:
            tokenizer: a fast tokenizer, which knows the offsets of its tokens.
            samples: for each sequence its pieces in order, `[("facts", "..."), ("question", "...")]`. A
                name may come twice; pieces named "" belong to no span.
            padding_side: 'left' or 'right'; default the tokenizer's.
            add_special_tokens: as of the tokenizer.

        Returns:
            The model's inputs, and the spans.
        """
        texts, marks = [], []
        for pieces in samples:
            marks.append(segments.marks_of(pieces))
            texts.append("".join(text for _, text in pieces))
        return cls._tokenized(tokenizer, texts, marks, padding_side, add_special_tokens)

    @classmethod
    def from_chat(
        cls,
        tokenizer: Any,
        chats: Sequence[Sequence[Mapping[str, Any]]],
        *,
        add_generation_prompt: bool = True,
        padding_side: str | None = None,
    ) -> tuple[dict[str, Tensor], Spans]:
        """Apply the chat template, tokenize, and tell which tokens are which message's content.

        Spans are named by role ('system', 'user', 'assistant') and by role and number ('user.0'); what
        the template adds around the contents belongs to none. A content given as named pieces,
        `[("facts", "..."), ("question", "...")]`, gives a span for each name too.

        Args:
            tokenizer: a fast tokenizer with a chat template.
            chats: for each sequence its messages, `{"role": ..., "content": ...}`.
            add_generation_prompt: whether to open the assistant's turn.
            padding_side: 'left' or 'right'; default the tokenizer's.

        Raises:
            RegardError: where the template changed a content so that it is not found again.
        """
        texts, marks = [], []
        for chat in chats:
            text, found = segments.rendered(tokenizer, chat, add_generation_prompt)
            texts.append(text)
            marks.append(found)
        return cls._tokenized(tokenizer, texts, marks, padding_side, False)

    @classmethod
    def _tokenized(
        cls, tokenizer: Any, texts: list[str], marks: list[list[Mark]], side: str | None, special: bool
    ) -> tuple[dict[str, Tensor], Spans]:
        inputs, offsets = segments.tokenize(tokenizer, texts, side, special)
        names = dict.fromkeys(mark.name for found in marks for mark in found if mark.name)
        masks = {name: torch.zeros(offsets.shape[:2], dtype=torch.bool) for name in names}
        for row, found in enumerate(marks):
            first = segments.first_characters(texts[row], offsets[row])
            for mark in found:
                if mark.name:
                    masks[mark.name][row] |= (first >= mark.start) & (first < mark.stop)
        return inputs, cls(masks)

    @classmethod
    def from_images(
        cls,
        input_ids: Tensor,
        config: Any,
        *,
        per_image: Sequence[Sequence[int]] | None = None,
    ) -> Spans:
        """Find image (and video) tokens by the ids that a multimodal model's config names.

        Spans: 'image' is all of them, 'image.0', 'image.1', ... each image of a sequence, 'video'
        likewise, 'text' the rest (padding included). Unless `per_image` tells, an image is an unbroken
        row of image tokens; where a processor cuts an image into tiles with other tokens between, or
        puts two images side by side, tell.

        Args:
            input_ids: [B, S], as the processor expanded them.
            config: the model's config.
            per_image: for each sequence, how many image tokens each of its images has, tiles together.

        Raises:
            RegardError: where the config names no such id, or no token has it, or the counts differ.
        """
        ids = {"image": _id(config, IMAGE_IDS), "video": _id(config, VIDEO_IDS)}
        if ids["image"] is None and ids["video"] is None:
            raise RegardError(f"{type(config).__name__} has none of {', '.join(IMAGE_IDS + VIDEO_IDS)}.")
        masks: dict[str, Tensor] = {}
        for name, token in ids.items():
            here = input_ids == token if token is not None else None
            if here is None or not bool(here.any()):
                continue
            masks[name] = here
            masks.update(_numbered(name, here, per_image if name == "image" else None))
        if not masks:
            raise RegardError(
                f"No token of input_ids {tuple(input_ids.shape)} is an image token ({ids['image']}); give "
                "the ids as the model's processor returns them."
            )
        text = torch.ones_like(input_ids, dtype=torch.bool)
        for name in ids:
            if name in masks:
                text &= ~masks[name]
        return cls({**masks, "text": text})

    @classmethod
    def batch(cls, items: Sequence[Mapping[str, Tensor]], attention_mask: Tensor) -> Spans:
        """Put single sequences, unpadded, into a padded batch.

        Args:
            items: spans of each sequence, [1, S_i]; one that lacks a name has none of it.
            attention_mask: [B, S] of the batch, with S_i real positions in row i.
        """
        valid = attention_mask.bool()
        if len(items) != len(valid):
            raise ShapeMismatch(f"{len(items)} items were given for a batch of {len(valid)}.")
        names = dict.fromkeys(name for item in items for name in item)
        masks = {name: torch.zeros_like(valid) for name in names}
        for row, item in enumerate(items):
            for name, mask in item.items():
                if mask.shape != (1, int(valid[row].sum())):
                    raise ShapeMismatch(
                        f"span {name!r} of sequence {row} has shape {tuple(mask.shape)}, and the batch has "
                        f"{int(valid[row].sum())} real tokens there."
                    )
                masks[name][row, valid[row]] = mask[0].to(valid.device)
        return cls(masks)

    def repeat(self, times: int) -> Spans:
        """Repeat every sequence `times` times, as beams and several returned sequences do."""
        return Spans({name: mask.repeat_interleave(times, 0) for name, mask in self.items()})

    def select(self, index: Tensor | Sequence[int]) -> Spans:
        """Return the spans of sequences `index`, in that order."""
        return Spans({name: mask[torch.as_tensor(index)] for name, mask in self.items()})

    def positions(self, name: str) -> list[list[int]]:
        """Return the array indices of a span, a list for each sequence."""
        return [row.nonzero()[:, 0].tolist() for row in self[name]]


def span_at(run: Run, name: str, start: int, stop: int, batch: int) -> Tensor:
    """Return which of the array positions `start:stop` of a run are of a span, bool [batch, stop - start].

    Positions that were generated are of the span 'generated' alone. Where a run holds several beams a
    sequence, its spans are repeated for them.

    Raises:
        RegardError: where the run has no such span.
        ShapeMismatch: where the spans were made for another batch.
    """
    if name not in run.spans and not (name == GENERATED and run.spans):
        known = ", ".join(run.spans) or "none"
        raise RegardError(f"This run has no span {name!r}; it has {known}. Give spans= to watch or steer.")
    mask = run.spans.get(name)
    if mask is None:
        mask = torch.zeros_like(next(iter(run.spans.values())))
    ids = run.first_kwargs.get("input_ids")
    longer = isinstance(ids, Tensor) and ids.shape[1] > mask.shape[1] and not run.grows
    if batch % mask.shape[0] or longer:
        fed = tuple(ids.shape) if isinstance(ids, Tensor) else f"a batch of {batch}"
        raise ShapeMismatch(f"span {name!r} has shape {tuple(mask.shape)}, and the model is fed {fed}.")
    grown = mask.new_full((mask.shape[0], max(0, stop - mask.shape[1])), name == GENERATED)
    whole = torch.cat([mask, grown], 1)[:, start:stop]
    return whole.repeat_interleave(batch // mask.shape[0], 0)


def span_of_keys(block: RowBlock, name: str) -> Tensor:
    """Return which keys of a block are of span `name`, bool [B, K].

    Of an encoder-decoder the spans are over the encoder's input: no key of the decoder's own is of one.

    Raises:
        RegardError: where the run has no such span, or the block's keys are no tokens.
    """
    call, run = block.call, block.run
    offset = call.kv_offset
    batch = call.q.shape[0]
    kinds = ("text", "encoder", "decoder", *(["cross"] if call.main == "decoder" else []))
    if call.site.kind not in kinds:
        raise RegardError(f"Spans are over tokens, and the keys of {call.site.alias} are none.")
    spans = span_at(run, name, offset + block.key_start, offset + block.key_stop, batch)
    if call.site.kind == "decoder":
        spans = torch.zeros_like(spans)
    return spans.to(call.q.device)


def _per_sequence(name: str, given: Sequence[Any], batch: int) -> list[list[Range]]:
    items = list(given)
    if all(_is_range(item) for item in items):
        return [items] * batch
    if len(items) != batch or any(isinstance(item, tuple) for item in items):
        raise ShapeMismatch(
            f"span {name!r} has ranges for {len(items)} sequences, and the batch has {batch}; give a list of "
            "(start, stop), or one such list a sequence."
        )
    each = [list(item) if isinstance(item, Sequence) else [item] for item in items]
    wrong = next((pair for row in each for pair in row if not _is_range(pair)), None)
    if wrong is not None:
        raise RegardError(f"span {name!r} has the range {wrong!r}; a range is a tuple (start, stop).")
    return each


def _is_range(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(n, int) for n in pair)


def _id(config: Any, names: Iterable[str]) -> int | None:
    return next((v for n in names if isinstance(v := getattr(config, n, None), int)), None)


def _numbered(name: str, here: Tensor, counts: Sequence[Sequence[int]] | None) -> dict[str, Tensor]:
    """Masks of each image of every sequence, by unbroken rows or by token counts."""
    if counts is None:
        begins = here & ~torch.nn.functional.pad(here, (1, 0))[:, :-1]
        number = begins.long().cumsum(1) - 1
    else:
        total = here.sum(1).tolist()
        if len(counts) != len(here) or [sum(c) for c in counts] != total:
            raise RegardError(f"per_image is {list(map(list, counts))}, and the {name} tokens are {total}.")
        number = torch.full(here.shape, -1, device=here.device)
        for row, each in enumerate(counts):
            owner = torch.arange(len(each)).repeat_interleave(torch.tensor(list(each), dtype=torch.long))
            number[row, here[row]] = owner.to(here.device)
    most = int((number * here).amax()) + 1
    return {f"{name}.{i}": here & (number == i) for i in range(most)}
