"""The element types of safetensors files: their names there, their sizes and what numpy holds them in."""

import numpy as np
import numpy.typing as npt

NUMPY_DTYPES: dict[str, npt.DTypeLike] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,  # its bits: numpy has no such type
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
ITEM_BYTES: dict[str, int] = {name: np.dtype(dtype).itemsize for name, dtype in NUMPY_DTYPES.items()}
MERGEABLE = ("F64", "F32", "F16", "BF16")  # arithmetic is done on these; the others must be the same in every model
BY_CONFIG_NAME = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
