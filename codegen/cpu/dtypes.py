"""Names of the floats that kernels take and give: the IR's -> TVM's."""

TVM_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
