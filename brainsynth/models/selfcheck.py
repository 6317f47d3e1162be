"""Does bfloat16 work here? Some versions of cuDNN and oneDNN compute wrong 3D convolutions in it, without any error.

Known cases: cuDNN 9.8 to 9.14 on large inputs (pytorch#163539), oneDNN on AMX where a strided output is one cell wide
(pytorch#169688). Precision is part of a dataset's identity, so a failed check is refused; nothing falls back in silence.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainsynth.errors import UserError
from brainsynth.models.device import free_memory, is_out_of_memory

log = logging.getLogger(__name__)
_TOLERANCE = 0.02  # of the root mean square; rounding the output to bfloat16 alone costs 0.002
_FEW_CELLS = 8


@dataclasses.dataclass(frozen=True)
class ConvolutionShape:
    """One 3D convolution as a network runs it."""

    transposed: bool
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    input_xyz: tuple[int, ...]
    channels_last: bool


def convolution_shapes(run: Callable[[], object], *networks: nn.Module) -> list[ConvolutionShape]:
    """Each different 3D convolution that `run` asks of the networks; on the meta device nothing is computed."""
    seen: dict[ConvolutionShape, None] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
        shape = ConvolutionShape(
            transposed=isinstance(module, nn.ConvTranspose3d),
            weight_shape=tuple(module.weight.shape),
            stride=tuple(module.stride),
            padding=tuple(int(p) for p in module.padding),
            input_xyz=tuple(inputs[0].shape[2:]),
            channels_last=module.weight.is_contiguous(memory_format=torch.channels_last_3d),
        )
        seen[shape] = None

    convolutions = [m for n in networks for m in n.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]
    hooks = [module.register_forward_pre_hook(note) for module in convolutions]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen)


def check_bfloat16(shapes: list[ConvolutionShape], device: torch.device) -> None:
    """Compute each convolution in bfloat16 and in float32 from the same rounded numbers, and compare.

    At the network's own size on an accelerator; on a CPU, where that would take minutes, on at most 8 cells an axis.

    Raises:
        UserError: one differs by more than rounding can explain.
    """
    for shape in shapes:
        error = _measured(shape, device)
        if not error <= _TOLERANCE:  # NaN counts as wrong
            cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
            raise UserError(
                f"precision: bfloat16 is wrong on this device ({device}, torch {torch.__version__}, cuDNN "
                f"{cudnn}): a {'transposed ' if shape.transposed else ''}3D convolution "
                f"{shape.weight_shape} on {shape.input_xyz} cells differs by {error:.0%} from float32, rounding explains "
                "0.2%; use another version of torch or another device, or set precision: float32 (another dataset)"
            )


def _measured(shape: ConvolutionShape, device: torch.device) -> float:
    if device.type == "cpu":
        return relative_error(shape, device, _FEW_CELLS)
    try:
        return relative_error(shape, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    log.warning("bfloat16: too little memory to check a convolution on %s cells; checked on fewer", shape.input_xyz)
    free_memory()
    return relative_error(shape, device, _FEW_CELLS)


def relative_error(shape: ConvolutionShape, device: torch.device, most_cells: int | None = None) -> float:
    """Root mean square difference of the bfloat16 result, as a share of the float32 result's root mean square.

    Args:
        most_cells: along each axis; None computes the whole grid.
    """
    cells = [min(n, most_cells or n) for n in shape.input_xyz]
    generator = torch.Generator(device).manual_seed(0)  # a CPU takes 20 s to draw what the paper's networks need
    inputs = shape.weight_shape[0 if shape.transposed else 1]
    x = torch.randn(1, inputs, *cells, generator=generator, device=device).bfloat16()
    weight = torch.randn(shape.weight_shape, generator=generator, device=device).bfloat16()
    if shape.channels_last:
        x, weight = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, weight))
    convolve = functional.conv_transpose3d if shape.transposed else functional.conv3d
    with torch.no_grad():
        exact = convolve(x.float(), weight.float(), stride=shape.stride, padding=shape.padding)
        rounded = convolve(x, weight, stride=shape.stride, padding=shape.padding)
    return float((rounded.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
