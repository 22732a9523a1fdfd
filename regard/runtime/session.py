"""A session: lenses and edits on one model, from `with` to the end of the block, and what was seen."""

from __future__ import annotations

import html
import inspect
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import NothingObserved, RegardError
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.attachment import Attachment, close_attachment, open_attachment
from regard.runtime.planes import refuse_tokens, refuse_weights
from regard.runtime.protocol import Edit, Lens, Stage, Wanted, defines
from regard.runtime.run import Run
from regard.runtime.site import Site

MEETING = ("inputs", "scores", "weights", "head_outputs", "hidden", "hooks", "end_call", "survey", "attend")


class Session:
    """Lenses and edits attached to one model; what `watch`, `steer`, `swap` and `patch` return.

    Used as a context manager. On leaving, also by an exception, the model is as it was. Sessions nest:
    edits of all open sessions apply in the order in which they were added, and lenses see the result.

    Indexing with a lens' class or name gives its result. Results of several forwards merge.

    Raises:
        UnsupportedModel: on entering, where the model's attention cannot be reached.
        NoSuchSite: on entering, where an edit or lens names a layer or head that is not there.
        NothingObserved: on leaving, where no attention call happened, or none that an edit is meant for.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        spans: dict[str, Tensor] | None = None,
        layers: Iterable[int | str] | None = None,
    ) -> None:
        self.root = root_of(model)
        self.anatomy = anatomy_of(self.root)
        require_attention(self.anatomy)
        self.edits = [s for s in stages if isinstance(s, Edit)]
        self.lenses = _named([s.fresh() for s in stages if isinstance(s, Lens)])
        if layers is not None:
            only = frozenset(self.anatomy.site(layer).alias for layer in layers)
            for lens in self.lenses.values():
                object.__setattr__(lens, "only", only)
        self.spans = spans or {}
        self.called: dict[str, int] = {}
        self.last_run: Run | None = None
        self._attachment: Attachment | None = None
        self._outer_edits: list[Edit] = []
        for stage in stages:
            if not isinstance(stage, Stage):
                raise RegardError(f"{stage!r} is neither a Lens nor an Edit.")
        refuse_tokens(self.anatomy, stages)
        for stage in (*self.edits, *self.lenses.values()):
            check = getattr(stage, "check", None)
            if check is not None:
                check(self.anatomy)

    def __enter__(self) -> Session:
        if self._attachment is not None:
            raise RegardError("This session is open already; open a second one for a second use.")
        attachment = open_attachment(self.root)
        try:
            attachment.add(self.edits, list(self.lenses.values()))
        except BaseException:
            attachment.remove(self.edits, list(self.lenses.values()))
            close_attachment(attachment)
            raise
        attachment.named_spans[id(self)] = self.spans
        self._attachment = attachment
        self._before = dict(attachment.called)
        self._forwards = attachment.forwards
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        attachment = self._attachment
        assert attachment is not None
        self._note(attachment)
        idle = [why for edit in self.edits if (why := self._why_idle(edit, attachment))]
        forwards = attachment.forwards - self._forwards
        self._attachment = None
        attachment.remove(self.edits, list(self.lenses.values()))
        attachment.named_spans.pop(id(self), None)
        close_attachment(attachment)
        if kind is None and not any(self.called.values()):
            raise NothingObserved(self._why_nothing(forwards))
        if kind is None and idle:
            raise NothingObserved(idle[0])

    def _note(self, attachment: Attachment) -> None:
        self.called = {
            alias: count - self._before.get(alias, 0) for alias, count in attachment.called.items()
        }
        self.last_run = attachment.last_run
        self._outer_edits = list(attachment.edits)

    def _why_nothing(self, forwards: int) -> str:
        name = type(self.root).__name__
        if not forwards:
            return f"Nothing was observed: {name} was not run inside the `with` block."
        return (
            f"Nothing was observed: {name} ran, but none of its {len(self.anatomy.sites)} attention "
            "modules used the implementation that regard had set; load it with attn_implementation='sdpa'."
        )

    def _why_idle(self, edit: Edit, attachment: Attachment) -> str | None:
        """Say why an edit changed nothing of all that ran; None where it met what it is meant for."""
        name = type(edit).__name__
        named = edit.named(self.anatomy) if defines(edit, "named") else ()  # type: ignore[attr-defined]
        missed = [alias for alias in named if not self.called.get(alias)]
        if missed:
            return f"{name} names {missed[0]}, which was not called inside the `with` block."
        elsewhere = defines(edit, "prepare") or defines(edit, "step")
        if id(edit) in attachment.served or elsewhere or not any(defines(edit, m) for m in MEETING):
            return None
        return f"{name} changed nothing: it wanted none of the calls that happened inside the `with` block."

    @property
    def sites(self) -> list[Site]:
        """The attention modules of the model that can be reached."""
        return list(self.anatomy.sites)

    @property
    def silent(self) -> list[str]:
        """Aliases of sites that were not called while the session was open."""
        if self._attachment is not None:
            self._note(self._attachment)
        return [s.alias for s in self.anatomy.sites if not self.called.get(s.alias)]

    @property
    def unreachable(self) -> list[tuple[str, str]]:
        """(module name, class name) of attention modules that regard cannot see into."""
        return list(self.anatomy.unreachable)

    def lens(self, key: str | type[Lens]) -> Lens:
        """Return a lens of this session by name or class.

        Raises:
            RegardError: where there is none, or several of that class; the message lists the names.
        """
        if isinstance(key, str):
            found = [lens for name, lens in self.lenses.items() if name == key]
        else:
            found = [lens for lens in self.lenses.values() if isinstance(lens, key)]
        if len(found) == 1:
            return found[0]
        asked = key if isinstance(key, str) else key.__name__
        names = ", ".join(self.lenses) or "none"
        problem = "no lens" if not found else f"{len(found)} lenses"
        raise RegardError(f"This session has {problem} {asked!r}; its lenses are named: {names}.")

    def __getitem__(self, key: str | type[Lens]) -> Any:
        return self.lens(key).result()

    def weights(self, layer: int | str, head: int, sequence: int = 0) -> Tensor:
        """Return the attention weights of one head, float32 [T, S].

        They come from a lens that kept them, or else from running the last input once more, under the
        same edits, and keeping this head only. After `generate()` that input is all the tokens.

        Args:
            layer: number in the main stack, or an alias such as `vision.3`.
            head: query head.
            sequence: which sequence of the batch; under beam search, which beam.

        Raises:
            NoSuchSite: for a layer or head that is not there.
            NothingObserved: where nothing was run yet, or the last input did not reach this layer: after
                `generate()` an encoder is not run again.
        """
        site = self.anatomy.check_head(layer, head)
        refuse_weights(site)
        for lens in self.lenses.values():
            kept = getattr(lens, "kept_weights", None)
            found = kept(site.alias, head, sequence) if kept is not None else None
            if found is not None:
                return found
        weights = self._rerun(site, head)
        if not 0 <= sequence < len(weights):
            raise RegardError(
                f"There is no sequence {sequence}; the last input had {len(weights)} sequences."
            )
        return weights[sequence]

    def again(self, lens: Lens) -> Lens:
        """Run the last input once more, under the same edits, with `lens` alone reading it.

        Nothing else of this session changes. After `generate()` that input is all the tokens.

        Returns:
            A copy of `lens` that has seen the input.

        Raises:
            NothingObserved: where nothing was run yet.
        """
        run = self.last_run or (self._attachment.last_run if self._attachment else None)
        if run is None:
            raise NothingObserved("No weights yet: run the model inside the `with` block first.")
        lens = lens.fresh()
        check = getattr(lens, "check", None)
        if check is not None:
            check(self.anatomy)
        attachment = open_attachment(self.root)
        edits = self._outer_edits if self._attachment is None else attachment.edits
        try:
            with torch.no_grad(), attachment.aside(edits, [lens], run):
                self.root(*run.first_args, **run.repeatable(inspect.signature(self.root.forward).parameters))
        finally:
            close_attachment(attachment)
        return lens

    def _rerun(self, site: Site, head: int) -> Tensor:
        kept = self.again(KeepHead(site=site, head=head)).tally.get("weights").get(site.alias)
        if kept is None:
            raise NothingObserved(f"{site.alias} was not called when the last input was run once more.")
        found: Tensor = kept[-1]
        return found

    def save(self, path: str) -> None:
        """Write what the lenses have seen to a safetensors file; `regard.runtime.load_seen` reads it."""
        from regard.runtime.store import save_seen

        save_seen(path, self.lenses, about={"model": type(self.root).__name__})

    def __repr__(self) -> str:
        stages = [repr(s) for s in (*self.edits, *self.lenses.values())]
        return f"Session({type(self.root).__name__}, {', '.join(stages)})"

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(repr(self))}</p>"] if not self.lenses else []
        for name, lens in self.lenses.items():
            try:
                render = getattr(lens.result(), "_repr_html_", None)
                part = render() if render is not None else f"<p>{html.escape(name)}</p>"
            except NothingObserved as nothing:
                part = f"<p>{html.escape(str(nothing))}</p>"
            parts.append(part)
        return "".join(parts)


class KeepHead(Lens):
    """Keeps all weights of one head of one site, [B, T, S] a call."""

    def __init__(self, site: Site, head: int) -> None:
        super().__init__()
        object.__setattr__(self, "site", site)
        object.__setattr__(self, "head", head)

    def wants(self, call: Any) -> Wanted | None:
        return Wanted(heads=(self.head,)) if call.site.alias == self.site.alias else None  # type: ignore[attr-defined]

    def weights(self, block: Any) -> None:
        call = block.call
        store = call.extra.get("kept")
        if store is None:
            store = call.extra["kept"] = block.weights.new_zeros(
                call.q.shape[0], call.query_length, call.key_length
            )
        column = self.head if block.heads is None else block.heads.tolist().index(self.head)  # type: ignore[attr-defined]
        store[:, block.start : block.stop, block.key_start : block.key_stop] = block.weights[:, column]

    def end_call(self, call: Any) -> None:
        self.tally.append(call.site, "weights", call.extra["kept"])


def _named(lenses: list[Lens]) -> dict[str, Lens]:
    """Give every lens a name of its own: its own name, or its class', numbered from the second on."""
    named: dict[str, Lens] = {}
    for lens in lenses:
        base = lens.name or type(lens).__name__
        if lens.name is not None and base in named:
            raise RegardError(f"Two lenses are named {base!r}; give one another name=.")
        name, number = base, 2
        while name in named:
            name, number = f"{base}-{number}", number + 1
        named[name] = lens
    return named
