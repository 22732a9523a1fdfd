"""Every causal sequence mixer as one linear time-varying system, and the token-to-token map that it implies.

Source: Sieber et al., 2024, arXiv 2405.15731. A mixer that is given in this form can be simulated, compared
with another, and looked into for decay and effective attention, also where it has no attention matrix.
"""

from regard.attention.dsf.ltv import LIMIT, LTV
from regard.attention.dsf.measure import (
    DecayProfile,
    EffectiveAttention,
    assert_equivalent,
    decay_profile,
    effective_attention,
    oracle_error,
)
from regard.attention.dsf.registry import SYSTEMS, system_of, to_ltv

__all__ = [
    "LIMIT", "LTV", "SYSTEMS", "DecayProfile", "EffectiveAttention", "assert_equivalent", "decay_profile",
    "effective_attention", "oracle_error", "system_of", "to_ltv",
]  # fmt: skip
