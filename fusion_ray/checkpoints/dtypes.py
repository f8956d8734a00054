"""The element types of safetensors files: their names there, their sizes and what torch calls them."""

import torch

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ITEM_BYTES: dict[str, int] = {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()}
MERGEABLE = ("F64", "F32", "F16", "BF16")  # arithmetic is done on these; the others must be the same in every model
BY_CONFIG_NAME = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
