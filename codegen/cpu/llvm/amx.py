"""The LLVM functions for the eight tile registers of AMX, each of 16 rows of 64 bytes.

Registers 0 to 3 hold sums; all others are for operands. The configuration belongs to a thread. As
long as it is set, the system saves 8 KiB at every context switch, so a task sets and releases it.
"""

from __future__ import annotations

SUMS = 4
"""The number of registers for sums."""
TILE_ROWS = 16
TILE_BYTES = 64  # of a row
_REGISTERS = 8
_PRODUCTS = {"bf16": "tdpbf16ps", "int8": "tdpbssd", "uint8": "tdpbsud"}
"""The instruction for each type of weights; bytes of rows are signed."""


def tile_functions() -> str:
    """The text for `pragma_import_llvm`; calls return 0."""
    numbers = "i8 immarg"
    declared = {
        "ldtilecfg": "ptr",
        "tilerelease": "",
        "tilezero": numbers,
        "tileloadd64": f"{numbers}, ptr, i64",
        "tilestored64": f"{numbers}, ptr, i64",
        **dict.fromkeys(_PRODUCTS.values(), f"{numbers}, {numbers}, {numbers}"),
    }
    lines = [f"declare void @llvm.x86.{name}({types})" for name, types in declared.items()]
    lines += [_CONFIGURATION, _COPY]
    lines.append(_function("tiles_begin", "", "ldtilecfg(ptr @moec_tile_config)"))
    lines.append(_function("tiles_end", "", "tilerelease()"))
    for t in range(_REGISTERS):
        lines.append(_function(f"tile_zero_{t}", "", f"tilezero(i8 {t})"))
        arguments = "ptr %p, i64 %stride"
        where = f"(i8 {t}, ptr %p, i64 %stride)"
        lines.append(_function(f"tile_load_{t}", arguments, "tileloadd64" + where))
        lines.append(_function(f"tile_store_{t}", arguments, "tilestored64" + where))
        lines.append(_load_text(t))
    for c in range(SUMS):
        for a in range(SUMS, _REGISTERS):
            for b in range(SUMS, _REGISTERS):
                for name, call in _PRODUCTS.items():
                    registers = f"(i8 {c}, i8 {a}, i8 {b})"
                    lines.append(_function(f"tile_{name}_{c}_{a}_{b}", "", call + registers))
    return "\n".join(lines)


def _function(name: str, arguments: str, call: str) -> str:
    return f"""
define linkonce_odr i32 @moec_{name}_16({arguments}) alwaysinline {{
  call void @llvm.x86.{call}
  ret i32 0
}}"""


def _load_text(register: int) -> str:
    return f"""
define linkonce_odr i32 @moec_tile_load_either_{register}_16(
    i32 %first, ptr %p, i64 %stride, ptr %q, i64 %other) alwaysinline {{
  %one = icmp ne i32 %first, 0
  %where = select i1 %one, ptr %p, ptr %q
  %rows = select i1 %one, i64 %stride, i64 %other
  call void @llvm.x86.tileloadd64(i8 {register}, ptr %where, i64 %rows)
  ret i32 0
}}"""


def _bytes(values: list[int]) -> str:
    return "".join(f"\\{value:02X}" for value in values)


_COPY = f"""
define linkonce_odr i32 @moec_copy_line_16(ptr %to, ptr %source) alwaysinline {{
  %line = load <{TILE_BYTES} x i8>, ptr %source, align 1
  store <{TILE_BYTES} x i8> %line, ptr %to, align {TILE_BYTES}
  ret i32 0
}}"""
# Palette 1; then bytes of a row, 16 bits for each of 16 registers; then rows, 8 bits for each.
_CONFIGURATION = (
    '@moec_tile_config = linkonce_odr constant [64 x i8] c"'
    + _bytes([1] + [0] * 15)
    + _bytes([TILE_BYTES, 0] * _REGISTERS + [0] * 16)
    + _bytes([TILE_ROWS] * _REGISTERS + [0] * 8)
    + '"'
)
