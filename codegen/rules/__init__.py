"""Rules for ops with kernels on every target: the spec of a kernel, and its call.

The backend provides the kernels, by the type of their spec. Products with packed weights are not
here: the packing depends on the target, and so do their rules.
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
