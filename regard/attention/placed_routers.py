"""Mixture of heads in a pretrained model, as part of it.

Every attention module gets a router named `head_router`, whose parameters are the model's. Hooks give it what
it reads: the layer's input, or the queries as their projection gives them, before any norm and rotary
embedding; and before the output projection they multiply what each head gives. They are methods of the
router, so that a copied or pickled model has its own, and any attention implementation and any cache will do.
Where heads that are off are left out (`sparse`), the attention call itself is met through transformers'
attention interface, by an edit that stays with the module.

Source: Jin et al., 2024, arXiv 2410.11842, sections 3.4 and 4.4 (continue-tuning of LLaMA3). Status: partly
our choice: the paper's code splits heads in halves, this one in any way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regard.attention.head_router import HeadRouter, Kind, Preset, check_options, check_split, spread
from regard.attention.matrices import dense_mask, softmax_matrix
from regard.attention.swap import whole_context
from regard.engines.chosen import attend_chosen
from regard.errors import NoSuchSite, RegardError, UnsupportedModel
from regard.runtime.anatomy import Anatomy, anatomy_of, require_attention, root_of
from regard.runtime.implementation import NAME, outside
from regard.runtime.permanent import KEY, drop, keep, resolve_with
from regard.runtime.protocol import Edit, Inner, Wanted

if TYPE_CHECKING:
    from regard.runtime.call import Call
    from regard.runtime.site import Site

ROUTER, MOH = "head_router", "mixture_of_heads"


class Padding:
    """Knows which positions of a model's present forward are padding; one a model."""

    def __init__(self) -> None:
        self.valid: Tensor | None = None

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the 2-D attention mask of a forward."""
        mask = kwargs.get("attention_mask")
        self.valid = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def of(self, batch: int, length: int) -> Tensor | None:
        """Return which of the last `length` positions are valid, bool [B, length], or None for all."""
        valid = self.valid
        if valid is None or valid.shape[0] != batch or valid.shape[1] < length:
            return None
        return valid[:, valid.shape[1] - length :]


class PlacedRouter(HeadRouter):
    """A router inside of a model; what `apply_moh` puts there.

    Attributes:
        alias: of the layer, such as `text.3`.
        sparse: whether heads that are off are left out of the attention call.
        gates: of the present forward, [B, T, H], between the layer's input and its output projection.
    """

    def __init__(self, alias: str, padding: Padding, sparse: bool, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.alias, self.padding, self.sparse = alias, padding, sparse
        self.gates: Tensor | None = None
        self._handles: list[Any] = []

    def place(self, attention: nn.Module, projection: nn.Module, queries: nn.Module | None) -> None:
        """Put the router into an attention module, after its queries and before its output projection."""
        attention.add_module(ROUTER, self)
        self._handles = [
            attention.register_forward_pre_hook(self.note, with_kwargs=True),
            projection.register_forward_pre_hook(self.multiply),
        ]
        if queries is not None:
            self._handles.append(queries.register_forward_hook(self.note_queries))

    def take_out(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the gates of the layer's input, where they are made of it."""
        self.gates = None
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise UnsupportedModel(
                f"{type(module).__name__} was not given its input [batch, time, {self.dim}] first or as "
                "hidden_states, which a router reads."
            )
        if self.kind in ("learned", "random"):
            self.gates = self(x, valid=self.padding.of(*x.shape[:2]))

    def note_queries(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Make the gates of the queries, as their projection gives them."""
        queries = output.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        self.gates = self(queries=queries, valid=self.padding.of(*output.shape[:2]))

    def multiply(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Multiply each head's part of the projection's input by its gate."""
        heads = args[0].unflatten(-1, (self.heads, -1))
        gates, self.gates = self.gates, None
        if self.kind == "output_norm":
            valid = self.padding.of(*heads.shape[:2])
            gates = self(outputs=heads.transpose(1, 2), valid=valid)
        if gates is None:
            raise UnsupportedModel(
                f"{type(module).__name__} ran outside of the attention that it belongs to."
            )
        weights = gates.to(heads.dtype).reshape(*heads.shape[:-1], 1)
        return ((heads * weights).flatten(-2), *args[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "gates": None}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SkipHeads(Edit):
    """Leave heads that are off out of an attention call; the edit that stays with a converted module."""

    def wants(self, call: Call) -> Wanted | None:
        router = getattr(call.site.module, ROUTER, None)
        on = router is not None and router.gates is not None and not router.straight_through
        return Wanted() if on else None

    def attend(self, call: Call, inner: Inner) -> Tensor:
        gates = getattr(call.site.module, ROUTER).gates
        on = gates.detach().transpose(1, 2) != 0
        if bool(on.all()):
            return inner(call)
        if not (call.causal and call.plain):
            return attend_chosen(call, on)
        return attend_chosen(call, on, offset=call.q_offset - call.kv_offset, valid=call.valid_keys)

    def matrix(self, call: Call) -> Tensor:
        """Return the weights of all heads, those that are off included, [B, H, T, S]."""
        ctx = whole_context(call)
        return softmax_matrix(call.q, call.k, ctx, dense_mask(ctx, call.q.device))

    def __repr__(self) -> str:
        return "mixture of heads (sparse)"


def apply_moh(
    model: nn.Module,
    shared: int | Sequence[int],
    active: int | Sequence[int],
    kind: Kind = "query_norm",
    *,
    preset: Preset = "official",
    sparse: bool | None = None,
    layers: Iterable[int | str] | None = None,
) -> dict[str, HeadRouter]:
    """Let the tokens of a pretrained model choose among its heads, as part of it; `remove_moh` undoes it.

    With all routed heads active the model is what it was: the norms of queries have gates of 1, and learned
    gates begin at 1. With fewer it has to be tuned, see `regard.objectives.head_tuning`.

    Args:
        model: of Llama's architecture, or another with attention that regard can reach; `query_norm` needs a
            projection `q_proj`.
        shared: how many heads of a layer, the first, are always on; or one number a layer.
        active: how many of the others a token uses; or one number a layer.
        kind: "query_norm" learns nothing new, "learned" has parameters, "output_norm" and "random" are
            for comparison.
        preset: of learned gates.
        sparse: leave out heads that are off, through the attention implementation `regard`; False computes
            them, under the implementation that is set. By default left out where that saves something.
        layers: numbers in the main stack or aliases; default all of the main stack.

    Returns:
        Alias -> router. Their parameters are among `model.parameters()`.

    Raises:
        UnsupportedModel: where attention, its queries or its output projection cannot be found.
        NoSuchSite: where `layers` names one that is not there.
        RegardError: where the numbers do not fit the heads, or a layer has a router.

    Example:
        >>> routers = apply_moh(model, shared=4, active=3)    # doctest: +SKIP
        >>> model.generate(**inputs)    # doctest: +SKIP
    """
    root = root_of(model)
    anatomy = anatomy_of(root)
    require_attention(anatomy)
    sites = _sites(anatomy, layers)
    split = spread({"shared": shared, "active": active}, len(sites))
    skips = kind != "output_norm" if sparse is None else bool(sparse)
    _check(sites, anatomy, split, kind, preset, skips)
    padding = Padding()
    routers = _routers(sites, anatomy, split, padding, skips, {"kind": kind, "preset": preset})
    stack = getattr(root, "base_model", root)
    stack.register_forward_pre_hook(padding.note, with_kwargs=True)
    for site in sites:
        router = routers[site.alias]
        router.place(site.module, anatomy.output_projection(site), _queries(site, kind))
        if skips:
            keep(site.module, SkipHeads())
    told = {
        "shared": split["shared"], "active": split["active"], "kind": kind, "preset": preset,
        "sparse": skips, "layers": [site.alias for site in sites],
    }  # fmt: skip
    _write(root, sites, told, skips)
    return dict(routers)


def _sites(anatomy: Anatomy, layers: Iterable[int | str] | None) -> list[Site]:
    given = [s.alias for s in anatomy.sites if s.kind == anatomy.main] if layers is None else list(layers)
    sites = {site.alias: site for site in map(anatomy.site, given)}
    if not sites:
        raise NoSuchSite("apply_moh was given no layers; leave layers= out to mean all of the main stack.")
    return list(sites.values())


def _check(
    sites: list[Site], anatomy: Anatomy, split: dict[str, list[int]], kind: Any, preset: Any, skips: bool
) -> None:
    """Refuse before anything is changed."""
    check_options(1, kind, preset, preset != "paper")
    if skips and kind == "output_norm":
        raise RegardError(
            "output_norm looks at what every head gives, so none can be left out: sparse=False."
        )
    for i, site in enumerate(sites):
        if hasattr(site.module, ROUTER):
            raise RegardError(f"{site.alias} has a router already; remove_moh(model) takes routers out.")
        check_split(anatomy.output_weight(site).shape[1], split["shared"][i], split["active"][i])
        _queries(site, kind)
        if skips and site.route != "interface":
            raise UnsupportedModel(
                f"{site.alias} calls scaled_dot_product_attention itself, so heads cannot be left out of it; "
                "give sparse=False."
            )


def _queries(site: Site, kind: str) -> nn.Module | None:
    """The projection of the queries, where their norms are asked for."""
    if kind != "query_norm":
        return None
    found = getattr(site.module, "q_proj", None)
    width = getattr(site.module, "head_dim", None)
    fits = isinstance(found, nn.Module) and (
        width is None or getattr(found, "out_features", None) == width * (site.heads or 0)
    )
    if not fits:
        raise UnsupportedModel(
            f"{type(site.module).__name__} has no projection q_proj that gives one query a head, and "
            "query_norm reads its output; give kind='learned'."
        )
    return found


def _routers(
    sites: list[Site], anatomy: Anatomy, split: dict[str, list[int]], padding: Padding, skips: bool,
    options: dict[str, Any],
) -> dict[str, PlacedRouter]:  # fmt: skip
    made = {}
    for i, site in enumerate(sites):
        weight = anatomy.output_weight(site)
        router = PlacedRouter(
            site.alias, padding, skips, weight.shape[0], weight.shape[1], split["shared"][i],
            split["active"][i], fine_tune=options["preset"] != "paper", **options,
        )  # fmt: skip
        made[site.alias] = router.to(weight.device, weight.dtype).train(site.module.training)
    return made


def _write(root: nn.Module, sites: list[Site], told: dict[str, Any], skips: bool) -> None:
    """Tell the config, so that the model is not loaded without its routers."""
    main = getattr(root, "config", None)
    configs = {id(c): c for c in (main, *(getattr(s.module, "config", None) for s in sites)) if c is not None}
    for config in configs.values():
        if not hasattr(config, "_attn_implementation_internal"):
            continue
        written = getattr(config, KEY, None) or {}
        before = written.get("before", outside(config))
        setattr(config, KEY, {**written, "before": before, MOH: told})
        if skips:
            config._attn_implementation_internal = NAME


def remove_moh(model: nn.Module) -> nn.Module:
    """Take the routers of `apply_moh` out of a model and return it.

    Raises:
        RegardError: where it has none.
    """
    root = root_of(model)
    owners = [m for m in root.modules() if isinstance(getattr(m, ROUTER, None), PlacedRouter)]
    if not owners:
        raise RegardError(f"{type(root).__name__} has no routers of heads.")
    paddings = {id(getattr(owner, ROUTER).padding) for owner in owners}
    for owner in owners:
        router = getattr(owner, ROUTER)
        router.take_out()
        delattr(owner, ROUTER)
        if router.sparse:
            drop(owner)
    for module in root.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if id(getattr(hook, "__self__", None)) in paddings:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        _forget(getattr(module, "config", None))
    return root


def _forget(config: Any) -> None:
    written = getattr(config, KEY, None)
    if not isinstance(written, dict) or MOH not in written:
        return
    rest = {name: value for name, value in written.items() if name != MOH}
    if set(rest) - {"before"}:
        setattr(config, KEY, rest)
        return
    if outside(config) == NAME:
        config._attn_implementation_internal = rest.get("before")
    delattr(config, KEY)


def resolve(module: nn.Module) -> None:
    """Skip heads in a copied module; refuse one that was loaded without its router."""
    router = getattr(module, ROUTER, None)
    if isinstance(router, PlacedRouter):
        if router.sparse:
            keep(module, SkipHeads())
        return
    written = getattr(getattr(module, "config", None), KEY, None)
    if isinstance(written, dict) and MOH in written and not _left_out(module, written[MOH]):
        raise RegardError(
            f"this {type(module).__name__} was saved with routers of heads, which from_pretrained does not "
            "bring back; load it with regard.models.moh.load_moh(folder)."
        )


def _left_out(module: nn.Module, told: dict[str, Any]) -> bool:
    """Whether a layer had no router when its model was saved."""
    layer = getattr(module, "layer_idx", None)
    return layer is not None and not any(alias.endswith(f".{layer}") for alias in told["layers"])


resolve_with(resolve)
