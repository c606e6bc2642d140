"""A training batch from bytes in one pass: gather -> crop -> mirror -> cutout -> normalize -> cast.

images is [n_images, height, width, 3] in memory (channels_last), uint8; y is [n_batch, height, width, 3] in memory, of
a floating type. `plan` has six int32 for each image of the batch: its index, the crop's shift_y and shift_x in
0 … 2·padding, mirror (0 or 1), and the cutout's upper left corner cut_y, cut_x. For the pixel (i, j) of y:

    (A1)  row = i + shift_y - padding,   column = (mirror ? width - 1 - j : j) + shift_x - padding
    (A2)  outside the image: black, or the row and column reflected at the edge (-1 -> 1, height -> height - 2)
    (A3)  y = (x - 255·mean) · 1/(255·std) in fp32, rounded once; 0 in the cutout, a square of side `cutout`
"""

import triton
import triton.language as tl


@triton.jit
def reflect(at, size):
    """Reflect an index at the edges: -1 -> 1, size -> size - 2. It must be less than `size` away from the image."""
    at = tl.abs(at)
    return tl.where(at < size, at, 2 * (size - 1) - at)


@triton.jit
def by_channel(channel, red, green, blue):
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def augment_kernel(
    images_ptr,
    labels_ptr,
    plan_ptr,
    y_ptr,
    batch_labels_ptr,
    height,
    width,
    padding,
    cutout,
    shift_red,
    shift_green,
    shift_blue,
    scale_red,
    scale_green,
    scale_blue,
    REFLECT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute BLOCK_P pixels of one image (A1-A3); the first program of each image also gathers its label."""
    n_pixels = height * width
    n_tiles = tl.cdiv(n_pixels, BLOCK_P)
    image = (tl.program_id(0) // n_tiles).to(tl.int64)
    tile = tl.program_id(0) % n_tiles
    draws_ptr = plan_ptr + image * 6
    index = tl.load(draws_ptr).to(tl.int64)
    shift_y = tl.load(draws_ptr + 1)
    shift_x = tl.load(draws_ptr + 2)
    mirror = tl.load(draws_ptr + 3)
    cut_y = tl.load(draws_ptr + 4)
    cut_x = tl.load(draws_ptr + 5)
    if tile == 0:
        tl.store(batch_labels_ptr + image, tl.load(labels_ptr + index))

    pixel = (tile * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    channel = tl.arange(0, 4)[None, :]  # three and a masked one: a tile's sides are powers of two
    i, j = pixel // width, pixel % width
    row = i + shift_y - padding
    column = tl.where(mirror != 0, width - 1 - j, j) + shift_x - padding
    mask = (pixel < n_pixels) & (channel < 3)
    if REFLECT:
        row, column = reflect(row, height), reflect(column, width)
        inside = mask
    else:
        inside = mask & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    x = tl.load(images_ptr + (index * n_pixels + row * width + column) * 3 + channel, mask=inside, other=0)

    shift = by_channel(channel, shift_red, shift_green, shift_blue)
    y = (x.to(tl.float32) - shift) * by_channel(channel, scale_red, scale_green, scale_blue)
    is_cut = (i >= cut_y) & (i < cut_y + cutout) & (j >= cut_x) & (j < cut_x + cutout)
    y = tl.where(is_cut, 0.0, y)
    tl.store(y_ptr + (image * n_pixels + pixel) * 3 + channel, y, mask=mask)
