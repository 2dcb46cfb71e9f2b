"""Devices as a grid with axes x and y, or z of them; and how trees and batches are laid on it."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mutransformer.config.kernels import device_kernel
from mutransformer.config.schema import Config, ConfigError, MeshConfig, check

Tree = TypeVar("Tree")
AnyMesh = Mesh | AbstractMesh  # an abstract one has axes and no devices


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over the given devices, by default all.

    Raises:
        ConfigError: mesh.x times mesh.y times mesh.replicas is not the number of devices, or as of lay().
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    z, x, y = config.replicas, config.x, config.y
    by_slices = f", mesh.replicas = {z}" if z > 1 else ""
    if x == -1:
        check(n % (y * z) == 0, f"mesh.y = {y}{by_slices}: does not divide the {n} devices")
        x = n // (y * z)
    check(x * y * z == n, f"mesh.x = {x}, mesh.y = {y}{by_slices}: need {x * y * z} devices, here are {n}")
    return lay(devices, z=z, x=x, y=y) if z > 1 else lay(devices, x=x, y=y)


def lay(devices: Sequence[Any], **axes: int) -> Mesh:
    """The mesh with these axes: along the torus of a TPU slice, the last axis closest together; elsewhere in the devices' order.
    An axis z goes over TPU slices.

    Unlike jax.make_mesh it splits axes of any torus where it must, and takes GPUs of several hosts.

    Raises:
        ConfigError: the devices are of another number of TPU slices, or JAX cannot lay such a mesh on them.
    """
    what = "mesh of " + ", ".join(f"{axis} = {size}" for axis, size in axes.items())
    slices = {getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}
    n = len(slices)
    check(n in (0, 1, axes.get("z", 1)), f"{what}: the devices are of {n} TPU slices; set mesh.replicas={n}")
    sizes = tuple(axes.values())
    try:
        if n > 1:
            within, between = (1, *sizes[1:]), (n, *(1 for _ in sizes[1:]))
            grid = create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
        else:
            grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{what}: JAX cannot lay it on these devices: {told}") from error
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def traced_for() -> Any:
    """A device of the kind that the program being traced is for: its platform and device_kind."""
    # Inside shard_map the mesh tells, which in a compilation ahead of time is not of this machine.
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def check_fits(config: Config, mesh: AnyMesh) -> None:
    """Refuses a model or batch that the mesh cannot divide, and an attention kernel that its devices lack.

    Raises:
        ConfigError: naming the key, and what would fit.
    """
    m, d = config.model, config.data
    x, y, z = mesh.shape["x"], mesh.shape["y"], mesh.shape.get("z", 1)
    rows = f"data.batch_size = {d.batch_size} / optim.grad_accumulation_steps = {config.optim.grad_accumulation_steps}"
    needs = [
        (
            f"{rows}: rows at a time",
            d.batch_size // config.optim.grad_accumulation_steps,
            "x" if z == 1 else "x times mesh.replicas",
            x * z,
        ),
        ("model.d_model", m.d_model, "x", x),
        ("model.d_model", m.d_model, "y", y),
        ("model.d_model / model.d_head: heads", m.n_head, "y", y),
        ("feed-forward width model.ff_multiple x model.d_model", m.d_ff, "y", y),
        ("vocabulary padded to model.vocab_multiple", m.padded_vocab, "x", x),
        ("vocabulary padded to model.vocab_multiple", m.padded_vocab, "y", y),
    ]
    if m.kv_heads % y:
        needs.append(("model.d_head (which mesh.y divides if it does not divide model.n_kv_head)", m.d_head, "y", y))
    for what, size, axis, parts in needs:
        check(size % parts == 0, f"{what} = {size}: not divisible by mesh.{axis} = {parts}")
    at_a_time, streams = d.batch_size // config.optim.grad_accumulation_steps // (x * z), config.mesh.overlap_groups
    check(
        streams is None or at_a_time % streams == 0,
        f"mesh.overlap_groups = {streams}: must divide the {at_a_time} rows that a device has at a time",
    )
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    has = device_kernel(device.platform, device.device_kind)
    check(
        m.attention_kernel in ("auto", "xla", has) or (m.attention_kernel == "splash" and device.platform == "cpu"),
        f"model.attention_kernel = {m.attention_kernel}: not on {device.device_kind}; use auto or {has}",
    )  # splash attention on a CPU is interpreted, for tests


def shardings(specs: Tree, mesh: AnyMesh) -> Tree:
    """The resting place of every weight in a tree of specs."""
    return jax.tree.map(lambda w: NamedSharding(mesh, w.pspec), specs)


def rows(mesh: AnyMesh) -> PartitionSpec:
    """How a batch is spread: over x, and over z where there is one."""
    return PartitionSpec(("z", "x") if "z" in mesh.axis_names else "x")


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def data_share(mesh: Mesh, process: int | None = None) -> tuple[int, tuple[int, ...]]:
    """Which rows of a batch a process reads, by default this one: those that its devices hold.

    Returns:
        (n, blocks): of the batch in n equal blocks, one for each row of the mesh, the process reads these, in ascending order.
        They need not be neighbours, and several processes read the same if their devices are in the same row.
    """
    process = jax.process_index() if process is None else process
    n = mesh.shape["x"] * mesh.shape.get("z", 1)
    places = NamedSharding(mesh, rows(mesh)).devices_indices_map((n,))
    return n, tuple(sorted({block.start or 0 for device, (block,) in places.items() if device.process_index == process}))


def put(batch: Tree, mesh: Mesh) -> Tree:
    """Host arrays [rows of this process's blocks, ...] -> global arrays [B, ...], each block on the devices of its mesh row."""
    sharding = NamedSharding(mesh, rows(mesh))
    n, blocks = data_share(mesh)

    def place(mine: np.ndarray) -> Array:
        size = mine.shape[0] // len(blocks)

        def block(index: Any) -> np.ndarray:
            first = blocks.index((index[0].start or 0) // size) * size
            return mine[first : first + size]

        return jax.make_array_from_callback((n * size, *mine.shape[1:]), sharding, block)

    return jax.tree.map(place, batch)
