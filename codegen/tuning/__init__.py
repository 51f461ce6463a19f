"""Values of kernels, chosen by measuring them on the machine that will run them."""

from moec.codegen.tuning.tune import Tuned, tune

__all__ = ["Tuned", "tune"]
