"""The options of a step's compilation reach the compiler that they are for, and no other."""

import jax
import jax.numpy as jnp
import pytest

from mutransformer.config.load import load
from mutransformer.config.schema import ConfigError
from mutransformer.data.batches.batch import Batch
from mutransformer.model.flags import compiler_options, tuning
from mutransformer.sharding.mesh import make_mesh
from mutransformer.training.state import plan
from mutransformer.training.step import make_train_step

TINY = ["model.d_model=32", "model.d_head=16", "model.n_layer=1", "model.n_vocab=128", "data.seq_len=8", "data.batch_size=8"]


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v5p", "TPU v5 lite", "TPU v4", "TPU v6 lite"])
def test_a_tpus_options_are_of_its_kind(kind: str) -> None:
    options = compiler_options(load([]), kind)
    assert options["xla_tpu_enable_async_collective_fusion"] == "true"
    assert ("xla_tpu_enable_async_all_to_all" in options) == tuning(kind).exchange == (kind in ("TPU v5", "TPU v5p", "TPU v4"))
    assert compiler_options(load(["xla_tuned=false"]), kind) == {}


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H200", "TPU v99"])
def test_an_unknown_device_has_none(kind: str) -> None:
    assert compiler_options(load([]), kind) == {}


def test_ones_own_come_over_them() -> None:
    config = load(["xla.xla_tpu_scoped_vmem_limit_kib=32768", "xla.xla_tpu_overlap_compute_collective_tc=false", "xla.new=7"])
    options = compiler_options(config, "TPU v5")
    assert options["xla_tpu_scoped_vmem_limit_kib"] == "32768" and options["new"] == "7"
    assert options["xla_tpu_overlap_compute_collective_tc"] == "False"
    assert options["xla_enable_async_all_gather"] == "true"


def test_they_reach_the_compiler() -> None:
    """A CPU's compiler takes an option of its own, and refuses one that it does not know."""

    def compiled(*options: str) -> object:
        config = load([*TINY, *options])
        mesh = make_mesh(config.mesh)
        batch = Batch(jax.ShapeDtypeStruct((8, 8), jnp.int32), jax.ShapeDtypeStruct((8, 8), jnp.bool_))
        return make_train_step(config, mesh, bos_id=0).lower(plan(config, mesh).shapes, batch).compile()

    compiled("xla.xla_cpu_enable_fast_math=false")
    with pytest.raises(ConfigError, match="^xla: .*xla_of_nothing"):
        compiled("xla.xla_of_nothing=true")
