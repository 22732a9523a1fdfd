"""Where the parts of a model are: attention sites, blocks, projections, MLPs, routers, norms, embeddings."""

from regard.runtime.anatomy.anatomy import Anatomy, anatomy_of, require_attention
from regard.runtime.anatomy.roots import root_of

__all__ = ["Anatomy", "anatomy_of", "require_attention", "root_of"]
