"""Devices as a mesh with axes x and y, and z where there are several replicas of that grid; and where arrays are placed on it."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mutransformer.config.run import MeshConfig
from mutransformer.errors import check, translate_errors

Tree = TypeVar("Tree")
AnyMesh = Mesh | AbstractMesh  # an abstract mesh has axes and no devices


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over the given devices (default: all).

    Raises ConfigError as lay_mesh does, or if mesh.x times mesh.y times mesh.replicas is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    z, x, y = config.replicas, config.x, config.y
    by_replicas = f", mesh.replicas = {z}" if z > 1 else ""
    if x == -1:
        check(n % (y * z) == 0, f"mesh.y = {y}{by_replicas}: does not divide the {n} devices")
        x = n // (y * z)
    check(x * y * z == n, f"mesh.x = {x}, mesh.y = {y}{by_replicas}: need {x * y * z} devices, here are {n}")
    return lay_mesh(devices, z=z, x=x, y=y) if z > 1 else lay_mesh(devices, x=x, y=y)


def lay_mesh(devices: Sequence[Any], **axes: int) -> Mesh:
    """A mesh with these axes: along the torus of a TPU slice, with the last axis closest together; elsewhere in the devices'
    order. An axis z goes over TPU slices.

    Unlike jax.make_mesh it splits axes of any torus where it must, and accepts GPUs of several hosts. Raises ConfigError if the
    devices belong to another number of TPU slices, or JAX cannot lay such a mesh on them.
    """
    description = "mesh of " + ", ".join(f"{axis} = {size}" for axis, size in axes.items())
    slices = {getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}
    n = len(slices)
    check(n in (0, 1, axes.get("z", 1)), f"{description}: the devices belong to {n} TPU slices; set mesh.replicas={n}")
    sizes = tuple(axes.values())
    kinds = AssertionError, NotImplementedError, TypeError, ValueError
    with translate_errors(f"{description}: JAX cannot lay it on these devices", kinds):
        if n > 1:
            within, between = (1, *sizes[1:]), (n, *(1 for _ in sizes[1:]))
            grid = create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
        else:
            grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def first_device(mesh: AnyMesh) -> Any:
    """A device of the mesh, or its abstract device: gives platform and device_kind."""
    return mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device


def n_row_groups(mesh: AnyMesh) -> int:
    """Into how many groups the rows of a batch are split: the size of x, times that of z."""
    return mesh.shape["x"] * mesh.shape.get("z", 1)


def batch_pspec(mesh: AnyMesh) -> PartitionSpec:
    """How the rows of a batch are sharded: over x, and over z where there is one."""
    return PartitionSpec(("z", "x") if "z" in mesh.axis_names else "x")


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def data_share(mesh: Mesh, process: int | None = None) -> tuple[int, tuple[int, ...]]:
    """Which rows of a batch a process reads (default: this process): those that its devices hold.

    Returns (n, blocks): of a batch in n equal blocks, one for each row of the mesh, the process reads these, in ascending order.
    They need not be neighbors, and several processes read the same block if their devices are in the same row of the mesh.
    """
    process = jax.process_index() if process is None else process
    n = n_row_groups(mesh)
    indices = NamedSharding(mesh, batch_pspec(mesh)).devices_indices_map((n,))
    return n, tuple(sorted({block.start or 0 for device, (block,) in indices.items() if device.process_index == process}))


def put_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Host arrays [rows of this process's blocks, ...] -> global arrays [B, ...], each block on the devices of its mesh row."""
    sharding = NamedSharding(mesh, batch_pspec(mesh))
    n, blocks = data_share(mesh)

    def place(local: np.ndarray) -> Array:
        size = local.shape[0] // len(blocks)

        def block(index: Any) -> np.ndarray:
            first = blocks.index((index[0].start or 0) // size) * size
            return local[first : first + size]

        return jax.make_array_from_callback((n * size, *local.shape[1:]), sharding, block)

    return jax.tree.map(place, batch)
