"""Devices as a grid with axes x and y, and how trees and batches are laid on it."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mutransformer.config import Config, ConfigError, MeshConfig, check

Tree = TypeVar("Tree")
AnyMesh = Mesh | AbstractMesh  # an abstract one has axes and no devices


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over the given devices, by default all.

    Raises:
        ConfigError: mesh.x times mesh.y is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    if config.x == -1:
        check(n % config.y == 0, f"mesh.y = {config.y}: does not divide the {n} devices")
        x = n // config.y
    else:
        x = config.x
    check(x * config.y == n, f"mesh.x = {x}, mesh.y = {config.y}: need {x * config.y} devices, here are {n}")
    # An axis of the mesh may take a part of an axis of a TPU's torus, as 8 x 8 on 4 x 4 x 4 must; jax.make_mesh would refuse it.
    grid = mesh_utils.create_device_mesh((x, config.y), list(devices), allow_split_physical_axes=True)
    return Mesh(grid, ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def check_fits(config: Config, mesh: AnyMesh) -> None:
    """Refuses a model or batch that the mesh cannot divide.

    Raises:
        ConfigError: naming the key, and what would fit.
    """
    m, d = config.model, config.data
    x, y = mesh.shape["x"], mesh.shape["y"]
    rows = f"data.batch_size = {d.batch_size} / optim.accumulate = {config.optim.accumulate}"
    needs = [
        (f"{rows}: rows at a time", d.batch_size // config.optim.accumulate, "x", x),
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


def shardings(specs: Tree, mesh: AnyMesh) -> Tree:
    """The resting place of every weight in a tree of specs."""
    return jax.tree.map(lambda w: NamedSharding(mesh, w.pspec), specs)


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Which rows of a batch this process reads: (n, i) means the i-th of n equal parts.

    Processes whose devices differ only in y read the same rows.
    """
    rows = mesh.devices.shape[0]
    mine = sorted({i for i in range(rows) for d in mesh.devices[i] if d.process_index == jax.process_index()})
    n = len(mine)
    if mine != list(range(mine[0], mine[0] + n)) or mine[0] % n or rows % n:
        raise ConfigError(f"mesh.x = {rows}: this process's devices are rows {mine} of the mesh, not one aligned block")
    return rows // n, mine[0] // n


def put(batch: Tree, mesh: Mesh) -> Tree:
    """Host arrays [this process's rows, ...] -> global arrays [B, ...], rows over x."""
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    parts, _ = data_share(mesh)

    def place(rows: np.ndarray) -> Array:
        return jax.make_array_from_process_local_data(sharding, rows, (parts * rows.shape[0], *rows.shape[1:]))

    return jax.tree.map(place, batch)
