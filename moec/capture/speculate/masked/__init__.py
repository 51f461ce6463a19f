"""The masked form of a capture: all rows and a mask, instead of rows that data select.

An axis whose length depends on data has its full length and a mask, and counts are tensors. No size
of the program then depends on data, and every op has a kernel, at the cost of computing every
expert for every row. It is used for what recognition does not replace by grouped products. Read
`interpreter.py` first.
"""

from moec.capture.speculate.masked.interpreter import MaskedInterpreter

__all__ = ["MaskedInterpreter"]
