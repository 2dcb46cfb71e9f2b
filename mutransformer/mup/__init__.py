"""The parametrization: how a weight is initialized and trained, given its role and the size of the model.

Imports nothing of the rest of the package. For this project's model, what it needs of a weight is in `Parameter`, of the model in
`Scaling`. For any other model `infer` finds the roles, and `init` and `optimizer` do what follows from them.

What needs JAX is imported when it is first used, so that reports and plans do not start it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mutransformer.mup.rules import (
    RULES,
    Init,
    LrFactors,
    Parameter,
    Role,
    Scaling,
    betas,
    decay_multiplier,
    eps_multiplier,
    forward_multiplier,
    init_std,
    lr_multiplier,
    uses_muon,
)

if TYPE_CHECKING:
    from mutransformer.mup.apply import init, optimizer
    from mutransformer.mup.checks.coordinates import CoordinateReport, coord_check
    from mutransformer.mup.checks.rate_report import TransferReport, transfer_report
    from mutransformer.mup.checks.rate_sweep import sweep
    from mutransformer.mup.initial_values import init_weights
    from mutransformer.mup.roles import Factors, Leaf, LeafRole, RoleError, Roles, infer

_LAZY = {
    **dict.fromkeys(("init", "optimizer"), "apply"),
    **dict.fromkeys(("Factors", "Leaf", "LeafRole", "RoleError", "Roles", "infer"), "roles"),
    "init_weights": "initial_values",
    **dict.fromkeys(("CoordinateReport", "coord_check"), "checks.coordinates"),
    **dict.fromkeys(("TransferReport", "transfer_report"), "checks.rate_report"),
    "sweep": "checks.rate_sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
