"""Around a model's forward and generate: begins and continues runs, follows beams, reports tokens."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.errors import UnsupportedModel
from regard.runtime.mask import LazyMask
from regard.runtime.protocol import defines
from regard.runtime.run import Run
from regard.runtime.steps import BEAM_CHOICE, Steps

if TYPE_CHECKING:
    from regard.runtime.attachment import Attachment


BATCHED = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


def drive(attachment: Attachment) -> list[Callable[[], None]]:
    """Wrap the model's forward and generate.

    Returns:
        Functions that undo it, to be called in reverse.
    """
    from regard.runtime import register as _  # noqa: F401

    root = attachment.root
    _refuse_compiled(root)
    driver = _Driver(attachment)
    undo = [driver.let_go, _wrap(root, "forward", driver.forward)]
    if callable(getattr(root, "generate", None)):
        undo.append(_wrap(root, "generate", driver.generate))
    undo.extend(_track_sdpa_sites(attachment))
    return undo


def _refuse_compiled(root: nn.Module) -> None:
    for name, module in root.named_modules():
        compiled = type(module).__name__ == "OptimizedModule"
        compiled |= hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        if compiled or getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedModel(
                f"{name or type(root).__name__} is compiled by torch.compile, and a compiled graph cannot "
                "be opened; use the model as it was before compiling."
            )


def _wrap(root: nn.Module, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Put `wrapper(original, *args, **kwargs)` in front of a method of one object."""
    had = name in root.__dict__
    original = getattr(root, name)
    root.__dict__[name] = _Wrapped(original, wrapper)

    def undo() -> None:
        if had:
            root.__dict__[name] = original
        else:
            root.__dict__.pop(name, None)

    return undo


class _Wrapped:
    """A method with something in front of it; a copy of the object gets the method alone, as its own."""

    def __init__(self, original: Callable[..., Any], wrapper: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.original, self.wrapper = original, wrapper

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        return self.original.__reduce_ex__(4)


def _track_sdpa_sites(attachment: Attachment) -> list[Callable[[], None]]:
    """Note which module is running, for sites that call scaled_dot_product_attention themselves."""
    handles = []
    for module, site in attachment.sites.items():
        if site.route != "sdpa":
            continue

        def enter(module: nn.Module, args: Any, site: Any = site) -> None:
            attachment.current.append(site)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if attachment.current:
                attachment.current.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    return [handle.remove for handle in handles]


class _Driver:
    """Keeps the runs of one attachment; a run is continued by whoever brings the same cache again."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()
        self.sdpa = any(site.route == "sdpa" for site in attachment.sites.values())

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from regard.runtime.function import SdpaMode

        args, kwargs = _by_name(original, args, kwargs)
        attachment = self.attachment
        outer = attachment.run
        if attachment.generating is not None:
            attachment.generating.settle()
        run = self._run_for(args, kwargs)
        attachment.run = attachment.last_run = run
        run.appended = 0 if attachment.generating is None else attachment.generating.count
        run.grows = run.appended > 0
        attachment.forwards += 1
        run.spans = run.spans or attachment.spans
        try:
            for stage in attachment.stages:
                if defines(stage, "prepare"):
                    stage.prepare(run, kwargs)  # type: ignore[attr-defined]
            with SdpaMode(attachment) if self.sdpa else nullcontext():
                output = original(*args, **kwargs)
            cache = getattr(output, "past_key_values", None)
            if cache is not None and cache not in self.runs:
                self._follow(cache, run)
            return output
        finally:
            attachment.run = outer
            attachment.current.clear()
            run.memory.clear()

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("disable_compile", True)
        attachment = self.attachment
        outer = attachment.generating
        attachment.generating = steps = _listen(attachment, original, args, kwargs)
        beams = steps is not None and steps.told and hasattr(attachment.root, BEAM_CHOICE)
        undo = _wrap(attachment.root, BEAM_CHOICE, steps.beams) if steps is not None and beams else None
        try:
            output = original(*args, **kwargs)
            if steps is not None:
                steps.settle()
            return output
        finally:
            attachment.generating = outer
            if undo is not None:
                undo()

    def _run_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        cache = kwargs.get("past_key_values")
        run = None
        if cache is not None and hasattr(cache, "get_seq_length"):
            run = self.runs.get(cache)
            if run is None or int(cache.get_seq_length()) == 0:
                run = Run()
                self._follow(cache, run)
        run = run or Run()
        steps = self.attachment.generating
        config = getattr(self.attachment.root, "config", None)
        if not run.fed:
            run.first_args = args
        _feed(run, kwargs, bool(getattr(config, "is_encoder_decoder", False)))
        decoding = run.width == 1 if steps is None else steps.count > 0
        run.phase = "decode" if run.fed > 1 and decoding else "prefill"
        run.step += int(run.phase == "decode")
        return run

    def _follow(self, cache: Any, run: Run) -> None:
        """Let a run be found by its cache, and be reordered with it."""
        try:
            self.runs[cache] = run
        except TypeError:
            return
        if hasattr(type(cache), "reorder_cache") and "reorder_cache" not in vars(cache):
            cache.reorder_cache = _Reorder(cache, self.runs)

    def let_go(self) -> None:
        """Leave the caches that are still alive as they were."""
        for cache in list(self.runs):
            if isinstance(vars(cache).get("reorder_cache"), _Reorder):
                del cache.reorder_cache


class _Reorder:
    """The `reorder_cache` of one cache, which reorders its run as well; a copied cache has its own again."""

    def __init__(self, cache: Any, runs: weakref.WeakKeyDictionary[Any, Run]) -> None:
        self.cache, self.runs = weakref.ref(cache), runs

    def __call__(self, beam_idx: Tensor) -> Any:
        cache: Any = self.cache()
        run = self.runs.get(cache)
        if run is not None:
            run.reorder(beam_idx)
        return type(cache).reorder_cache(cache, beam_idx)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _Reorder(memo.get(id(self.cache()), self.cache()), self.runs)

    def __reduce__(self) -> Any:
        return getattr, (self.cache(), "reorder_cache")


def _listen(
    attachment: Attachment, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Steps | None:
    """Hear of each token through a stopping criterion, where `generate` takes any."""
    from transformers import StoppingCriteriaList

    config = getattr(attachment.root, "config", None)
    prompt = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    steps = Steps(attachment, None if getattr(config, "is_encoder_decoder", False) else prompt)
    taken = inspect.signature(generate).parameters
    passed_on = steps.told and any(p.kind is p.VAR_KEYWORD for p in taken.values())
    if "stopping_criteria" not in taken and not passed_on:
        return None
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), steps])
    return steps


def _by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give positional arguments by name where they have one; what Python would refuse stays as it is."""
    parameters = inspect.signature(function).parameters.values()
    by_name = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    fixed = any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters)
    names = by_name[: len(args)]
    if fixed or len(names) < len(args) or not kwargs.keys().isdisjoint(names):
        return args, kwargs
    return (), {**dict(zip(names, args, strict=True)), **kwargs}


