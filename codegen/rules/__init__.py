"""Ops with kernels, whatever the target: what a kernel is to compute, and how it is called.

The kernels come from the backend, by the type of their spec. Products with packed weights are
not here: how weights are packed is the target's, and so are the rules.
"""

from moec.codegen.rules import (
    attention,
    caches,
    experts,
    norms,
    routing,
    scans,
    sizes,
    zero_experts,
)

RULES = (
    *attention.RULES,
    *caches.RULES,
    *experts.RULES,
    *norms.RULES,
    *routing.RULES,
    *scans.RULES,
    *sizes.RULES,
    *zero_experts.RULES,
)

__all__ = ["RULES"]
