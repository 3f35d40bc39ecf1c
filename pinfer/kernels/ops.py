"""Every op: `ops.quant_matmul(x, weight)` dispatches by device."""

from pinfer.kernels.add import OP as add
from pinfer.kernels.attention import OP as attention
from pinfer.kernels.dequantize import OP as dequantize
from pinfer.kernels.embed import OP as embed
from pinfer.kernels.glu import OP as glu
from pinfer.kernels.input_sparse_matmul import OP as input_sparse_matmul
from pinfer.kernels.layer_norm import OP as layer_norm
from pinfer.kernels.quant_matmul import OP as quant_matmul
from pinfer.kernels.registry import Op
from pinfer.kernels.rms_norm import OP as rms_norm
from pinfer.kernels.rope import OP as rope
from pinfer.kernels.select_active import OP as select_active
from pinfer.kernels.sign_select import OP as sign_select
from pinfer.kernels.softcap import OP as softcap
from pinfer.kernels.sparse_ffn import OP as sparse_ffn
from pinfer.kernels.split_active import OP as split_active
from pinfer.kernels.tally import OP as tally
from pinfer.kernels.tally_kept import OP as tally_kept
from pinfer.kernels.threshold_matmul import OP as threshold_matmul
from pinfer.kernels.top_k import OP as top_k

OPS: tuple[Op, ...] = (
    embed,
    rms_norm,
    layer_norm,
    quant_matmul,
    rope,
    attention,
    softcap,
    add,
    glu,
    select_active,
    split_active,
    sign_select,
    threshold_matmul,
    tally,
    tally_kept,
    sparse_ffn,
    input_sparse_matmul,
    top_k,
    dequantize,
)

__all__ = [
    "OPS", "add", "attention", "dequantize", "embed", "glu", "input_sparse_matmul", "layer_norm", "quant_matmul",
    "rms_norm", "rope", "select_active", "sign_select", "softcap", "sparse_ffn", "split_active", "tally", "tally_kept",
    "threshold_matmul", "top_k",
]  # fmt: skip
