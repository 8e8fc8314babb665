"""Slice rules of ATen operators, one file a family; importing this package registers them all."""

from fxstream.passes.operators import attention, conv, matmul, norms, pointwise, quantized, tensors, views

__all__ = ["attention", "conv", "matmul", "norms", "pointwise", "quantized", "tensors", "views"]
