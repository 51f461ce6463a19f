"""The Python list of the class ids that tokens chose, whose length varies."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from moec.errors import CaptureError


class ChosenIds(list[Any]):
    """The ids of a choice as a list that is as long as there are tokens. Only its length is known:
    what reads its elements raises CaptureError."""

    def __init__(self, ids: torch.Tensor) -> None:
        super().__init__()
        self.tensor = ids

    def __bool__(self) -> bool:
        return bool(self.tensor.shape[0] > 0)

    def __len__(self) -> int:
        raise CaptureError("the length of a list of tokens varies")

    def __iter__(self) -> NoReturn:
        raise CaptureError(
            "a loop over tokens, whose number varies, cannot be unrolled: loop over the experts, "
            "and take the rows of each with torch.where(ids == expert)"
        )

    def __contains__(self, value: object) -> NoReturn:
        raise CaptureError("a list of tokens is searched: compare the tensor of ids instead")

    def count(self, value: Any) -> NoReturn:
        raise CaptureError("a list of tokens is counted: use torch.bincount(ids) instead")

    def __getitem__(self, index: Any) -> NoReturn:
        raise CaptureError("a list of tokens is read by place: index the tensor instead")
