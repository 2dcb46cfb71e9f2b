"""How the reference system's options and weights are called here: data, complete for every option it has."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from programs import specs

from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.model.transformer import Transformer

# Reference option -> our key. Values carry over unless a table below translates them.
KEYS = {
    "dtype": "precision.compute",
    "sequence_len": "data.seq_len",
    "d_model": "model.d_model",
    "d_base": "model.d_base",
    "d_head": "model.d_head",
    "n_layer": "model.n_layer",
    "ff_multiple": "model.ff_multiple",
    "qk_scale": "model.qk_scale",
    "qk_norm": "model.qk_norm",
    "e_norm": "model.embed_norm",
    "q_init": "model.q_init",
    "r_init": "model.residual_init",
    "u_init": "model.unembed_init",
    "kv_mqa": "model.n_kv_head",
    "rotary_base": "model.rotary_base",
    "attn_act_name": "model.attention_activation",
    "ff_act_name": "model.activation",
    "norm_eps": "model.norm_eps",
    "proj_biases": "model.biases",
    "n_vocab": "model.n_vocab",
    "n_warmup_step": "optim.warmup_steps",
    "n_pretrain_step": "steps",
    "lr_base": "optim.lr",
    "grad_clip": "optim.clip_norm",
    "grad_acc_steps": "optim.grad_accumulation_steps",
    "optim_name": "optim.name",
    "optim_rule": "optim.rule",
    "optim_beta1": "optim.beta1",
    "optim_beta2": "optim.beta2",
    "optim_eps": "optim.eps",
    "use_eps_scaling": "optim.eps_scaling",
    "wd": "optim.weight_decay",
    "use_iwd": "optim.decay",
    "lr_schedule_name": "optim.schedule",
}
VALUES = {
    "q_init": {"vs": "fan_in"},
    "r_init": {"vs": "fan_in"},
    "kv_mqa": {True: 1, False: None},
    "use_iwd": {True: "independent", False: "coupled"},
}
# Those without a key of ours: always so here, of the data, or read together by `settings`.
OTHERS = {"param_dtype", "tokens_per_global_batch", "norm_gains", "norm_gains_type"}
OF_THE_CASE = {"bos_token_id", "eos_token_id", "pad_token_id", "n_update"}
# What the reference always does, and where our default differs.
ALWAYS = {"optim.decay_vectors": True, "optim.loss_per": "position", "model.vocab_multiple": 1, "optim.lr_factors.output": 1}

# Last part of a reference path -> our weights. A SwiGLU projection holds gate and input side by side.
WEIGHTS = {
    "w_e": "embed",
    "w_u": "unembed",
    "b_u": "b_unembed",
    "g_e": "embed_norm",
    "g_u": "final_norm",
    "w_aq": "blocks.w_q",
    "w_ak": "blocks.w_k",
    "w_av": "blocks.w_v",
    "w_ao": "blocks.w_o",
    "w_fi": "blocks.w_up",
    "w_fo": "blocks.w_down",
    "g_a": "blocks.attn_norm",
    "g_f": "blocks.mlp_norm",
    "g_aq": "blocks.q_norm",
    "g_ak": "blocks.k_norm",
    "b_aq": "blocks.b_q",
    "b_ak": "blocks.b_k",
    "b_av": "blocks.b_v",
    "b_ao": "blocks.b_o",
    "b_fi": "blocks.b_up",
    "b_fo": "blocks.b_down",
}
GATES = {"w_fi": "blocks.w_gate", "b_fi": "blocks.b_gate"}


class Case(NamedTuple):
    """Attributes:
    config: ours, for the same work.
    options: the reference's.
    init, grad0, final: trees of our weights with the reference's numbers.
    tokens: int32 [n_update, B, T].
    logits0: [B, T, V]; loss_avg, objective: [n_update].
    """

    config: Config
    options: dict[str, Any]
    init: Transformer
    grad0: Transformer
    final: Transformer
    tokens: np.ndarray
    logits0: np.ndarray
    loss_avg: np.ndarray
    objective: np.ndarray


def settings(options: dict[str, Any]) -> list[str]:
    """The reference's options as overrides of ours."""
    ours = dict(ALWAYS)
    for name, value in options.items():
        if name in KEYS:
            ours[KEYS[name]] = VALUES.get(name, {}).get(value, value)
        elif name not in OTHERS | OF_THE_CASE:
            raise ValueError(f"the reference option {name} = {value!r} has no counterpart here")
    ours["model.norm_scale"] = options["norm_gains_type"] if options["norm_gains"] else "none"
    rows = options["tokens_per_global_batch"] // options["sequence_len"]
    ours["data.batch_size"] = rows * options["grad_acc_steps"]  # its accumulation takes several batches, ours parts of one
    return [f"{key}={'null' if value is None else str(value)}" for key, value in ours.items()]


def read(path: Path) -> Case:
    """Reads a reference case."""
    with np.load(path) as z:
        options = json.loads(str(z["config"]))
        config = load(settings(options))
        init, grad0, final = (_tree(z, kind, config) for kind in ("init", "grad0", "final"))
        return Case(config, options, init, grad0, final, z["tokens"], z["logits0"], z["loss_avg"], z["objective"])


def _tree(z: Any, kind: str, config: Config) -> Transformer:
    theirs = {key.rsplit("/", 1)[1]: z[key] for key in z.files if key.startswith(f"{kind}/")}
    ours: dict[str, np.ndarray] = {}
    for name, array in theirs.items():
        gated = name in GATES and config.model.activation == "swiglu"
        parts = np.split(array, 2, axis=-1) if gated else [array]
        names = [GATES[name], WEIGHTS[name]] if gated else [WEIGHTS[name]]
        ours |= dict(zip(names, parts, strict=True))
    weights = specs(config)

    def pick(path: tuple, w: Any) -> np.ndarray:
        return ours.pop(jax.tree_util.keystr(path, simple=True, separator=".")).reshape(w.shape)

    tree = jax.tree_util.tree_map_with_path(pick, weights)
    assert not ours, f"weights of the reference that we do not have: {sorted(ours)}"
    return tree
