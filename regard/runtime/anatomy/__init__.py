"""Where the parts of a model are: attention sites, blocks, projections, MLPs, routers, norms, embeddings."""

from regard.runtime.anatomy.anatomy import Anatomy, anatomy_of, require_attention
from regard.runtime.anatomy.roots import root_of
from regard.runtime.anatomy.sites import lone_site

__all__ = ["Anatomy", "anatomy_of", "lone_site", "require_attention", "root_of"]
