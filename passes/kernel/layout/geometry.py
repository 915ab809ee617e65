"""What a layer's pictures look like: kernel, stride, padding, dilation, and the margins around a picture in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.nn import functional as F

from passes.errors import InputError


@dataclass(frozen=True)
class Margins:
    """Zeros around a picture, so that the layer that reads it next needs no copy to pad it.

    A picture ``[N, C, H, W]`` with margins is a contiguous tensor ``[N, C, top + H + bottom, W + right]`` that is zero
    outside. There is no left margin: the right margin of one row is the left margin of the next.

    Attributes:
        top: rows of zeros above.
        bottom: rows of zeros below.
        right: columns of zeros beside.
    """

    top: int = 0
    bottom: int = 0
    right: int = 0

    def apply(self, picture: Tensor) -> Tensor:
        """Copy a picture ``[N, C, H, W]`` into margins."""
        return F.pad(picture, (0, self.right, self.top, self.bottom))

    def strip(self, plane: Tensor) -> Tensor:
        """View the picture inside a plane with these margins."""
        height, width = self.picture_size(plane.shape)
        return plane[..., self.top : self.top + height, :width]

    def picture_size(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of the picture in a tensor of `shape` with these margins."""
        return shape[-2] - self.top - self.bottom, shape[-1] - self.right


NO_MARGINS = Margins()


@dataclass(frozen=True)
class Geometry:
    """How a layer moves over a picture, in pixels.

    Attributes:
        out_channels: filters.
        in_channels: inputs.
        kernel_size: height and width.
        stride: vertical and horizontal.
        padding: top, bottom, left, right.
        dilation: vertical and horizontal.
    """

    out_channels: int
    in_channels: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        """Refuse what is no convolution."""
        sizes = (*self.kernel_size, *self.stride, *self.dilation)
        if min(sizes) < 1 or min(*self.padding, self.out_channels, self.in_channels) < 0:
            raise InputError(
                f"{self} is no convolution: kernel, stride and dilation must be at least 1, the rest at least 0"
            )

    @cached_property
    def reach(self) -> tuple[int, int]:
        """Rows and columns between the first and the last pixel that one output reads."""
        return (self.kernel_size[0] - 1) * self.dilation[0], (self.kernel_size[1] - 1) * self.dilation[1]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for a picture of `height` × `width`."""
        top, bottom, left, right = self.padding
        rows = (height + top + bottom - self.reach[0] - 1) // self.stride[0] + 1
        columns = (width + left + right - self.reach[1] - 1) // self.stride[1] + 1
        return rows, columns

    def margins(self) -> Margins:
        """The margins with which this layer reads its input in place; strided layers copy it whatever the margins."""
        top, bottom, left, right = self.padding
        # A row above the padding holds what lies left of its first pixel.
        return Margins(top + (left > 0), bottom, max(left, right))

    def taps(self) -> list[tuple[int, int]]:
        """For each weight of a connection, how far down and right of the output's corner it reads."""
        down, right = self.dilation
        return [
            (row * down, column * right) for row in range(self.kernel_size[0]) for column in range(self.kernel_size[1])
        ]
