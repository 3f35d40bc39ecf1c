"""Kernels that hand a layer's input to a CPU thread and take its result, through memory that both see.

Mailboxes lie in pinned host memory, which a GPU reads and writes over its bus. `publish` writes the input and
the list of cold neurons and then raises a flag to the step's epoch, for a worker that waits for it (AWAIT in
control.h); `collect` waits until the worker has raised its own, and copies the result. Nobody waits for ever:
`collect` gives up after some polls and says so in `failed`, after which no other waits in that step.

Each flag has one writer. A GPU's atomics on host memory are no atomics to the CPU, so what it waits for it only
reads, past its caches; its own flag is raised by an exchange because that is how Triton spells a release.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import FLOATS, INTS, Build
from pinfer.kernels.select_active.reference import Active

BLOCK, NUM_WARPS = 1024, 8
POLLS = 10_000_000  # of about a microsecond each


@triton.jit
def _publish_kernel(
    x_ptr, size, indices_ptr, count_ptr, neurons, epoch_ptr, to_x_ptr, to_indices_ptr, to_count_ptr, flag_ptr,
    HAS_LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    for first in range(0, size, BLOCK):
        x = tl.load(x_ptr + first + at, mask=first + at < size, other=0.0)
        tl.store(to_x_ptr + first + at, x, mask=first + at < size)
    if HAS_LIST:
        count = tl.load(count_ptr)
        listed = tl.minimum(count, neurons)  # a count that is wrong is for the worker to see
        for first in range(0, listed, BLOCK):
            n = tl.load(indices_ptr + first + at, mask=first + at < listed, other=0)
            tl.store(to_indices_ptr + first + at, n, mask=first + at < listed)
        tl.store(to_count_ptr, count)
    tl.debug_barrier()  # every thread's stores come before the one that raises the flag
    tl.atomic_xchg(flag_ptr, tl.load(epoch_ptr, volatile=True), sem="release", scope="sys")


@triton.jit
def _collect_kernel(
    y_ptr, size, flag_ptr, epoch_ptr, failed_ptr, polls, out_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    epoch = tl.load(epoch_ptr, volatile=True)
    left = tl.where(tl.load(failed_ptr, volatile=True) == epoch, 0, polls)
    late = tl.load(flag_ptr, volatile=True) - epoch < 0
    while late & (left > 0):
        late = tl.load(flag_ptr, volatile=True) - epoch < 0
        left -= 1
    if late:
        tl.store(failed_ptr, epoch)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(y_ptr + at, mask=at < size, other=0.0, volatile=True), mask=at < size)


def publish(
    x: torch.Tensor,
    active: Active | None,
    to_x: torch.Tensor,
    to_active: Active | None,
    flag: torch.Tensor,
    epoch: torch.Tensor,
) -> None:
    """Write x float32 [T, D] and, where there is one, the list into memory of the same shapes; then raise the flag.

    flag, epoch: int32 [1] in host memory. ValueError for other shapes.
    """
    if to_x.shape != x.shape or (active is None) != (to_active is None):
        raise ValueError(f"a mailbox for {list(to_x.shape)} where {list(x.shape)} is published")
    listed, mailbox = active or Active(flag, flag), to_active or Active(flag, flag)
    _publish_kernel[(1,)](
        x.contiguous(), x.numel(), listed.indices, listed.count, listed.indices.numel(), epoch, to_x, mailbox.indices, mailbox.count, flag,
        HAS_LIST=active is not None, BLOCK=BLOCK, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip


def collect(y: torch.Tensor, flag: torch.Tensor, epoch: torch.Tensor, failed: torch.Tensor, out: torch.Tensor) -> None:
    """Copy host memory y float32 [T, D] to `out` on the device once the flag is at the epoch.

    Where that takes more than POLLS, `failed` int32 [1] becomes the epoch, and `out` is whatever is there.
    """
    _collect_kernel[(triton.cdiv(y.numel(), BLOCK),)](
        y, y.numel(), flag, epoch, failed, POLLS, out, BLOCK=BLOCK, num_warps=NUM_WARPS, num_stages=1
    )


def builds() -> list[Build]:
    to_cpu = {
        **dict.fromkeys(("x_ptr", "to_x_ptr"), FLOATS), "size": "i32", "neurons": "i32",
        **dict.fromkeys(
            ("indices_ptr", "count_ptr", "epoch_ptr", "to_indices_ptr", "to_count_ptr", "flag_ptr"), INTS
        ),
    }  # fmt: skip
    back = {
        **dict.fromkeys(("y_ptr", "out_ptr"), FLOATS), "size": "i32",
        **dict.fromkeys(("flag_ptr", "epoch_ptr", "failed_ptr"), INTS), "polls": "i32",
    }  # fmt: skip
    return [
        *(
            Build(
                f"publish x{' and a list' * has_list}", _publish_kernel, to_cpu,
                {"HAS_LIST": has_list, "BLOCK": BLOCK}, NUM_WARPS, multiples_of_16=("size",), atomics=True,
            )
            for has_list in (False, True)
        ),
        Build("collect", _collect_kernel, back, {"BLOCK": BLOCK}, NUM_WARPS, multiples_of_16=("size",)),
    ]  # fmt: skip
