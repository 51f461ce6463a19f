"""The roofline of a profile as a picture: speeds of kernels, by their FLOPs per byte."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from moec.errors import UsageError
from moec.profile.data import ProfileData

COLOURS = ("#0b6e4f", "#b23a48", "#3a5ab2", "#b2873a")
"""Of phases."""


def plot(profile: ProfileData, path: Path) -> None:
    """One point for each kind of kernel with arithmetic in each phase, as large as its share of the
    call, under the limits of the machine. Raises UsageError where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'moec[bench]'") from None
    limits = profile.limits
    figure, axis = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    intensities = [limits.peak / limits.bandwidth]
    for phase, colour in zip(profile.phases, COLOURS, strict=False):
        axis.scatter([], [], color=colour, label=phase.name)
        points = [
            (line.flops / line.bytes, line.flops / line.time.seconds / 1e9, line)
            for line in phase.kinds
            if line.flops and line.bytes
        ]
        height = math.inf  # of a name, in decades of speed; kernels of one token are close together
        for intensity, speed, line in sorted(points, key=lambda p: -p[1]):
            area = 20 + 600 * line.time.seconds / phase.call.seconds
            axis.scatter(intensity, speed, area, color=colour, alpha=0.6)
            height = min(math.log10(speed), height - 0.06)
            style = {"xytext": (12, -3), "textcoords": "offset points", "fontsize": 7}
            axis.annotate(line.kernel, (intensity, 10**height), **style)
            intensities.append(intensity)
    reach = np.array([min(intensities) / 4, intensities[0], max(intensities) * 4])
    roof = np.minimum(limits.peak, reach * limits.bandwidth) / 1e9
    axis.loglog(reach, roof, color="#444444", linewidth=1)
    axis.set_xlabel("FLOPs per byte")
    axis.set_ylabel("GFLOP/s")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(
        f"{profile.model}: measured {limits.peak / 1e9:.0f} GFLOP/s in {limits.dtype}, "
        f"{limits.bandwidth / 1e9:.1f} GB/s",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
