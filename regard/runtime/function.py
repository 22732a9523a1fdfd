"""The attention function registered with transformers under the name `regard`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from regard.runtime import pipeline
from regard.runtime.anatomy import lone_site
from regard.runtime.attachment import BY_MODULE, Attachment, in_backward
from regard.runtime.call import CACHED, Call, call_from_interface
from regard.runtime.permanent import permanent_edits
from regard.runtime.protocol import Edit, Lens
from regard.runtime.run import Run
from regard.runtime.site import Site


class _Dense(Lens):
    """Collects the whole matrix of weights of one call, for `output_attentions=True`."""

    def weights(self, block: Any) -> None:
        call: Call = block.call
        store = call.extra.get("dense")
        if store is None:
            shape = (call.q.shape[0], call.heads, call.query_length, call.key_length)
            store = call.extra["dense"] = block.weights.new_zeros(shape)
        store[:, :, block.start : block.stop, block.key_start : block.key_stop] = block.weights


def regard_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Serve one attention call of a transformers model; the signature is that of `AttentionInterface`.

    Args:
        module: the attention module.
        query: [B, H, T, D], after rotary embedding.
        key, value: [B, Hkv, S, D], cache included, not repeated.
        attention_mask: a `LazyMask`, a 4-D tensor (bool, or additive float) or None.
        options: `scaling`, `dropout`, `softcap`, `s_aux`, `position_bias`, `is_causal`, ...

    Returns:
        Output [B, T, H, Dv], and the weights [B, H, T, S] where the model was asked for attentions.
    """
    attachment = BY_MODULE.get(module)
    lenses: list[Lens] = []
    if attachment is None:
        site = lone_site(module)
        run, edits = Run(), permanent_edits(module)
    else:
        site = attachment.sites[module]
        run, edits, lenses = stages_for(attachment, site)
        edits = [*permanent_edits(module), *edits]
    call = call_from_interface(run, site, query, key, value, attention_mask, options)
    _number(call, attachment)
    if run.kwargs.get("output_attentions") or _wants_weights(options):
        lenses = [*lenses, _Dense()]
    out = pipeline.perform(call, edits, lenses)
    if attachment is not None:
        attachment.served.update(map(id, call.served))
    weights = call.extra.get("dense")
    if weights is not None:
        weights = weights.to(query.dtype)
    return out.transpose(1, 2).contiguous(), weights


def _number(call: Call, attachment: Attachment | None) -> None:
    """Count the call within its forward, and tell it what a bare layer number means."""
    alias = call.site.alias
    call.index = call.run.calls.get(alias, 0)
    call.run.calls[alias] = call.index + 1
    total = call.run.totals.get(alias, 0)
    call.run.totals[alias] = total + 1
    call.part = call.index if call.site.cross or call.site.kind in CACHED else total
    call.main = attachment.anatomy.main if attachment is not None else call.site.kind


def stages_for(attachment: Attachment, site: Site) -> tuple[Run, list[Edit], list[Lens]]:
    """What serves a call now: a checkpointed forward repeated in backward is edited but not read again."""
    if in_backward():
        return attachment.last_run or Run(), attachment.edits, []
    attachment.called[site.alias] = attachment.called.get(site.alias, 0) + 1
    return attachment.run_for_call(), attachment.edits, attachment.lenses


def _wants_weights(options: dict[str, Any]) -> bool:
    if options.get("output_attentions"):
        return True
    collected = output_capturing._active_collector.get()
    return collected is not None and any(key.endswith("attentions") for key in collected)


class SdpaMode(torch.overrides.TorchFunctionMode):
    """Serves the `scaled_dot_product_attention` calls of modules that make them directly."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__()
        self.attachment = attachment

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sdpa = torch.nn.functional.scaled_dot_product_attention
        if func is not sdpa or not self.attachment.current:
            return func(*args, **kwargs)
        return self._serve(*args, **kwargs)

    def _serve(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        from regard.runtime.call import call_from_sdpa

        site = self.attachment.current[-1]
        run, edits, lenses = stages_for(self.attachment, site)
        flat = query.ndim == 3
        if flat:
            query, key, value = query[:, None], key[:, None], value[:, None]
        call = call_from_sdpa(run, site, query, key, value, attn_mask, dropout_p, is_causal, scale)
        _number(call, self.attachment)
        out = pipeline.perform(call, edits, lenses)
        self.attachment.served.update(map(id, call.served))
        return out[:, 0] if flat else out
