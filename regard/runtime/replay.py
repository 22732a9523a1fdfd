"""Run a model once, then its later blocks alone, again and again, under patches and edits.

Activation patching asks for thousands of forwards that differ from one layer on. The blocks before that
layer give what they gave in the one recorded forward, so only the others cost anything; embeddings, masks
and rotary angles are computed by the model itself, and many patches share a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from regard.errors import NoSuchSite, RegardError, ShapeMismatch, UnsupportedModel
from regard.runtime.anatomy import anatomy_of, parts, require_attention, root_of
from regard.runtime.driving import _wrap
from regard.runtime.head_table import HeadTable
from regard.runtime.progress import bar
from regard.runtime.protocol import Edit, Stage
from regard.runtime.recorded import again, kept, logits_of, refuse_unfit, repeated, tile
from regard.runtime.row_patch import RowPatch, uncached
from regard.runtime.session import Session
from regard.runtime.site import Point, Site

if TYPE_CHECKING:
    from collections.abc import Iterator

Metric = Callable[[Tensor], Any]


class Replay:
    """One recorded forward of a model, of which later blocks can be run again.

    Blocks are counted in the order in which the model runs them; those of a vision tower come before
    those of the language model, and are not run again either. A layer is a number in the main stack or
    an alias such as `vision.3`.

    Args:
        model: in evaluation mode; any model whose attention regard can reach, but encoder-decoders.
        inputs: keyword arguments of its forward, batch B.
        spans: name -> bool [B, S], as for `regard.watch`.

    Attributes:
        logits: of the recorded forward: [B, T, V], or the last hidden state [B, T, D] of a model
            without logits.
        session: that of the last `run`, where lenses among its stages are found.

    Raises:
        UnsupportedModel: where blocks share modules, return what is not understood, hand each other more
            than their output, or the model is an encoder-decoder.
        RegardError: for a model in training mode, and for inputs that bring a cache.

    Edits of sessions that are open while recording are part of what is recorded; keep them open, or
    closed, while replaying. The model's weights must stay as they were.

    Example:
        >>> replay = Replay(model, corrupt)                             # doctest: +SKIP
        >>> values = collect(model, clean, replay.heads())              # doctest: +SKIP
        >>> metric = lambda logits: logit_difference(logits, mary, john).mean()   # doctest: +SKIP
        >>> replay.sweep_heads(values, metric).top("effect", 10)        # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], *, spans: Mapping[str, Tensor] | None = None
    ) -> None:
        self.model = root_of(model)
        self.anatomy = anatomy_of(self.model)
        require_attention(self.anatomy)
        refuse_unfit(self.model, inputs)
        self.inputs = uncached(self.model, inputs)
        self.spans = dict(spans or {})
        self.session: Session | None = None
        self._outputs: dict[str, Any] = {}
        self.logits = self._record()
        self._order = {name: index for index, name in enumerate(self._outputs)}
        self._verify()

    def run(
        self,
        from_layer: int | str,
        stages: Stage | Sequence[Stage] = (),
        *,
        batch: int = 1,
        grad: bool = False,
    ) -> Tensor:
        """Run block `from_layer` and all later ones, and what follows them.

        Args:
            from_layer: the first block that is run; those before it give what was recorded.
            stages: edits and lenses that are open meanwhile, such as `Patch({point: value})`.
            batch: how often the B sequences are repeated: row `r * B + b` is sequence b.
            grad: whether gradients are followed, as those of patched values.

        Returns:
            Logits [batch * B, T, V], as in `logits`.

        Raises:
            NoSuchSite: for a layer that is not there or was not run.
            RegardError: where an edit is for a block that is not run again.
        """
        if not isinstance(batch, int) or batch < 1:
            raise RegardError(f"batch is {batch!r}; it must be a whole number of at least 1.")
        stages = [stages] if isinstance(stages, Stage) else list(stages)
        start = self._start(from_layer)
        session = Session(self.model, stages, {k: tile(v, batch) for k, v in self.spans.items()})
        for edit in session.edits:
            self._refuse_early(edit, start, from_layer)
        self.session = session
        with torch.set_grad_enabled(grad), session, self._skipping(start, batch):
            output = self.model(**repeated(self.inputs, batch))
        return logits_of(self.model, output)

    def heads(self, layers: Iterable[int | str] | None = None) -> list[Point]:
        """Return a point for every head of some layers; default all of the main stack."""
        main = [s.alias for s in self.anatomy.sites if s.kind == self.anatomy.main]
        found = []
        for site in map(self.anatomy.site, main if layers is None else layers):
            if site.heads is None:
                raise UnsupportedModel(f"{type(site.module).__name__} does not say how many heads it has.")
            found += [Point("head", site.alias, head=head) for head in range(site.heads)]
        return found

    def sweep(
        self,
        points: Iterable[Point],
        values: Any,
        metric: Metric,
        *,
        batch: int = 8,
        progress: bool = True,
    ) -> list[float]:
        """Patch one point at a time, and measure.

        Points of one layer are patched side by side in one forward of the blocks from there on.

        Args:
            points: what to patch; each by itself. A point may have a position.
            values: point -> value as in `regard.patch`, such as what `collect` returns; or one value for
                all points, such as 0.0. Tensors are of the shape of the B sequences.
            metric: takes the logits [B, T, V] of one patch; returns a number, or a tensor of one.
            batch: how many patches share a forward, so of batch * B sequences.
            progress: whether a bar is shown, where stderr is a terminal.

        Returns:
            The metric under each patch, in the order of `points`.

        Raises:
            NoSuchSite: for a point that the model does not have.
            RegardError: for a point without a value, or a metric that gives no number.
        """
        chosen = list(points)
        rows = [(point, _value_of(values, point)) for point in chosen]
        if not rows:
            raise RegardError("sweep was given no points.")
        RowPatch(rows).check(self.anatomy)
        found = [float("nan")] * len(rows)
        groups = list(_grouped([self._of_point(point) for point in chosen], batch))
        with bar("Patching", len(rows), progress) as advance:
            for block, members in groups:
                patch = RowPatch([rows[i] for i in members])
                logits = self.run(block, [patch], batch=len(members))
                for i, part in zip(members, logits.chunk(len(members)), strict=True):
                    found[i] = _number(metric(part))
                advance(len(members))
        return found

    def sweep_heads(
        self,
        values: Any,
        metric: Metric,
        *,
        layers: Iterable[int | str] | None = None,
        batch: int = 8,
        column: str = "effect",
        progress: bool = True,
    ) -> HeadTable:
        """Patch every head by itself: `sweep` over `heads(layers)`, as a table.

        Values may be keyed by layer number or alias.

        Returns:
            HeadTable: with one column, the metric under each patch; `about["unpatched"]` is it without.
        """
        points = self.heads(layers)
        if isinstance(values, Mapping):
            values = {self._by_alias(point): value for point, value in values.items()}
        numbers = self.sweep(points, values, metric, batch=batch, progress=progress)
        about = {
            "model": type(self.model).__name__,
            "main": self.anatomy.main,
            "unpatched": _number(metric(self.logits)),
        }
        sites = tuple(str(point.layer) for point in points)
        heads = [point.head for point in points]
        return HeadTable(sites, cast(Any, heads), {column: cast(Any, numbers)}, about)

    def _by_alias(self, point: Point) -> Point:
        if point.kind != "head" or point.layer is None:
            return point
        return Point("head", self.anatomy.site(point.layer).alias, point.head, point.position)

    def _record(self) -> Tensor:
        def keep(name: str) -> Any:
            def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                if name in self._outputs:
                    raise UnsupportedModel(
                        f"{type(self.model).__name__} runs the block {name} more than once a forward, so it "
                        "cannot be replayed from a layer on."
                    )
                output = original(*args, **kwargs)
                self._outputs[name] = kept(output, name)
                return output

            return forward

        with torch.no_grad(), Session(self.model, [], dict(self.spans)), ExitStack() as undo:
            for kind in dict.fromkeys(site.kind for site in self.anatomy.sites):
                for name, block in self.anatomy.blocks(kind):
                    undo.callback(_wrap(block, "forward", keep(name)))
            output = self.model(**self.inputs)
        if not self._outputs:
            raise UnsupportedModel(f"{type(self.model).__name__} has no blocks that regard can find.")
        return logits_of(self.model, output).detach()

    def _verify(self) -> None:
        """Run the last block alone: it gives the recorded logits, unless blocks share more than an output."""
        name = type(self.model).__name__
        why = f"The blocks of {name} hand each other more than their output, so they cannot be replayed"
        try:
            with torch.no_grad(), Session(self.model, []), self._skipping(len(self._order) - 1, 1):
                last = logits_of(self.model, self.model(**self.inputs))
        except RegardError:
            raise
        except Exception as error:
            raise UnsupportedModel(f"{why}: {error}.") from error
        scale = self.logits.float().nan_to_num(0.0, 0.0, 0.0).abs().amax().item()
        if not torch.allclose(last, self.logits, rtol=0.0, atol=1e-3 * scale, equal_nan=True):
            raise UnsupportedModel(f"{why}: the last block alone gives other logits.")

    @contextmanager
    def _skipping(self, start: int, batch: int) -> Iterator[None]:
        """Let the blocks before the `start`-th return what was recorded, `batch` times over."""
        with ExitStack() as undo:
            for name in list(self._order)[:start]:
                block, output = self.model.get_submodule(name), self._outputs[name]
                undo.callback(_wrap(block, "forward", lambda *_, output=output, **__: again(output, batch)))
            yield

    def _block_of(self, site: Site) -> str | None:
        found = parts.block_of(self.model, site)
        return found[0] if found is not None else None

    def _start(self, layer: int | str) -> int:
        name = layer if layer in self._order else self._block_of(self.anatomy.site(layer))
        if name not in self._order:
            raise NoSuchSite(f"Layer {layer!r} of {type(self.model).__name__} was not run in this forward.")
        return self._order[name]

    def _of_point(self, point: Point) -> str:
        """The name of the first block that a patch at a point changes, or that must run to reach it."""
        names = list(self._order)
        if point.layer is not None:
            return names[self._start(point.layer)]
        return names[0] if point.kind == "embedding" else names[-1]

    def _refuse_early(self, edit: Edit, start: int, layer: int | str) -> None:
        where = f"lies before layer {layer!r}, from which the replay starts."
        for point in edit.points(self.anatomy):
            if self._order[self._of_point(point)] < start:
                raise RegardError(f"{point} {where}")
        if type(edit).wants is Stage.wants:
            return
        for site in self.anatomy.sites:
            block = self._block_of(site)
            if self._order.get(block or "", start) < start and _wants(edit, site, self.anatomy.main):
                raise RegardError(f"{type(edit).__name__} edits {site.alias}, which {where}")


