"""How well the attention of a flow obeys Theorem 3 of Scan and Snap."""

from __future__ import annotations

import math

from regard.objectives.scan_snap import History
from regard.tasks.scan_snap import TokenComposition


def identity_errors(data: TokenComposition, seen: History) -> list[float]:
    """Return | r(t) / (r(0) exp(2 z_l(t))) - 1 | of each distinct token l beside the next lighter one.

    r = f_l^2 / f_l'^2 - 1, of the first next token; the tables began at zero.
    """
    assert seen.z is not None
    some = data.distinct(0)
    own, z = seen.attention[:, 0, some], seen.z[data.context, some].tolist()
    errors = []
    for i in range(1, own.shape[1]):
        start, end = ((own[t, i] / own[t, i - 1]) ** 2 - 1 for t in (0, -1))
        errors.append(abs(float(end / start) / math.exp(2 * z[i]) - 1))
    return errors
