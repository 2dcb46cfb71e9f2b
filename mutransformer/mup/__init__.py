"""The parametrization: how a weight is initialized and trained, given its role and the size of the model.

Imports nothing of the rest of the package. For this project's model, what it needs of a weight is in `Parameter`, of the model in
`Scaling`. For any other model `infer` finds the roles, and `init` and `optimizer` do what follows from them.
"""

from mutransformer.mup.apply import init, optimizer
from mutransformer.mup.infer import Factors, Leaf, RoleError, Roles, infer
from mutransformer.mup.initial_values import init_weights
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