def _wants(edit: Edit, site: Site, main: str) -> bool:
    """Whether an edit asks for the calls of a site, as far as that can be told without one."""
    call = SimpleNamespace(site=site, main=main, heads=site.heads or sys.maxsize)
    try:
        return edit.wants(cast(Any, call)) is not None
    except AttributeError:
        return False


def _value_of(values: Any, point: Point) -> Any:
    if not isinstance(values, Mapping):
        return values
    if point not in values:
        raise RegardError(f"{point} is to be patched, and values has nothing for it.")
    return values[point]


def _grouped(blocks: Sequence[str], batch: int) -> Iterator[tuple[str, list[int]]]:
    """Yield (block, indices of at most `batch` points there)."""
    if not isinstance(batch, int) or batch < 1:
        raise RegardError(f"batch is {batch!r}; it must be a whole number of at least 1.")
    members: dict[str, list[int]] = {}
    for index, block in enumerate(blocks):
        members.setdefault(block, []).append(index)
    for block, indices in members.items():
        for begin in range(0, len(indices), batch):
            yield block, indices[begin : begin + batch]


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ShapeMismatch(
            f"The metric gave a tensor of shape {tuple(value.shape)}; it must give one number."
        )
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RegardError(f"The metric gave {type(value).__name__}; it must give one number.") from None
