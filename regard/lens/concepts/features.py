"""Hidden states at the position whose output is a word of interest, one a prompt.

    z_n = residual stream after block `layer`, at position i - 1     i: where the answer first has the word

The state belongs to the position that predicts the word, which is the one before it. Prompts whose answer
does not have the word are left out, and which were kept is kept with the states, so that those of two models
are paired by prompt.

Source: Khayatan et al., 2025, arXiv 2501.03012, section 3. Status: agrees with the official code (position of
the word, first occurrence); `position="last"` and `"mean"` are ours for `generating` without a word.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from regard.errors import NothingObserved, RegardError, ShapeMismatch
from regard.runtime.anatomy import anatomy_of, root_of
from regard.runtime.model_identity import identify
from regard.runtime.progress import bar
from regard.runtime.row_patch import collect
from regard.runtime.site import Point
from regard.runtime.table import write_bytes

Position = Literal["generating", "last", "mean"]
Layer = int | str
FINAL_NORM = "final_norm"
FORMAT = "regard features 1"


@dataclass(frozen=True, eq=False)
class Features:
    """Hidden states of prompts.

    Attributes:
        values: float32 [n, L, D], one for each prompt and layer.
        layers: numbers of blocks, aliases, or `final_norm`.
        samples: which of the prompts they are of, ascending.
        about: `model` (what `identify` says), `token`, `position`, `prompts`, how many there were; plain
            JSON.

    Raises:
        ShapeMismatch: where sizes do not agree.
    """

    values: Tensor
    layers: tuple[Layer, ...]
    samples: tuple[int, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = (len(self.samples), len(self.layers))
        if self.values.ndim != 3 or tuple(self.values.shape[:2]) != wanted:
            raise ShapeMismatch(
                f"values are {list(self.values.shape)}; {len(self.samples)} samples at {len(self.layers)} "
                f"layers take [{wanted[0]}, {wanted[1]}, D]."
            )

    def __len__(self) -> int:
        return len(self.samples)

    def at(self, layer: Layer | None = None) -> Tensor:
        """Return the states [n, D] of one layer; it may be left out where there is one alone.

        Raises:
            RegardError: for a layer that was not collected.
        """
        if layer is None and len(self.layers) == 1:
            return self.values[:, 0]
        if layer not in self.layers:
            raise RegardError(f"layer is {layer!r}; these states are of {', '.join(map(str, self.layers))}.")
        return self.values[:, self.layers.index(layer)]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save

        told = {"layers": list(self.layers), "samples": list(self.samples), "about": self.about}
        note = {"format": FORMAT, "told": json.dumps(told)}
        write_bytes(path, save({"values": self.values.contiguous()}, note))

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Read what `save` wrote.

        Raises:
            RegardError: for a file that cannot be read, or holds something else.
        """
        tensors, told = read_tensors(path, FORMAT, "features")
        return cls(tensors["values"], tuple(told["layers"]), tuple(told["samples"]), told["about"])


def collect_features(
    model: nn.Module,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    tokenizer: Any,
    layers: Sequence[Layer],
    token: str | None = None,
    answers: Sequence[str] | None = None,
    generate: int = 0,
    position: Position = "generating",
    batch: int = 8,
    progress: bool = True,
) -> Features:
    """Return the hidden states of prompts.

    Args:
        model: a causal language model of transformers, one that reads images included, in evaluation mode.
        prompts: texts; or keyword arguments of the model's forward for one sample each, batch 1, such as a
            processor makes them with `pixel_values`. These cannot take `answers`.
        tokenizer: of the model, or its processor.
        layers: numbers of blocks, aliases, or `final_norm`.
        token: the word of interest, such as `dog`; as the first token of a word, with or without a space
            before it. None takes every prompt.
        answers: a text to follow each prompt, which the model is made to read: the word is looked for in it.
        generate: at most so many tokens, greedily, as the answer in place of that; 0 reads prompts alone, and
            looks for the word in them.
        position: `generating`, the state that the word comes of; without a word, that which the first token
            of the answer comes of. `last`, of the last token; `mean`, over the answer, or over all tokens.
        batch: prompts at once.
        progress: whether a bar is shown, where stderr is a terminal.

    Raises:
        RegardError: for no prompts, an unknown position, answers of another number, or both kinds of answer.
        NothingObserved: where no answer has the word; it says how many were looked at.
        NoSuchSite: for a layer that is not there.
    """
    _check(prompts, answers, generate, position, layers)
    root = root_of(model)
    anatomy = anatomy_of(root)
    points = [Point(FINAL_NORM) if layer == FINAL_NORM else Point("residual", layer) for layer in layers]
    for point in points:
        anatomy.place(point)
    wanted = None if token is None else first_tokens(getattr(tokenizer, "tokenizer", tokenizer), token)
    found: list[Tensor] = []
    kept: list[int] = []
    with bar("Reading prompts", len(prompts), progress) as advance:
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            told = None if answers is None else answers[start : start + batch]
            for index, (inputs, begins) in _batches(root, tokenizer, some, told, generate):
                states = collect(root, {**inputs, **_last_logits(root)}, points)
                for row, number in enumerate(index):
                    places = _places(inputs, row, begins[row], wanted, position)
                    if places is not None:
                        one = torch.stack([states[point][row, places].float().mean(0) for point in points])
                        found.append(one.cpu())
                        kept.append(start + number)
            advance(len(some))
    if not found:
        raise NothingObserved(f"{token!r} is in 0 of {len(prompts)} answers, so there is no state to take.")
    order = sorted(range(len(kept)), key=kept.__getitem__)
    about = {"model": identify(root), "token": token, "position": position, "prompts": len(prompts)}
    values = torch.stack([found[i] for i in order])
    return Features(values, tuple(layers), tuple(kept[i] for i in order), about)


