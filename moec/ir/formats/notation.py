"""The notation of weight formats: "int4:64:asymmetric", "int8,linears=int8,head=int8".

The meaning of codes and scales is in integer.py. This file needs no torch, so that a typo in
--quant is reported before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.errors import UsageError

KINDS = ("int8", "int6", "int5", "int4", "int3", "int2", "fp8", "mxfp4")
BLOCKS = (32, 64, 128)
ROW_BITS = (0, 8, 16)
BITS = {f"int{bits}": bits for bits in (8, 6, 5, 4, 3, 2)} | {"fp8": 8, "mxfp4": 4}
MXFP4_BLOCK = 32

SPELLING = (
    "write int8, int6, int5, int4, int3 or int2, any of them with a block (:32, :64, :128) and "
    "with :asymmetric, fp8 with a block or without, or mxfp4; any of them with :rows16"
)
WIDE_ROWS = "rows16"


@dataclass(frozen=True)
class Format:
    """The format of a weight, and the bits (8 or 16) to which the rows it multiplies are rounded,
    0 if they are not.
    `block` 0 means one scale per row. `scales` is the dtype of the scales of integers: moec writes
    bf16, checkpoints of others have f16 or f32 too. `asymmetric` integers have zeros: codes u8, or
    with `float_zeros`, which checkpoints have, what is subtracted from code * scale, in the dtype
    of the scales."""

    kind: str
    block: int = 0
    asymmetric: bool = False
    row_bits: int = 8
    scales: str = "bf16"
    float_zeros: bool = False

    @property
    def bits(self) -> int:
        return BITS[self.kind]

    @property
    def scale_dtype(self) -> str:
        """bf16, with the range of float32 in half of its bytes, unless a checkpoint has others; u8
        exponents for mxfp4."""
        return "u8" if self.kind == "mxfp4" else self.scales

    @property
    def zero_dtype(self) -> str:
        return self.scales if self.float_zeros else "u8"

    def blocks(self, width: int) -> int:
        """The number of scales in a row of `width` weights."""
        return width // self.block if self.block else 1

    def nbytes(self, rows: int, width: int) -> int:
        """The bytes of `rows` rows of codes, scales and zeros, without padding."""
        sizes = {"u8": 1, "bf16": 2, "f16": 2, "f32": 4}
        zero = sizes[self.zero_dtype] if self.asymmetric else 0
        each = self.blocks(width) * (sizes[self.scale_dtype] + zero)
        return rows * (-(-width * self.bits // 8) + each)

    def __str__(self) -> str:
        block = f":{self.block}" if self.block and self.kind != "mxfp4" else ""
        rows = f":{WIDE_ROWS}" if self.row_bits == 16 else ""
        scales = "" if self.scale_dtype in ("bf16", "u8") else f":{self.scales}"
        zeros = ":float_zeros" if self.float_zeros else ":asymmetric" if self.asymmetric else ""
        return self.kind + block + zeros + rows + scales


def parse(text: str) -> Format:
    """Parse a format such as "int4:64:asymmetric".

    Raises UsageError, naming the wrong part, for any other text.
    """
    if not isinstance(text, str):
        raise UsageError(f"quant is a {type(text).__name__}: {SPELLING}")
    kind, *options = text.split(":")
    if kind not in KINDS:
        raise UsageError(f"quant {text!r}: {kind!r} is not a format; {SPELLING}")
    block, asymmetric, row_bits = 0, False, 8
    for option in options:
        if option == WIDE_ROWS and row_bits == 8:
            row_bits = 16
        elif kind == "mxfp4":
            raise UsageError(
                f"quant {text!r}: mxfp4 is symmetric, in blocks of 32: it takes no :{option}"
            )
        elif option == "asymmetric" and kind == "fp8":
            raise UsageError(f"quant {text!r}: fp8 has no zero point: it takes no :asymmetric")
        elif option == "asymmetric" and not asymmetric:
            asymmetric = True
        elif option in map(str, BLOCKS) and not block:
            block = int(option)
        else:
            raise UsageError(
                f"quant {text!r}: :{option} is neither a block size nor an option, or is "
                f"repeated; {SPELLING}"
            )
    return Format(kind, MXFP4_BLOCK if kind == "mxfp4" else block, asymmetric, row_bits)


PARTS = ("experts", "linears", "head")


@dataclass(frozen=True)
class Quantisation:
    """The formats of the parts of a model; None means not quantised. `linears` are all linear
    layers except routers and the head. `checkpoint` is the number of bits (8 or 16) to which rows
    are rounded where weights stay in the codes of their checkpoint; 0 dequantises them."""

    experts: Format | None = None
    linears: Format | None = None
    head: Format | None = None
    checkpoint: int = 0

    def __str__(self) -> str:
        formats = ((part, getattr(self, part)) for part in PARTS)
        return ",".join(f"{part}={format}" for part, format in formats if format is not None)


def with_float_rows(formats: Quantisation) -> Quantisation:
    """The formats for CPUs, whose kernels do not round the rows that fp8 weights multiply."""

    for part in PARTS:
        format = getattr(formats, part)
        if format is not None and format.kind == "fp8":
            formats = replace(formats, **{part: replace(format, row_bits=0)})
    return formats


UNCHANGED = {
    "none": Quantisation(),
    "checkpoint": Quantisation(checkpoint=8),
    "checkpoint:rows16": Quantisation(checkpoint=16),
}
"""Texts that name no format: dequantise what a checkpoint quantised, or keep its codes."""


def parse_parts(text: str) -> Quantisation:
    """Parse a text such as "int4:64,linears=int8,head=int8", or one of UNCHANGED; a format without
    a name is that of the experts.

    Raises UsageError, naming the wrong part, for any other text.
    """
    if not isinstance(text, str):
        raise UsageError(f"quant is a {type(text).__name__}: {SPELLING}")
    if text in UNCHANGED:
        return UNCHANGED[text]
    formats: dict[str, Format] = {}
    for item in text.split(","):
        part, equals, format = item.strip().partition("=")
        if not equals:
            part, format = "experts", part
        if part not in PARTS:
            raise UsageError(f"quant {text!r}: {part!r} is not one of {', '.join(PARTS)}")
        parsed = parse(format)
        if part in formats:
            raise UsageError(f"quant {text!r}: {part} is repeated")
        formats[part] = parsed
    return Quantisation(formats.get("experts"), formats.get("linears"), formats.get("head"))
