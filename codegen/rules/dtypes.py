"""The dtypes that vectors of kernels hold."""

VECTOR_DTYPES = ("f32", "bf16", "f16")
