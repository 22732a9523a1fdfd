"""The model `regard` of EleutherAI's lm-evaluation-harness: any model of `regard.load`, steered or swapped.

Importing this file registers it. The harness pads a batch on the right and does not tell the model, so that
an edit would take padding for text: under a change one sequence is run at a time.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from regard.cli.changes import Changes, parse_changes
from regard.errors import RegardError
from regard.runtime.anatomy import root_of
from regard.weights import Source

DEFAULT = "default"


@register_model("regard")
class RegardLM(HFLM):
    """A model of `regard.load`, which the harness asks for log-likelihoods and text.

    Args:
        pretrained: `default`, or what `regard.load` takes.
        edits: a file that `regard.save_edits` wrote for this model.
        swap: a mechanism with its options, as for `regard diff --swap`.
        dtype: of the weights, default float32.
        device: default the CPU.
        batch_size: 1 under a change.
        options: further ones of the harness' `hf`, such as `max_length` and `add_bos_token`.

    Raises:
        RegardError: where there is no such model, an edit or swap does not fit it, or the batch size is not 1
            under a change; all before weights are read.
    """

    def __init__(
        self,
        pretrained: str = DEFAULT,
        edits: str | None = None,
        swap: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str | None = 1,
        **options: Any,
    ) -> None:
        source = Source.find(None if pretrained == DEFAULT else pretrained)
        self.changes = _changes(source, edits, swap)
        if self.changes and str(batch_size or 1) != "1":
            raise RegardError(
                f"--batch_size is {batch_size}; under edits or a swap it must be 1, as the harness pads "
                "without telling the model."
            )
        model = source.read(None if dtype == "auto" else dtype, device)
        super().__init__(
            pretrained=model, tokenizer=source.tokenizer, batch_size=batch_size or 1, **options,
        )  # fmt: skip

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.changes:
            return super()._model_call(inps, *args, **kwargs)
        with self.changes.applied(self.model):
            return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.changes:
            return super()._model_generate(*args, **kwargs)
        with self.changes.applied(self.model):
            return super()._model_generate(*args, **kwargs)


def _changes(source: Source, edits: str | None, swap: str | None) -> Changes:
    from dataclasses import replace

    from regard.edit.files import load_edits

    if edits is None and swap is None:
        return Changes()
    skeleton = root_of(source.skeleton())
    changes = parse_changes(None, [swap] if swap else None)
    if edits is not None:
        changes = replace(changes, edits=load_edits(edits, skeleton))
    changes.check(skeleton)
    return changes
