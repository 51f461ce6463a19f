"""Permission to use the tile registers of AMX."""

from __future__ import annotations

import ctypes
import platform
import sys

# Linux, Documentation/arch/x86/xstate.rst: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def permitted() -> bool:
    """Request the tile registers from Linux, for all threads of this process. Returns whether it
    granted them.

    Repeated requests are harmless. Signals need larger stacks from then on.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)
