"""A process reads the rows that its devices hold, however the mesh lies on the processes; a mesh can be laid on any TPU slice."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from short_runs import ROOT
from tokens import mixture

from mutransformer.config.data import DataConfig
from mutransformer.config.run import MeshConfig
from mutransformer.data.batches.pipeline import Batch, eval_batches, train_batches
from mutransformer.errors import ConfigError
from mutransformer.sharding.mesh import data_share, lay_mesh, make_mesh, put_batch

T, N_VOCAB = 4, 10_000
TEXT = mixture([list(range(8000))])
Share = tuple[int, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"
    core_on_chip: int = 0


def tpus(x: int, y: int, slice_index: int = 0) -> list[Any]:
    """TPUs v6e, four chips to a host."""
    at = [(i, j, 0) for j in range(y) for i in range(x)]
    host = lambda i, j, _: j // 2 * (x // 2) + i // 2  # noqa: E731
    return [Device(k, host(*c), c, slice_index, "tpu", "TPU v6 lite") for k, c in enumerate(at)]


def held(grid: np.ndarray, process: int) -> list[int]:
    """The rows of a grid of processes that have devices of one."""
    return [r for r, row in enumerate(grid) if process in row]


def contiguous(grid: np.ndarray) -> dict[int, Share]:
    """What was assumed once: a process with k rows of the mesh reads the block of k that begins with its first."""
    rows = {p: held(grid, p) for p in np.unique(grid).tolist()}
    return {p: (len(grid), tuple(range(mine[0], min(len(grid), mine[0] + len(mine))))) for p, mine in rows.items()}


def follows_the_law(grid: np.ndarray, shares: dict[int, Share]) -> bool:
    """Whether every device gets the rows of its place in the mesh, in training and in evaluation, and nothing else is read.

    Args:
        grid: [x, y], the process of each device.
        shares: what each process reads.
    """
    x = len(grid)
    config = DataConfig(seq_len=T, batch_size=2 * x, prefetch=0)

    def drawn(n: int, blocks: tuple[int, ...]) -> list[np.ndarray]:
        train = train_batches(TEXT, config, 0, n, blocks, N_VOCAB)
        train.set_state({"next_index": 3})  # saved by a run with any other mesh
        return [next(train).tokens, next(train).tokens, *(b.tokens for b in eval_batches(TEXT, config, 2, n, blocks, N_VOCAB))]

    whole = [tokens.reshape(x, 2, T) for tokens in drawn(1, (0,))]
    assert len(np.unique(np.stack(whole)[..., 0])) >= 6 * x, "rows are not told apart: nothing is shown"
    for process, share in shares.items():
        rows = held(grid, process)
        for batch, want in zip(drawn(*share), whole, strict=True):
            if batch.shape[0] != 2 * len(rows) or not np.array_equal(batch.reshape(-1, 2, T), want[rows]):
                return False
    return shares.keys() == set(grid.flat)


GRIDS = {
    "in line": np.arange(8).reshape(8, 1) // 2,
    "spread": np.arange(8).reshape(8, 1) % 4,
    "ring": np.array([0, 0, 1, 1, 1, 1, 0, 3, 2, 2, 2, 2, 3, 3, 3, 0])[:, None],
    "of several sizes": np.array([0, 1, 1, 0, 0, 2, 1, 1])[:, None],
    "rows of two": np.array([[0, 1], [0, 1], [2, 3], [2, 3]]),
    "rows of two, apart": np.array([[0, 1], [2, 3], [0, 1], [2, 3]]),
    "overlapping": np.array([[0, 1], [1, 2], [2, 0]]),
    "one row": np.arange(8).reshape(1, 8) // 2,
}


def mesh_of(grid: np.ndarray) -> Mesh:
    devices: list[Any] = [Device(i, int(p)) for i, p in enumerate(grid.flat)]
    return make_mesh(MeshConfig(*grid.shape), devices)


@pytest.mark.parametrize("name", GRIDS)
def test_each_process_reads_what_its_devices_hold(name: str) -> None:
    grid = GRIDS[name]
    shares = {p: data_share(mesh_of(grid), p) for p in np.unique(grid).tolist()}
    assert shares == {p: (len(grid), tuple(held(grid, p))) for p in shares}
    assert follows_the_law(grid, shares)


@pytest.mark.parametrize("name", GRIDS)
def test_the_law_can_fail(name: str) -> None:
    """The control: rows read as one block are the right ones only where the mesh lies so."""
    assert follows_the_law(GRIDS[name], contiguous(GRIDS[name])) == (name in {"in line", "rows of two", "one row"})


def test_rows_are_split_over_x_and_z_whatever_axes_there_are() -> None:
    devices: list[Any] = [Device(i, i // 2) for i in range(8)]
    assert data_share(lay_mesh(devices, z=2, x=2, y=2), 1) == (4, (1,))
    assert data_share(lay_mesh(devices, z=2, x=2, y=2), 3) == (4, (3,))
    assert data_share(lay_mesh(devices, run=8, x=1, y=1), 3) == (1, (0,))


@pytest.mark.parametrize(("x", "y"), [(8, 1), (4, 2), (1, 8)])
def test_blocks_are_put_on_their_rows_of_the_mesh(x: int, y: int) -> None:
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    mesh = make_mesh(MeshConfig(x, y), [jax.devices()[i] for i in order])
    assert [d.id for d in mesh.devices.flat] == order, "a CPU's devices keep their order"
    tokens = np.arange(16 * T, dtype=np.int32).reshape(16, T)
    batch = put_batch(Batch(tokens, tokens > 5), mesh)
    assert batch.segments is None and batch.tokens.dtype == np.int32 and batch.mask.dtype == np.bool_
    row = {device: r for r, devices in enumerate(mesh.devices) for device in devices}
    for given, placed in zip((tokens, tokens > 5), batch[:2], strict=True):
        np.testing.assert_array_equal(placed, given)
        for shard in placed.addressable_shards:
            np.testing.assert_array_equal(shard.data, given.reshape(x, -1, T)[row[shard.device]])


@pytest.mark.parametrize("y", [1, 2, 4, 8, 16])
def test_a_torus_is_split_where_it_must(y: int) -> None:
    mesh = make_mesh(MeshConfig(-1, y), tpus(4, 4))
    assert dict(mesh.shape) == {"x": 16 // y, "y": y}
    assert {d.id for d in mesh.devices.flat} == set(range(16))
    for row in mesh.devices:  # each a box of neighbours, whose sides multiply to y
        low, high = (np.array(f([d.coords for d in row], axis=0)) for f in (np.min, np.max))
        assert np.prod(high - low + 1) == y


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (
            tpus(4, 4) + tpus(4, 4, slice_index=1),
            "^mesh of x = 16, y = 2: the devices belong to 2 TPU slices; set mesh.replicas=2$",
        ),
        (tpus(4, 4)[:5] + tpus(4, 4)[6:7], "^mesh of x = 3, y = 2: JAX cannot lay it on these devices: [^\n]+$"),
    ],
)
def test_what_cannot_be_laid_is_refused_in_one_line(devices: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_mesh(MeshConfig(-1, 2), devices)


def test_gpus_of_several_hosts_are_one_mesh() -> None:
    """Each host is a slice to JAX, and jax.make_mesh refuses them."""
    devices: list[Any] = [Device(i, i // 4, slice_index=i // 4, platform="gpu", device_kind="GPU") for i in range(8)]
    mesh = make_mesh(MeshConfig(-1, 2), devices)
    assert [d.id for d in mesh.devices.flat] == list(range(8))
    assert data_share(mesh, 1) == (4, (2, 3))


TOPOLOGIES = ["v5e:4x4", "v6e:4x4", "v5p:2x2x2", "v5p:4x4x4"]
PROGRAM = """
import json, sys
from jax.experimental import topologies
from mutransformer.config.run import MeshConfig
from mutransformer.sharding.mesh import data_share, make_mesh
found = {}
for name in sys.argv[2:]:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    for y in (1, 2, 4, 8):
        mesh = make_mesh(MeshConfig(-1, y), devices)
        assert {d.id for d in mesh.devices.flat} == {d.id for d in devices} and mesh.devices.shape == (len(devices) // y, y)
        grid = [[d.process_index for d in row] for row in mesh.devices]
        found[f"{name} y={y}"] = grid, {p: data_share(mesh, p) for p in range(max(map(max, grid)) + 1)}
open(sys.argv[1], "w").write(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_tpu_slices(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As libtpu describes them on a machine without TPU. In a process of its own, which libtpu may log and trap signals in."""
    out = tmp_path_factory.mktemp("tpu") / "meshes.json"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    command = [sys.executable, "-c", PROGRAM, str(out), *TOPOLOGIES]
    subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, timeout=240)
    found = json.loads(out.read_text())
    assert len(found) == 4 * len(TOPOLOGIES)
    lie_in_line = set()
    for name, (rows, told) in found.items():
        grid = np.array(rows)
        shares = {int(p): (n, tuple(blocks)) for p, (n, blocks) in told.items()}
        assert follows_the_law(grid, shares), name
        if follows_the_law(grid, contiguous(grid)):
            lie_in_line.add(name)
    assert found["v5p:4x4x4 y=1"][1]["0"] == [64, [0, 4, 16, 20]]
    assert not lie_in_line & {f"{name} y=1" for name in TOPOLOGIES} and "v5e:4x4 y=2" in lie_in_line
