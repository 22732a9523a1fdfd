"""Names of sites and points."""

import pytest

from regard.runtime import Point, Site
from tests.support.families import FAMILIES


@pytest.mark.parametrize(
    ("layer", "main", "named"),
    [
        (3, "text", True), (3, "vision", False), (2, "text", False), ("text.3", "vision", True),
        ("model.layers.3.self_attn", "text", True), ("text.4", "text", False), (None, "text", False),
    ],
)  # fmt: skip
def test_what_names_a_site(layer, main, named):
    site = Site("model.layers.3.self_attn", "text.3", "text", 3, None)
    assert site.named(layer, main) is named
    assert repr(site) == "Site(text.3: model.layers.3.self_attn)"


def test_sites_are_told_apart_by_identity_and_points_by_value():
    one, two = (Site("a", "text.0", "text", 0, None) for _ in range(2))
    assert one != two and len({one, two}) == 2
    assert (
        Point("head", 9, head=6) == Point("head", layer=9, head=6)
        and len({Point("mlp", 1), Point("mlp", 1)}) == 1
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_alias_names_one_module_of_every_family(name):
    from regard.runtime.anatomy import anatomy_of

    model = FAMILIES[name].build()
    sites = anatomy_of(model).sites
    assert len({site.alias for site in sites}) == len({site.name for site in sites}) == len(sites)
    for site in sites:
        assert site.alias == f"{site.kind}.{site.layer}" and model.get_submodule(site.name) is site.module
