"""How one layer runs on pictures of one size: what is copied first, which pixels are computed, how the work is divided.

The kernel sees rows of pixels. Where the layer has stride 1 and the margins of its input hold its padding, it reads
the input in place: a tap is an offset, and rows run on over the right margin, whose results are dropped. Otherwise the
input is copied: with stride 1 into margins of its own, with another stride split into its phases (pixels
``sh·i + a, sw·j + b``), in which every tap is an offset again.

A picture of fewer pixels than a vector (a linear layer has one) would leave lanes idle: then the copy puts the pictures
of the batch one after the other, and the kernel runs over all of them at once (`folded`).

Results are stored where they belong if the output's rows, and those of the residual, are as long as the kernel's;
otherwise a tile is computed aside and then put in place (`staged`).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

from passes.errors import InputError
from passes.kernel.layout.geometry import Geometry, Margins
from passes.kernel.runtime.call_record import Call


@dataclass(frozen=True)
class Tiling:
    """How the work is cut; what is fastest depends on the machine's caches.

    Attributes:
        strip: vectors of pixels in a strip; a block of filters is computed over one strip before the next.
        tasks: tasks per thread, at least; strips alone may be more.
    """

    strip: int = 28
    tasks: int = 4


DEFAULT_TILING = Tiling()
_COPIED_AT_ONCE = 2048
# An input of more bytes has left the caches since it was written: a strip of it is asked for before it is read, which
# saved a tenth of the time of wide 1×1 layers at batch 16, and cost small inputs as much.
_LARGE = 8 * 2**20


@dataclass(frozen=True)
class Job:
    """A layer and the shapes of one call; all that `schedule` looks at."""

    geometry: Geometry
    tiling: Tiling
    images: int
    height: int
    width: int
    reads: Margins
    adds: Margins | None  # None: no residual
    writes: Margins
    blocks: int
    lanes: int
    threads: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """A job's plan: a `Call` with everything but addresses filled in, and what must be allocated for it.

    Attributes:
        copied: size of the buffer of copied planes in numbers; 0 if the input is read in place.
        tiles: size of the tiles of all threads in numbers; 0 if results are stored directly.
        threads: threads that have something to do.
        folded: whether pictures are put one after the other.
        template: the call, without addresses.
    """

    copied: int
    tiles: int
    threads: int
    folded: bool
    template: Call
    _tables: tuple[object, ...]  # taps and phases: the template holds their addresses


@dataclass(frozen=True)
class _Source:
    """The planes that are read: their rows, where each tap lies in them, and the phases they were split into."""

    rows: int
    row: int
    taps: list[int]
    shift: tuple[int, int]
    phases: list[tuple[int, int]]


@lru_cache(maxsize=4096)
def schedule(job: Job) -> Schedule:
    """Plan a job. Pure: equal jobs have one schedule."""
    geometry, lanes = job.geometry, job.lanes
    rows, columns = geometry.output_size(job.height, job.width)
    if rows < 1 or columns < 1:
        raise InputError(
            f"a picture of {job.height} × {job.width} pixels is smaller than the kernel: {geometry.kernel_size}, "
            f"dilation {geometry.dilation}, padding {geometry.padding}"
        )
    source = _in_place(job, columns)
    in_place = source is not None and (rows - 1) * source.row + columns >= lanes
    if source is None or not in_place:
        source = _padded(job, columns) if geometry.stride == (1, 1) else _phases(job, rows, columns)
    pixels, plane = (rows - 1) * source.row + columns, source.rows * source.row
    folded = pixels < lanes
    call = Call(
        images=job.images, lanes=lanes, row=source.row, columns=columns, rows=rows, rows_per_image=rows,
        image_pixels=plane, tap_count=len(source.taps), x_channel=plane * len(source.phases), pixels=pixels,
    )  # fmt: skip
    if folded:
        call.pixels = max((job.images - 1) * plane + pixels, lanes)
        call.rows = job.images * rows
        call.x_channel = len(source.phases) * job.images * plane
    elif job.images > 1:  # the planes of one image serve every other that is computed after it
        call.x_image = geometry.in_channels * call.x_channel
    _output(call, job, rows, columns, folded)
    copied, call.channels = 0, geometry.in_channels
    call.prefetch = in_place and 4 * job.images * geometry.in_channels * plane > _LARGE
    if not in_place:
        _copy(call, job, source, folded)
        # Vectors of a folded picture may run past the last plane.
        copied = job.images * geometry.in_channels * len(source.phases) * plane + (lanes if folded else 0)
    threads = _divide(call, job, 1 if folded else max(job.images, 1))
    taps = (ctypes.c_int64 * len(source.taps))(*source.taps)
    phases = (ctypes.c_int64 * (2 * len(source.phases)))(*(each for phase in source.phases for each in phase))
    call.taps, call.phases = ctypes.addressof(taps), ctypes.addressof(phases)
    tiles = 2 * 8 * call.tile_row * job.threads if call.staged else 0
    return Schedule(copied, tiles, threads, folded, call, (taps, phases))


def _in_place(job: Job, columns: int) -> _Source | None:
    """The input as it lies in memory, if its margins hold the padding."""
    geometry, reads = job.geometry, job.reads
    need, row = geometry.margins(), job.width + job.reads.right
    if geometry.stride != (1, 1) or row < columns:
        return None
    if reads.top < need.top or reads.bottom < need.bottom or reads.right < need.right:
        return None
    taps = _offsets(geometry, reads.top, row)
    return _Source(reads.top + job.height + reads.bottom, row, taps, (0, 0), [(0, 0)])


def _padded(job: Job, columns: int) -> _Source:
    """A copy of the input in margins of its own."""
    own = job.geometry.margins()
    row = max(job.width + own.right, columns)
    taps = _offsets(job.geometry, own.top, row)
    return _Source(own.top + job.height + own.bottom, row, taps, (own.top, 0), [(0, 0)])


def _offsets(geometry: Geometry, top: int, row: int) -> list[int]:
    padded_top, _, padded_left, _ = geometry.padding
    return [(down + top - padded_top) * row + right - padded_left for down, right in geometry.taps()]


def _phases(job: Job, rows: int, columns: int) -> _Source:
    """A copy of the input split into the phases of the stride that some tap reads."""
    (step_down, step_right), taps = job.geometry.stride, job.geometry.taps()
    phases = sorted({(down % step_down, right % step_right) for down, right in taps})
    plane_rows = rows + job.geometry.reach[0] // step_down
    row = columns + job.geometry.reach[1] // step_right
    # Folded or not, the planes of one channel's phases lie one after the other; see `_copy`.
    per_phase = plane_rows * row
    if (rows - 1) * row + columns < job.lanes:
        per_phase *= job.images
    offsets = [
        phases.index((down % step_down, right % step_right)) * per_phase + down // step_down * row + right // step_right
        for down, right in taps
    ]
    top, _, left, _ = job.geometry.padding
    return _Source(plane_rows, row, offsets, (top, left), phases)


def _output(call: Call, job: Job, rows: int, columns: int, folded: bool) -> None:
    """Say how the result and the residual lie in memory."""
    writes, adds = job.writes, job.adds
    call.out_row, call.out_top, call.out_bottom = columns + writes.right, writes.top, writes.bottom
    call.out_channel = (writes.top + rows + writes.bottom) * call.out_row
    call.staged = folded or call.out_row != call.row
    if adds is not None:
        call.residual_row = columns + adds.right
        call.residual_channel = (adds.top + rows + adds.bottom) * call.residual_row
        call.staged = call.staged or call.residual_row != call.row


def _copy(call: Call, job: Job, source: _Source, folded: bool) -> None:
    """Say how the input is copied."""
    reads, plane = job.reads, source.rows * source.row
    call.picture_row, call.height, call.width = job.width + reads.right, job.height, job.width
    call.picture_channel = (reads.top + job.height + reads.bottom) * call.picture_row
    call.plane_rows, call.plane_row = source.rows, source.row
    call.planes_channel = call.x_channel
    call.planes_phase = plane * job.images if folded else plane
    call.planes_image = plane if folded else call.x_image
    call.phase_count = len(source.phases)
    call.stride_height, call.stride_width = job.geometry.stride
    call.shift_top, call.shift_left = source.shift
    # A thread copies some thousand pixels at a time; the pictures of a linear layer are but one pixel.
    size = plane * call.phase_count
    call.copied_at_once = max(1, _COPIED_AT_ONCE // size)
    call.one_pixel = size == job.height * job.width == 1 and source.shift == (0, 0)


def _divide(call: Call, job: Job, images: int) -> int:
    """Divide the work into tasks; return how many threads have something to do."""
    vectors = -(-call.pixels // job.lanes)
    # At least two vectors in a strip: the last one overlaps the one before, and must not reach into another strip.
    call.strips = max(1, min(-(-vectors // job.tiling.strip), vectors // 2))
    wanted = job.tiling.tasks * job.threads if job.threads > 1 else 1
    call.chunks = max(1, min(-(-wanted // (images * call.strips)), job.blocks))
    call.tasks = images * call.strips * call.chunks
    call.tile_row = -(-vectors // call.strips) * job.lanes
    tasks: int = call.tasks
    return max(1, min(job.threads, tasks))