def first_tokens(tokenizer: Any, word: str) -> set[int]:
    """Return the ids that a word may begin with, in a text and after a space.

    Where neither form is one token its first piece counts, and a warning says so.

    Raises:
        RegardError: for a word without tokens.
    """
    forms = [tokenizer(f, add_special_tokens=False)["input_ids"] for f in (" " + word.strip(), word.strip())]
    forms = [ids for ids in forms if ids]
    if not word.strip() or not forms:
        raise RegardError(f"token is {word!r}; it must be a word.")
    whole = {ids[0] for ids in forms if len(ids) == 1}
    if not whole:
        pieces = tokenizer.convert_ids_to_tokens(forms[0])
        warnings.warn(f"{word!r} is {len(pieces)} tokens, {pieces}; the first counts.", stacklevel=3)
        whole = {forms[0][0]}
    return whole


def read_tensors(path: str | Path, form: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a safetensors file of ours, and what is told with them.

    Raises:
        RegardError: for a file that cannot be read, or of another form.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            note = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RegardError(f"{path} cannot be read: {error}.") from None
    if note.get("format") != form:
        raise RegardError(f"{path} holds no {what} that regard saved.")
    return tensors, json.loads(note["told"])


def _check(prompts: Any, answers: Any, generate: int, position: str, layers: Sequence[Layer]) -> None:
    if not len(prompts) or not len(layers):
        raise RegardError(f"there are {len(prompts)} prompts and {len(layers)} layers; give one of each.")
    if position not in get_args(Position):
        raise RegardError(f"position is {position!r}; it must be one of {', '.join(get_args(Position))}.")
    if answers is not None and (generate or len(answers) != len(prompts)):
        raise RegardError(
            f"there are {len(answers)} answers to {len(prompts)} prompts, and generate is {generate}; give "
            "an answer to each, or none and generate=N."
        )
    if answers is not None and not all(isinstance(prompt, str) for prompt in prompts):
        raise RegardError("answers follow prompts that are texts; put them into the inputs, or generate.")


def _batches(root: nn.Module, tokenizer: Any, prompts: Any, answers: Any, generate: int) -> Any:
    """Yield (numbers, (inputs, where the answer of each begins)); rows of texts are padded on the right."""
    device = next(root.parameters()).device
    mappings = [(n, p) for n, p in enumerate(prompts) if not isinstance(p, str)]
    for number, one in mappings:
        inputs = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in one.items()}
        begin = inputs["input_ids"].shape[1]
        yield [number], (_answered(root, inputs, generate) if generate else inputs, [begin])
    texts = [(n, p) for n, p in enumerate(prompts) if isinstance(p, str)]
    if not texts:
        return
    rows, begins = [], []
    for number, text in texts:
        ids = tokenizer(text)["input_ids"]
        begins.append(len(ids))
        if answers is not None:
            ids = ids + tokenizer(answers[number], add_special_tokens=False)["input_ids"]
        elif generate:
            prompt = torch.tensor([ids], device=device)
            made = _answered(root, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, generate)
            ids = made["input_ids"][0].tolist()
        rows.append(ids)
    if answers is None and not generate:
        begins = [0] * len(rows)
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(rows):
        ids[row, : len(one)], mask[row, : len(one)] = torch.tensor(one), 1
    yield [n for n, _ in texts], ({"input_ids": ids.to(device), "attention_mask": mask.to(device)}, begins)


@torch.no_grad()
def _answered(root: Any, inputs: dict[str, Any], most: int) -> dict[str, Any]:
    """The inputs with the model's own answer behind them."""
    before = inputs["input_ids"]
    whole = root.generate(**inputs, max_new_tokens=most, do_sample=False)
    grown = dict(inputs)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.shape == before.shape and name != "input_ids":
            fill = torch.full_like(whole, int(name == "attention_mask"))
            grown[name] = torch.cat([x, fill[:, before.shape[1] :].to(x.dtype)], 1)
    return {**grown, "input_ids": whole}


def _places(
    inputs: Mapping[str, Any], row: int, begin: int, wanted: set[int] | None, position: str
) -> list[int] | None:
    """Which positions of a row are meant; None where the word is not in the answer."""
    ids = inputs["input_ids"][row].tolist()
    mask = inputs.get("attention_mask")
    real = [i for i in range(len(ids)) if mask is None or bool(mask[row, i])]
    answer = [i for i in real if i >= begin]
    at = None
    if wanted is not None:
        at = next((i for i in answer if ids[i] in wanted and i > real[0]), None)
        if at is None:
            return None
    if position == "mean":
        return answer or real
    if position == "last":
        return real[-1:]
    if at is not None:
        return [at - 1]
    return [begin - 1] if begin else real[-1:]


def _last_logits(root: nn.Module) -> dict[str, int]:
    known = inspect.signature(root.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}
