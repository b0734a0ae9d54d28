"""Linear layers that share an input as one, with weights laid out for the processor once.

M rows, I width of the input, O width of the output.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from alpaca_ray.config import Quantization

Linear = Callable[[Tensor], Tensor]  # (M, I) -> (M, O)


def fuse(layers: Sequence[torch.nn.Linear], quantization: Quantization | None = None) -> Linear:
    """The layers' outputs, one beside the other. `quantization` is for CPUs where `has_quantization` is true."""
    weight = torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight.detach()
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    if quantization == "int8":
        return _eight_bits(weight, bias)
    if quantization == "float16":
        return _halved(weight, bias)
    if _packs(weight):
        return _packed(weight, bias)
    return partial(linear, weight=weight, bias=bias)


def has_quantization() -> bool:
    """Whether torch has FBGEMM here, which it has on x86."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def _packs(weight: Tensor) -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's
    computes = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_bfloat16())
    return available and weight.device.type == "cpu" and computes


def _packed(weight: Tensor, bias: Tensor | None) -> Linear:
    """By oneDNN, as torch's inductor does it: 1.2 to 1.6 times as fast at 16 rows, and a row's result has the same
    bits whatever the number of rows (measured for 1 to 96 of them), which no other kernel of torch's promises. In
    bfloat16, where the CPU has it, 1.6 to 1.9 times as fast as in float32."""
    # The number of rows is a hint; packing for another one made no difference.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def layer(rows: Tensor) -> Tensor:
        output: Tensor = multiply(rows, packed, bias, "none", [], "")
        return output

    return layer


def _halved(weight: Tensor, bias: Tensor | None) -> Linear:
    """Weights in float16, inputs and sums in float32, by FBGEMM: half the bytes of a step, 1.1 to 1.7 times as fast.

    Weights that were published in 16 bits change by at most 3e-8. A row's result has the same bits whatever the number
    of rows, but for FBGEMM's kernels of one and two rows, which sum in another order: it has them do what is left of
    the rows by sixes. So one or two of zeros make it three.
    """
    torch.backends.quantized.engine = "fbgemm"
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
    multiply, zeros = torch.ops.quantized.linear_dynamic_fp16, torch.zeros(2, weight.shape[1])

    def layer(rows: Tensor) -> Tensor:
        left = len(rows) % 6
        if left not in (1, 2):
            return cast(Tensor, multiply(rows, packed))
        return cast(Tensor, multiply(torch.cat((rows, zeros[: 3 - left])), packed))[: len(rows)]

    return layer


def _eight_bits(weight: Tensor, bias: Tensor | None) -> Linear:
    """Weights in 7 bits with a scale for each output, inputs in 8 with a scale for each row (LLM.int8(), Dettmers et
    al. 2022, section 3.1, without its outlier columns). At 16 rows 2 to 3 times as fast as float32.

    7 and 8 bits, because AVX2 adds pairs of products in 16 bits: no pair overflows. FBGEMM's own scale is one for all
    rows, so that a row's result would change with the rows beside it: here each row comes with its own taken out.
    """
    weight = weight.float()
    scales = weight.abs().amax(1).clamp_min(torch.finfo(weight.dtype).tiny).double() / 63
    with warnings.catch_warnings():  # torch means to drop its quantized tensors; FBGEMM takes weights in no other form
        warnings.simplefilter("ignore", UserWarning)
        eights = torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
    torch.backends.quantized.engine = "fbgemm"
    packed = torch.ops.quantized.linear_prepack(eights, None)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32

    def layer(rows: Tensor) -> Tensor:
        scale = rows.abs().amax(-1, keepdim=True).clamp_min_(1e-30)
        output: Tensor = multiply(rows / scale, 1 / 127, 128, packed).mul_(scale)
        return output if bias is None else output.add_(bias)

    return layer
