"""Launches of the batch norm's kernels: allocation of results and buffers, grids, compiler options. Imports triton.

Callers have checked the tensors: 4-D, dense, on one device, and those with the shape of x in its layout.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from resnet_fast.kernels import batch_norm_backward, batch_norm_forward, tiles

from .arguments import (
    NO_NORM,
    NO_STATISTICS,
    BatchNormArgs,
    Gradients,
    Inputs,
    Outputs,
    PartialStatistics,
    Saved,
    Settings,
    Statistics,
    accumulation_type,
)
from .plan import note

# Pixels are counted in 32 bits from the start of a tile's first image (kernels/tile_access.py: tile_pointers).
MAX_NCHW_PIXELS = 2**31 - tiles.NUM_WARPS * 32 * tiles.THREAD_ELEMENTS


class Shape(NamedTuple):
    """A 4-D tensor as the kernels see it: rows, channels and pixels per image, in one of two layouts."""

    n_rows: int
    n_channels: int
    n_spatial: int
    channels_last: bool
    rows_per_group: int  # rows of `ghost_batch_size` images, or all rows

    @classmethod
    def of(cls, x: Tensor, ghost_batch_size: int = 0) -> "Shape":
        n_images, n_channels, height, width = x.shape
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        if not channels_last and height * width > MAX_NCHW_PIXELS:
            raise ValueError(f"an NCHW image must have at most {MAX_NCHW_PIXELS} pixels, got {height}x{width}")
        group_images = ghost_batch_size if 0 < ghost_batch_size < n_images else n_images
        n_spatial = height * width
        return cls(n_images * n_spatial, n_channels, n_spatial, channels_last, group_images * n_spatial)

    @property
    def n_groups(self) -> int:
        return -(-self.n_rows // self.rows_per_group)

    @property
    def sizes(self) -> dict[str, int | None]:
        """The kernels' size arguments; `rows_per_group` is None for one group."""
        return {
            "n_rows": self.n_rows,
            "n_spatial": self.n_spatial,
            "rows_per_group": None if self.n_groups == 1 else self.rows_per_group,
        }

    @property
    def relu_mask(self) -> tuple[int, int]:
        """The shape of the ReLU bits, in bytes (kernels/tile_access.py: bit_offsets)."""
        if self.channels_last:
            return self.n_rows, -(-self.n_channels // 8)
        last_rows = self.n_rows - (self.n_groups - 1) * self.rows_per_group
        return self.n_channels, (self.n_groups - 1) * -(-self.rows_per_group // 8) - (-last_rows // 8)


def launch_kernel(kernel, grid: tuple, options: dict[str, Any] | None = None, /, **arguments) -> None:
    """Launch a kernel; every launch goes through here. `options` replace those of `compiler_options`."""
    if options is None:
        first = next(iter(arguments.values()))  # a tensor
        options = compiler_options(arguments, nvidia_capability(first.device))
    note(kernel, grid, arguments, kernel[grid](**arguments, **options))


def pointers(kernel, tensors: Any, prefix: str = "") -> dict[str, Tensor | None]:
    """Return the fields of a NamedTuple that are arguments of the kernel, named as there: `weight` as weight_ptr."""
    named = {f"{prefix}{name}_ptr": tensor for name, tensor in tensors._asdict().items()}
    return {name: tensor for name, tensor in named.items() if name in kernel.arg_names}


def compiler_options(arguments: dict[str, Any], capability: int | None) -> dict[str, Any]:
    """Return the options to compile and launch a kernel with these arguments; `capability`: see `nvidia_capability`."""
    tile = arguments.get("TILE")
    options: dict[str, Any] = {"num_warps": tile.num_warps if tile else tiles.NUM_WARPS}
    if capability is not None:
        element_size = arguments["x_ptr"].element_size() if tile else 0
        options["maxnreg"] = tiles.max_registers(tile, element_size, capability)
        if arguments.get("PDL"):
            options["launch_pdl"] = True
    return options


@cache
def nvidia_capability(device: torch.device) -> int | None:
    """Return the compute capability, 90 for 9.0; None if `device` is not an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def has_pdl(device: torch.device) -> bool:
    """Return whether `device` has programmatic dependent launch: a kernel can start while the previous one runs."""
    # CUDA graphs can record such launches with drivers of CUDA 12.3 and newer.
    return (nvidia_capability(device) or 0) >= 90 and torch._C._cuda_getDriverVersion() >= 12030  # type: ignore[attr-defined]


_choose_tiles = lru_cache(1024)(tiles.choose_tiles)  # called at every launch


def choose_tiles(shape: Shape, x: Tensor, n_tensors: int, reduction_programs: int = 0) -> tiles.Tiles:
    """Return the tiles of a kernel that reads `n_tensors` like x; see `tiles.choose_tiles`."""
    tile_bytes = tiles.THREAD_ELEMENTS * x.element_size() * n_tensors
    return _choose_tiles(*shape, tile_bytes, reduction_programs)


def partial_statistics(x: Tensor, shape: Shape) -> PartialStatistics:
    """Launch `statistics_kernel` and return its partial results."""
    tiling = choose_tiles(shape, x, 1, tiles.STATISTICS_PROGRAMS)
    partials = torch.empty(
        shape.n_groups + tiling.n_parts, shape.n_channels, 2, dtype=accumulation_type(x), device=x.device
    )
    launch_kernel(
        batch_norm_forward.statistics_kernel,
        (tiling.n_programs,),
        x_ptr=x,
        partials_ptr=partials,
        **shape.sizes,
        rows_per_split=tiling.rows_per_part,
        n_groups=shape.n_groups,
        TILE=tiling.tile,
        PDL=has_pdl(x.device),
    )
    return PartialStatistics(partials, tiling.rows_per_part)


def combine_statistics(
    partial: PartialStatistics, norm: BatchNormArgs, shape: Shape, var: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge partial results into mean and rstd, [n_groups, C]; update the running statistics in place.

    `var`, [n_groups, C] in fp64, receives the batch's biased variance.
    """
    partials, rows_per_split = partial
    group_splits = -(-shape.rows_per_group // rows_per_split)
    mean, rstd = empty_statistics(partials, shape)
    launch_kernel(
        batch_norm_forward.combine_statistics_kernel,
        (triton.cdiv(shape.n_channels, tiles.COMBINE_BLOCK_C),),
        partials_ptr=partials,
        running_mean_ptr=norm.running_mean,
        running_var_ptr=norm.running_var,
        mean_ptr=mean,
        rstd_ptr=rstd,
        var_ptr=var,
        n_rows=shape.n_rows,
        rows_per_group=shape.sizes["rows_per_group"],
        rows_per_split=rows_per_split,
        n_splits=len(partials) - shape.n_groups,
        n_groups=shape.n_groups,
        group_splits=group_splits,
        momentum=norm.momentum,
        eps=norm.eps,
        N_CHANNELS=shape.n_channels,
        **tiles.merge_blocks(group_splits),
        BLOCK_C=tiles.COMBINE_BLOCK_C,
        PDL=has_pdl(partials.device),
    )
    return mean, rstd


def moments(x: Tensor, var: Tensor) -> Tensor:
    """Return the mean of all rows, [C]; `var`, [C] in fp64, receives their biased variance."""
    shape = Shape.of(x)
    return combine_statistics(partial_statistics(x, shape), NO_NORM, shape, var)[0][0]


def find_statistics(
    x: Tensor, norm: BatchNormArgs, shape: Shape, partial: PartialStatistics | None = None
) -> Statistics:
    """Return mean and rstd, or their sources for `normalize_kernel`. `partial` results of x, if given, save a pass."""
    running = (norm.running_mean, norm.running_var)
    if not norm.training:
        return Statistics(*empty_statistics(x, shape), *running)
    # A convolution's partial results have other splits than the residual's, and `normalize_kernel` supports one kind.
    is_combined = partial is not None or shape.n_groups > 1
    partial = partial or partial_statistics(x, shape)
    if is_combined or len(partial.partials) - 1 > tiles.FEW_SPLITS:
        return Statistics(*combine_statistics(partial, norm, shape))
    return Statistics(*empty_statistics(x, shape), *running, partial.partials, partial.rows_per_split)


def empty_statistics(like: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    mean = like.new_empty(shape.n_groups, shape.n_channels, dtype=accumulation_type(like))
    return mean, torch.empty_like(mean)


def forward(
    inputs: Inputs, settings: Settings, reverse: bool = False, partial: PartialStatistics | None = None
) -> Outputs:
    """Compute relu(bn(x) + residual), and ReLU's bits if there is a residual.

    `reverse`: whether the second pass goes from the last tile to the first. `partial`: partial statistics of x, which
    save a pass.
    """
    shape = Shape.of(inputs.x, settings.ghost_batch_size)
    norm, residual_norm = inputs.norms(settings)
    statistics, residual_statistics = find_statistics(inputs.x, norm, shape, partial), NO_STATISTICS
    if settings.join == "bn" and inputs.residual is not None:
        residual_statistics = find_statistics(inputs.residual, residual_norm, shape)
    return normalize(inputs, settings, statistics, residual_statistics, shape, reverse)


def normalize(
    inputs: Inputs,
    settings: Settings,
    statistics: Statistics,
    residual_statistics: Statistics,
    shape: Shape,
    reverse: bool = False,
) -> Outputs:
    """Compute `forward`, given the statistics of x and, in the bn join, of the residual."""
    x, residual = inputs.x, inputs.residual
    merged = statistics.partials if statistics.partials is not None else residual_statistics.partials
    n_splits = 1 if merged is None else len(merged) - 1
    tiling = choose_tiles(shape, x, 1 if residual is None else 2)
    y, relu_mask = empty_outputs(inputs, settings, shape)
    kernel = batch_norm_forward.normalize_kernel
    merged_pointers = pointers(kernel, statistics) | pointers(kernel, residual_statistics, "residual_")
    launch_kernel(
        kernel,
        (tiling.n_programs,),
        **pointers(kernel, inputs) | merged_pointers,  # running statistics only if this launch updates or reads them
        y_ptr=y,
        relu_mask_ptr=relu_mask,
        **shape.sizes,
        rows_per_split=max(statistics.rows_per_split, residual_statistics.rows_per_split),
        n_splits=n_splits,
        momentum=inputs.momentum,
        eps=settings.eps,
        residual_momentum=inputs.residual_momentum,
        residual_eps=settings.residual_eps,
        RELU=settings.relu,
        REVERSED=reverse,
        TILE=tiling.tile,
        BLOCK_S=triton.next_power_of_2(n_splits),
        PDL=has_pdl(x.device),
    )
    return Outputs(y, relu_mask, statistics.mean, statistics.rstd, residual_statistics.mean, residual_statistics.rstd)


def empty_outputs(inputs: Inputs, settings: Settings, shape: Shape) -> tuple[Tensor, Tensor | None]:
    """Allocate y and, if they are needed, ReLU's bits."""
    has_mask = settings.relu and inputs.residual is not None
    relu_mask = torch.empty(shape.relu_mask, dtype=torch.uint8, device=inputs.x.device) if has_mask else None
    return torch.empty_like(inputs.x), relu_mask


def backward(dy: Tensor, dy_alias: Tensor | None, saved: Saved, settings: Settings, reverse: bool = False) -> Gradients:
    """Compute the gradients of relu(bn(x) + residual): one pass for the sums, one for dx and a bn join's dresidual."""
    shape = Shape.of(saved.x, settings.ghost_batch_size)
    dz, partials, group_splits = partial_sums(dy, dy_alias, saved, settings, shape)
    if shape.n_groups == 1 and group_splits <= tiles.FEW_SPLITS:
        vectors = empty_gradients(saved)
        return input_gradients(dy, dz, saved, settings, shape, vectors, partials=partials, reverse=reverse)
    sums, vectors = combine_gradients(partials, shape.n_groups, group_splits, saved)
    return input_gradients(dy, dz, saved, settings, shape, vectors, sums=sums, reverse=reverse)


def partial_sums(
    dy: Tensor, dy_alias: Tensor | None, saved: Saved, settings: Settings, shape: Shape
) -> tuple[Tensor | None, Tensor, int]:
    """Return dz if the second pass reads it, the sums of each split, [2 or 3, n_splits, C], and the splits per group.

    The sums are Σ dz, Σ dz·x̂ and, in the bn join, Σ dz times the residual's x̂.
    """
    # With a mask or a fork the second pass would read more than dz; else it reads dy and recomputes ReLU from x.
    writes_dz = saved.relu_mask is not None or dy_alias is not None
    is_bn_join = settings.join == "bn"
    tiling = choose_tiles(shape, saved.x, 2 + (dy_alias is not None) + is_bn_join, tiles.REDUCE_PROGRAMS)
    dz = torch.empty_like(saved.x) if writes_dz else None
    partials = saved.mean.new_empty(3 if is_bn_join else 2, tiling.n_parts, shape.n_channels)
    kernel = batch_norm_backward.reduce_kernel
    launch_kernel(
        kernel,
        (tiling.n_programs,),
        dy_ptr=dy,
        dy_alias_ptr=dy_alias,
        **pointers(kernel, saved),
        dz_ptr=dz,
        partials_ptr=partials,
        **shape.sizes,
        rows_per_split=tiling.rows_per_part,
        n_splits=tiling.n_parts,
        RELU=settings.relu,
        TILE=tiling.tile,
        PDL=has_pdl(dy.device),
    )
    return dz, partials, tiling.group_parts


NO_GRADIENTS = Gradients(*(None,) * 6)  # type: ignore[arg-type]


def empty_gradients(saved: Saved) -> Gradients:
    """Return uninitialized gradients of the vectors, [C]."""
    return Gradients(None, None, *(v if v is None else torch.empty_like(v) for v in saved[2:6]))  # type: ignore[arg-type]


def combine_gradients(partials: Tensor, n_groups: int, group_splits: int, saved: Saved) -> tuple[Tensor, Gradients]:
    """Add up the partial sums: return each group's, [2 or 3, n_groups, C], and the vectors' gradients, [C]."""
    gradients = empty_gradients(saved)
    n_sums, n_splits, n_channels = partials.shape
    sums = partials.new_empty(n_sums, n_groups, n_channels)
    kernel = batch_norm_backward.combine_gradients_kernel
    launch_kernel(
        kernel,
        (triton.cdiv(n_channels, tiles.COMBINE_BLOCK_C),),
        partials_ptr=partials,
        sums_ptr=sums,
        **pointers(kernel, gradients),
        n_splits=n_splits,
        n_groups=n_groups,
        group_splits=group_splits,
        N_SUMS=n_sums,
        N_CHANNELS=n_channels,
        **tiles.merge_blocks(group_splits),
        BLOCK_C=tiles.COMBINE_BLOCK_C,
        PDL=has_pdl(partials.device),
    )
    return sums, gradients


def input_gradients(
    dy: Tensor,
    dz: Tensor | None,
    saved: Saved,
    settings: Settings,
    shape: Shape,
    gradients: Gradients,
    sums: Tensor | None = None,
    partials: Tensor | None = None,
    reverse: bool = False,
) -> Gradients:
    """Add dx and dresidual to the gradients, from the `sums` of each group or from few `partials`.

    With `partials` the kernel also stores the vectors' gradients.
    """
    n_splits = 1 if partials is None else partials.shape[1]
    is_bn_join = settings.join == "bn"
    # In the bn join, choose the tiles as for five tensors; more would not fit in the registers.
    tiling = choose_tiles(shape, saved.x, 5 if is_bn_join else 2)
    dx, dresidual = torch.empty_like(saved.x), torch.empty_like(saved.x) if is_bn_join else None
    kernel = batch_norm_backward.input_gradients_kernel
    launch_kernel(
        kernel,
        (tiling.n_programs,),
        dz_ptr=dy if dz is None else dz,
        **pointers(kernel, saved),
        partials_ptr=partials,
        sums_ptr=sums,
        **pointers(kernel, (NO_GRADIENTS if partials is None else gradients)._replace(dx=dx, dresidual=dresidual)),
        **shape.sizes,
        n_splits=n_splits,
        n_groups=shape.n_groups,
        RELU=settings.relu and dz is None,
        TRAINING=settings.training,
        RESIDUAL_TRAINING=settings.residual_training,
        REVERSED=reverse,
        TILE=tiling.tile,
        BLOCK_S=triton.next_power_of_2(n_splits),
        PDL=has_pdl(dy.device),
    )
    return gradients._replace(dx=dx, dresidual=dz if settings.join == "add" else dresidual)