def _feed(run: Run, kwargs: dict[str, Any], encoder_decoder: bool) -> None:
    """Note in `run` what this forward is fed."""
    run.role = "decoder_" if encoder_decoder else ""
    ids = kwargs.get(run.role + "input_ids")
    mask = kwargs.get(run.role + "attention_mask")
    if encoder_decoder:
        run.encoder_ids = kwargs.get("input_ids", run.encoder_ids)
    tensors = (ids, *(kwargs.get(name) for name in BATCHED))
    run.batch = next((t.shape[0] for t in tensors if isinstance(t, Tensor)), run.batch)
    started = run.fed > 0
    fed = ids if ids is not None else kwargs.get(run.role + "inputs_embeds")
    run.width = fed.shape[1] if fed is not None else 0
    run.seen = _in_cache(kwargs.get("past_key_values"))
    seen = run.seen or 0
    if not started:
        run.first_kwargs, run.first_seen = dict(kwargs), run.seen
    if ids is not None:
        run.token_ids = _grown(run.token_ids, ids, seen)
    positions = kwargs.get(run.role + "position_ids")
    if positions is None or (seen and run.position_ids is None):
        run.position_ids = None
    else:
        run.position_ids = _grown(run.position_ids, positions, seen)
    run.valid = None
    mask = _padding(mask)
    if mask is not None and not bool(mask.all()):
        run.valid = mask.bool()
    run.kwargs = kwargs
    run.calls = {}
    run.fed += 1


def _in_cache(cache: Any) -> int | None:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else None


def _grown(old: Tensor | None, new: Tensor, seen: int) -> Tensor:
    """Append what is new to the `seen` positions before it."""
    return new if old is None or not seen else torch.cat([old[..., :seen].to(new.device), new], -1)


def _padding(mask: Any) -> Tensor | None:
    """Return the 2-D mask in what a forward was given: itself, or what `generate()` prepared from it."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if isinstance(mask, LazyMask):
        if mask.padding is None:
            return None
        return mask.padding[:, : mask.q_offset + mask.shape[2]]
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
