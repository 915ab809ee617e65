"""What the compiled driver is told about one step of a call: a C structure that lives as long as the call.

The steps that run one after the other in one call stand in an array of these structures.

Addresses are in bytes; strides, sizes and offsets count numbers. *Pixels* are numbered as the kernel computes them:
along rows of ``row`` pixels, of which the first ``columns`` are wanted.
"""

from __future__ import annotations

import ctypes

_INTEGERS = (
    # Progress, shared by the threads; `address` is the structure's own. Of the first step: how many `steps` there are,
    # and the function in which threads `wait` for each other (0 if there is but one). If `alone` is not 0, it is the
    # number of images that each belong to one thread; every thread has an array of its own then.
    *("address", "next_copy", "next_task", "next_slot", "next_image", "steps", "wait", "alone"),
    # Work: images × strips of pixels × chunks of blocks.
    *("tasks", "images", "strips", "chunks", "lanes", "kernels", "prefetch"),
    # What is read: input rows of `pixels` pixels; the layer's tables (see packing.py).
    *("x", "x_image", "x_channel", "pixels", "taps", "tap_count"),
    *("inputs", "ends", "weight", "bias", "filters", "blocks", "block_count"),
    # How pixels make a picture: `rows` rows, `rows_per_image` of them `image_pixels` apart from image to image.
    *("row", "columns", "rows", "rows_per_image", "image_pixels"),
    # Where results go, from the first pixel of the picture; the margins around it are cleared.
    *("staged", "out", "out_image", "out_channel", "out_row", "out_top", "out_bottom"),
    *("residual", "residual_image", "residual_channel", "residual_row", "code"),
    # A tile of `tile_row` pixels per filter for results that are put in place afterwards; two per thread.
    *("tiles", "tile_row", "iota"),
    # The copy that pads a picture or splits it into the phases of a stride.
    *("picture", "picture_image", "picture_channel", "picture_row", "height", "width"),
    *("planes", "planes_image", "planes_channel", "planes_phase", "plane_rows", "plane_row"),
    *("phases", "phase_count", "stride_height", "stride_width", "shift_top", "shift_left"),
    *("channels", "copied_at_once", "one_pixel"),
    # Steps that read the picture as it is, as addresses `picture`, and what they add, or multiply by, as `residual`.
    *("kind", "combine", "window_kernel", "window_kernel_of_one"),
    *("kernel_height", "kernel_width", "dilation_height", "dilation_width"),
)
LAYER, POINTWISE, MEAN, WINDOW, PIXEL = range(5)  # kinds of steps


class Call(ctypes.Structure):
    """One step of a call, as the compiled driver reads it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    )
