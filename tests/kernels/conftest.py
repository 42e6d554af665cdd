"""Triton on the CPU: its interpreter, where there is no GPU, with bfloat16 put right."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


@pytest.fixture(scope="session")
def interpreter():
    """Converts to bfloat16 and multiplies it as hardware does.

    The interpreter of Triton 3.7 cuts bits off instead of rounding, takes 1 for the number with the
    bits of the integer 1, and multiplies matrices as if their bits were integers.
    """
    if torch.cuda.is_available():
        pytest.skip("Triton compiles where there is a GPU")
    runtime = pytest.importorskip("triton.runtime.interpreter")
    import triton.language as tl

    def to_float32(x):
        return cast(builder, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def rounded_cast(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 != src.dtype.scalar:
            rounded = torch.tensor(src.data.astype("float32")).to(torch.bfloat16)
            return runtime.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, src, dst_type)

    def float32_dot(self, a, b, *args):
        return dot(self, to_float32(a), to_float32(b), *args)

    builder = runtime.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", rounded_cast)
        patch.setattr(builder, "create_dot", float32_dot)
        yield


@pytest.fixture(scope="module")
def poisoned_memory():
    """Fresh memory holds NaN, so that an element that nobody writes is seen."""

    def poisoned(allocate):
        def allocate_nan(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocate_nan

    with torch.device("cpu"):
        torch.empty(0)  # torch keeps which functions `torch.device` governs; let it keep its own
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield
