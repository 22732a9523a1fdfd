"""Forward hooks at the points that lenses and edits ask for: residual stream, MLP, router, logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regard.errors import UnsupportedModel
from regard.runtime.pipeline import _replaced, reading
from regard.runtime.protocol import Edit, Stage, defines
from regard.runtime.site import Point

if TYPE_CHECKING:
    from regard.runtime.attachment import Attachment
    from regard.runtime.run import Run


class PointHooks:
    """One hook a module and side, serving every stage that asked for it: edits first, then lenses.

    A hook serves its own module only: a copy of the model made meanwhile has the hook too.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.handles: list[RemovableHandle] = []

    def clear(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def refresh(self) -> None:
        """Install the hooks that the present stages need."""
        self.clear()
        places: dict[tuple[nn.Module, str, int], list[tuple[Stage, Point]]] = {}
        for stage in self._ordered():
            only = getattr(stage, "only", None)
            for point in stage.points(self.attachment.anatomy):
                if only is not None and not self._among(only, point):
                    continue
                place = self.attachment.anatomy.place(point)
                places.setdefault(place, []).append((stage, point))
        for (module, side, index), served in places.items():
            if side == "input":
                hook = self._input_hook(id(module), served)
                self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self.handles.append(
                    module.register_forward_hook(self._output_hook(id(module), served, index))
                )
        for edit in self.attachment.edits:
            if defines(edit, "hooks"):
                for module, change in edit.hooks(self.attachment.anatomy):  # type: ignore[attr-defined]
                    self.handles.append(
                        module.register_forward_hook(self._own_hook(id(module), edit, change))
                    )

    def _among(self, only: frozenset[str], point: Point) -> bool:
        return point.layer is None or self.attachment.anatomy.site(point.layer).alias in only

    def _ordered(self) -> list[Stage]:
        lenses = self.attachment.lenses
        early = [lens for lens in lenses if lens.before]
        late = [lens for lens in lenses if not lens.before]
        return [s for s in (*early, *self.attachment.edits, *late) if defines(s, "hidden")]

    def _serve(self, served: list[tuple[Stage, Point]], x: Tensor) -> Tensor:
        from regard.runtime.attachment import in_backward

        run = self.attachment.run_for_call()
        for stage, point in served:
            if isinstance(stage, Edit):
                self.attachment.served.add(id(stage))
                x = _replaced(stage, stage.hidden(point, x, run), x)  # type: ignore[attr-defined]
            elif not in_backward():
                with reading(stage):
                    stage.hidden(point, x, run)  # type: ignore[attr-defined]
        return x

    def _input_hook(self, owner: int, served: list[tuple[Stage, Point]]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if id(module) != owner:
                return None
            if args:
                return (self._serve(served, args[0]), *args[1:]), kwargs
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, name: self._serve(served, kwargs[name])}

        return hook

    def _own_hook(self, owner: int, edit: Edit, change: Callable[[Any, Run], Any]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if id(module) != owner:
                return None
            self.attachment.served.add(id(edit))
            return change(output, self.attachment.run_for_call())

        return hook

    def _output_hook(self, owner: int, served: list[tuple[Stage, Point]], index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if id(module) != owner:
                return None
            if isinstance(output, Tensor):
                return self._serve(served, output)
            if isinstance(output, tuple):
                _refuse_chosen(module, served, output)
                return (*output[:index], self._serve(served, output[index]), *output[index + 1 :])
            key = list(output.keys())[index]
            output[key] = self._serve(served, output[key])
            return output

        return hook


def _refuse_chosen(module: nn.Module, served: list[tuple[Stage, Point]], output: tuple[Any, ...]) -> None:
    """Refuse edits of router logits that come along with the experts already chosen by them."""
    if len(output) > 1 and any(isinstance(s, Edit) and point.kind == "router" for s, point in served):
        raise UnsupportedModel(
            f"{type(module).__name__} returns its logits together with the experts it chose, so changing the "
            "logits would change nothing; edit its input at 'residual_pre', or what comes out at 'mlp'."
        )
