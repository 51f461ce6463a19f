"""A model on two ranks of this machine: planned, compiled for the plan, and run to generate text.

Each rank holds its experts, and the keys and values of its own texts. On several hosts, torchrun
starts `python -m moec run` instead of --nproc.

    python examples/14_run_ranks.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

CHECKPOINT = Path(__file__).with_name("tiny_moe") / "checkpoint"
PROMPTS = ("def main(", "import ", "for i in range(")


def moec(*arguments: object) -> None:
    """Runs a command as in a shell."""
    print("$ moec", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "moec", *map(str, arguments)], check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan, ranks, prompts = (Path(folder, n) for n in ("plan.json", "tiny.ranks", "prompts.txt"))
        prompts.write_text("\n".join(PROMPTS))
        moec("plan", CHECKPOINT, "--cluster", "two-sockets", "-o", plan)
        moec("compile", CHECKPOINT, "--plan", plan, "-o", ranks)
        moec("run", ranks, "--nproc", 2, "--prompts", prompts, "--max-new-tokens", 8)


if __name__ == "__main__":
    main()
