"""Running out of memory is told from other errors, and from a model that cannot be stacked."""

import errno

import pytest
import torch

from stagewise.memory import out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_every_name_of_running_out_of_memory_is_known(error):
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("Batching rule not implemented for aten::foo"), ValueError("out of memory"), OSError("disk")]
)
def test_other_errors_are_not_taken_for_it(error):
    assert not out_of_memory(error)
