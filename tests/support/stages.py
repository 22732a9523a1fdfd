"""Small lenses and edits, and everything about a model that a session touches."""

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from regard.runtime import Edit, Lens, Point
from regard.runtime.attachment import _ATTACHMENTS, BY_MODULE
from regard.runtime.implementation import _HELD
from tests.support.families import FAMILIES


class Rows(Lens):
    """Counts the rows that it is shown, and the residual streams."""

    def points(self, anatomy):
        return [Point("residual", site.alias) for site in anatomy.sites]

    def hidden(self, point, x, run):
        assert x.ndim == 3

    def weights(self, block):
        self.tally.mean(block.site, "rows", torch.tensor(float(block.weights.shape[2])), 1.0)

    def result(self):
        return {alias: int(n) for alias, n in self.tally.count("rows").items()}


class Sharper(Edit):
    """Multiplies the scores."""

    def __init__(self, factor=2.0):
        super().__init__()
        object.__setattr__(self, "factor", factor)

    def scores(self, block):
        return block.scores * self.factor


class Failing(Exception):
    pass


def failing(base, method):
    """A lens or edit that fails in one of its methods."""

    def fail(self, *args):
        raise Failing(method)

    return type("Broken", (base,), {method: fail})()


def state(model):
    """Everything about a model, and about regard, that a session touches; a forward goes first."""
    modules = {
        name: {key: held(value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    kept = [(id(config), {key: held(value) for key, value in vars(config).items()}) for config in configs]
    registries = [dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)]
    ours = [len(BY_MODULE), len(_ATTACHMENTS), dict(_HELD)]
    functions = [torch.nn.functional.scaled_dot_product_attention, type(model).forward]
    return modules, kept, registries, ours, functions, torch.overrides._len_torch_function_stack()


def held(value):
    """A value that is equal only to itself, or to a dict of the same things."""
    if isinstance(value, dict):
        return tuple((key, held(item)) for key, item in value.items())
    return value if isinstance(value, str | int | float | tuple | set | None) else id(value)


def run(model, name="llama"):
    with torch.no_grad():
        out = model(**FAMILIES[name].inputs(model))
    return out[0]


class Misplaced(Lens):
    """Asks for a point that is not there."""

    def points(self, anatomy):
        return [Point("residual", 0), Point("mlp", 99)]

    def hidden(self, point, x, run):
        raise AssertionError("it was never attached")
