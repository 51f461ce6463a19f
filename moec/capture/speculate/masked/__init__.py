"""The masked form of a capture: every row with a mask, in the place of those rows that data choose.

An axis whose length depends on data has its full length and a mask, and counts are tensors; no size
of the program depends on data then, and every op has a kernel, at E times the work. It is for what
recognition does not replace by grouped products. Read `interpreter.py` first.
"""

from moec.capture.speculate.masked.interpreter import MaskedInterpreter

__all__ = ["MaskedInterpreter"]
