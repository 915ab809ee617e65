"""The compiled loop that copies a picture into padded planes, split into the phases of a stride."""

from __future__ import annotations

from typing import Any

from passes.kernel.runtime.intrinsics import NEXT_COPY, clear, copy_strided, floats, integers, jit, take


@jit
def _copy_phase(call: Any, picture: int, plane: int, down: int, right: int) -> None:
    """Fill one plane of a channel: pixels ``step · i + down, step · j + right`` of its padded picture."""
    step, shift, row = call.stride_width, right - call.shift_left, call.plane_row
    first = min(max(0, (-shift + step - 1) // step), row)
    end = max(first, min(row, (call.width - shift + step - 1) // step))
    for line in range(call.plane_rows):
        to, there = plane + 4 * line * row, line * call.stride_height + down - call.shift_top
        if there < 0 or there >= call.height:
            clear(to, row)
            continue
        source = picture + 4 * (there * call.picture_row + first * step + shift)
        clear(to, first)
        copy_strided(to + 4 * first, source, end - first, step)
        clear(to + 4 * end, row - end)


@jit
def _copy_channels(call: Any, task: int) -> None:
    """Fill the planes of `copied_at_once` channels of an image."""
    parts = (call.channels + call.copied_at_once - 1) // call.copied_at_once
    image, start = task // parts, task % parts * call.copied_at_once
    pictures, planes = call.picture + 4 * image * call.picture_image, call.planes + 4 * image * call.planes_image
    phases = integers(call.phases)
    for channel in range(start, min(start + call.copied_at_once, call.channels)):
        picture, plane = pictures + 4 * channel * call.picture_channel, planes + 4 * channel * call.planes_channel
        if call.one_pixel != 0:
            floats(plane)[0] = floats(picture)[0]
            continue
        for phase in range(call.phase_count):
            down, right = phases[2 * phase], phases[2 * phase + 1]
            _copy_phase(call, picture, plane + 4 * phase * call.planes_phase, down, right)


@jit
def copy_planes(call: Any) -> None:
    """Copy the channels of all images into padded planes, split into the phases of the stride, some at a time."""
    tasks = call.images * ((call.channels + call.copied_at_once - 1) // call.copied_at_once)
    task = take(call.address + NEXT_COPY)
    while task < tasks:
        _copy_channels(call, task)
        task = take(call.address + NEXT_COPY)


@jit
def copy_image(call: Any, image: int) -> None:
    """Copy the channels of one image."""
    parts = (call.channels + call.copied_at_once - 1) // call.copied_at_once
    for task in range(image * parts, (image + 1) * parts):
        _copy_channels(call, task)
