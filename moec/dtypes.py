"""The dtypes of the IR, and their names in numpy, torch and TVM.

All other tables of dtypes are derived from this one.
"""

from __future__ import annotations

LONG_NAMES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "bool": "bool",
    "c64": "complex64",
}
DTYPES = tuple(LONG_NAMES)
FLOATS = ("f32", "f16", "bf16", "f64")
HALVES = ("bf16", "f16")
INTS = ("i64", "i32", "i16", "i8", "u8")
INDEX_DTYPES = ("i64", "i32")
"""The dtypes of ids: of tokens, of experts, of rows of a table."""
MODEL_DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes to which the weights of a model may be converted."""
VECTOR_DTYPES = ("f32", "bf16", "f16")
"""The dtypes of the elements of vectors in kernels."""
SHORT_NAMES = {n: LONG_NAMES[n] for n in VECTOR_DTYPES} | {"fp32": "float32", "fp16": "float16"}
"""Other names of `MODEL_DTYPES` that are taken from users."""
