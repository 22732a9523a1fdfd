"""The parts of one model, found once and kept while the model lives."""

from __future__ import annotations

import difflib
import weakref
from functools import cached_property

from torch import Tensor, nn

from regard.errors import NoSuchSite, UnsupportedModel
from regard.runtime.anatomy import parts
from regard.runtime.anatomy.code import inspects_masks
from regard.runtime.anatomy.sites import find_sites, main_kind
from regard.runtime.site import POINT_KINDS, Point, Site

Place = tuple[nn.Module, str, int]


class Anatomy:
    """Where the parts of a model are.

    Attributes:
        sites: attention modules that can be reached, in module order.
        unreachable: (module name, class name) of attention modules that cannot.
        main: the kind of site that a bare layer number means ('text' in a language model).
        modules: how many modules the model had.
        needs_dense_masks: whether its code looks at what kind of mask it has been given.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = weakref.ref(root)
        self.sites, self.unreachable = find_sites(root)
        self.main = main_kind(self.sites)
        self.modules = _count(root)
        self.needs_dense_masks = any(inspects_masks(type(module)) for module in root.modules())
        self._by_name = {key: s for s in self.sites for key in (s.name, s.alias)}
        self._by_module = {id(s.module): s for s in self.sites}

    @property
    def root(self) -> nn.Module:
        root = self._root()
        if root is None:
            raise UnsupportedModel("The model that this anatomy describes is gone.")
        return root

    def site(self, layer: int | str) -> Site:
        """Return a site by number in the main stack, by alias or by module name.

        Raises:
            NoSuchSite: saying what there is.
        """
        key = f"{self.main}.{layer}" if isinstance(layer, int) else layer
        if key in self._by_name:
            return self._by_name[key]
        near = difflib.get_close_matches(str(key), list(self._by_name), 2)
        hint = f" Did you mean {' or '.join(near)}?" if near and isinstance(layer, str) else ""
        raise NoSuchSite(f"{type(self.root).__name__} has no layer {layer!r}; it has {self.ranges()}.{hint}")

    def ranges(self) -> str:
        """Return the aliases in words, such as `text.0 to text.29`."""
        kinds: dict[str, list[int]] = {}
        for site in self.sites:
            kinds.setdefault(site.kind, []).append(site.layer)
        words = [
            f"{kind}.{min(layers)} to {kind}.{max(layers)}" if len(layers) > 1 else f"{kind}.{layers[0]}"
            for kind, layers in kinds.items()
        ]
        return " and ".join(words) or "no attention that can be reached"

    def check_head(self, layer: int | str, head: int) -> Site:
        """Return the site, having made sure that it has this query head.

        Raises:
            NoSuchSite: saying what there is.
        """
        site = self.site(layer)
        if site.heads is not None and not 0 <= head < site.heads:
            raise NoSuchSite(f"{site.alias} has no head {head}; it has heads 0 to {site.heads - 1}.")
        return site

    def block(self, layer: int | str) -> nn.Module:
        """Return the block (attention, MLP, norms) that a site is part of."""
        found = parts.block_of(self.root, self.site(layer))
        if found is None:
            raise NoSuchSite(f"{self.site(layer).name} is not part of a list of blocks.")
        return found[1]

    def blocks(self, kind: str | None = None) -> list[tuple[str, nn.Module]]:
        """Return (name, module) of the blocks of a kind of site, in order, each once."""
        found: dict[str, nn.Module] = {}
        for site in self.sites:
            if site.kind == (kind or self.main):
                block = parts.block_of(self.root, site)
                if block is not None:
                    found[block[0]] = block[1]
        return list(found.items())

    def output_projection(self, site: Site) -> nn.Module:
        """Return the module that maps the joined head outputs to the residual stream."""
        return parts.projection_of(self.root, site)

    def output_weight(self, site: Site, heads: int | None = None) -> Tensor:
        """Return W_O split by query head, [D_model, H, Dv].

        Args:
            heads: number of query heads, where the module does not tell.
        """
        count = heads or site.heads
        if count is None:
            raise UnsupportedModel(f"{type(site.module).__name__} does not say how many heads it has.")
        return parts.projection_weight(self.output_projection(site), count)

    def mlp(self, layer: int | str) -> nn.Module:
        """Return the MLP (or mixture of experts) of a block; its output is what is added."""
        return self._need(parts.mlp_of(self.block(layer)), "MLP", layer)

    def router(self, layer: int | str) -> nn.Module:
        """Return the module that scores the experts of a block."""
        return self._need(parts.router_of(self.mlp(layer)), "router", layer)

    def experts(self, layer: int | str) -> nn.Module:
        """Return the experts of a block."""
        return self._need(parts.experts_of(self.mlp(layer)), "mixture of experts", layer)

    @cached_property
    def embedding(self) -> nn.Module | None:
        return parts.embedding_of(self.root)

    @cached_property
    def unembedding(self) -> nn.Module | None:
        return parts.unembedding_of(self.root)

    @cached_property
    def final_norm(self) -> nn.Module | None:
        blocks = self.blocks()
        return parts.final_norm_of(self.root, blocks[0][0]) if blocks else None

    def place(self, point: Point) -> Place:
        """Return (module, 'input' or 'output', index into a tuple output) where a point is met.

        Raises:
            NoSuchSite: where the model has no such point; heads are met in `head_outputs` instead.
        """
        if point.kind not in POINT_KINDS:
            raise NoSuchSite(f"There is no point {point.kind!r}; points are {', '.join(POINT_KINDS)}.")
        once = {
            "embedding": self.embedding,
            "final_norm": self.final_norm,
            "logits": self.unembedding,
        }  # fmt: skip
        if point.kind in once:
            return self._need(once[point.kind], point.kind, None), "output", 0
        if point.layer is None:
            raise NoSuchSite(f"A point of kind {point.kind!r} needs a layer: {self.ranges()}.")
        if point.kind == "head":
            raise NoSuchSite("Heads have no module of their own: read or change them in head_outputs(call).")
        if point.kind == "residual_pre":
            return self.block(point.layer), "input", 0
        modules = {
            "residual": lambda layer: self.block(layer),
            "attention": lambda layer: self.output_projection(self.site(layer)),
            "mlp": self.mlp,
            "router": self.router,
        }
        return modules[point.kind](point.layer), "output", 0

    def _need(self, found: nn.Module | None, what: str, layer: int | str | None) -> nn.Module:
        if found is None:
            where = "" if layer is None else f" in {self.site(layer).alias}"
            raise NoSuchSite(f"{type(self.root).__name__} has no {what} that regard can find{where}.")
        return found


_KNOWN: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()


def anatomy_of(root: nn.Module) -> Anatomy:
    """Return the parts of a model; found at the first call and kept.

    Where a module was replaced, added or taken out since, they are found again.
    """
    known = _KNOWN.get(root)
    if known is None or known.modules != _count(root) or any(_replaced(root, s) for s in known.sites):
        known = _KNOWN[root] = Anatomy(root)
    return known


def _count(root: nn.Module) -> int:
    return sum(1 for _ in root.modules())


def _replaced(root: nn.Module, site: Site) -> bool:
    try:
        return root.get_submodule(site.name) is not site.module
    except AttributeError:
        return True


def require_attention(anatomy: Anatomy) -> None:
    """Refuse a model of which no attention can be reached.

    Raises:
        UnsupportedModel: naming the classes that compute attention out of reach.
    """
    if anatomy.sites:
        return
    name = type(anatomy.root).__name__
    classes = sorted({kind for _, kind in anatomy.unreachable})
    if classes:
        raise UnsupportedModel(
            f"{name} computes attention inside {', '.join(classes)}, which neither calls transformers' "
            "attention interface nor scaled_dot_product_attention, so regard cannot open it."
        )
    raise UnsupportedModel(f"{name} has no attention module that regard can find.")
