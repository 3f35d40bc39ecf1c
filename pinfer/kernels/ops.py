"""Every op, in the order a sparse FFN uses them: `ops.quant_matmul(x, weight)` dispatches by device."""

from pinfer.kernels.dequantize import OP as dequantize
from pinfer.kernels.quant_matmul import OP as quant_matmul
from pinfer.kernels.registry import Op
from pinfer.kernels.select_active import OP as select_active
from pinfer.kernels.sparse_ffn import OP as sparse_ffn

OPS: tuple[Op, ...] = (dequantize, quant_matmul, select_active, sparse_ffn)

__all__ = ["OPS", "dequantize", "quant_matmul", "select_active", "sparse_ffn"]
