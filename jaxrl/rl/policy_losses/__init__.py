"""Policy losses by name: each a function of ``Tokens`` whose keyword arguments are its settings."""

from collections.abc import Callable, Mapping

from jaxrl.rl.policy_losses.clipped import gmpo, gspo, gspo_token, luspo, ppo_clip
from jaxrl.rl.policy_losses.covariance import clip_cov, kl_cov
from jaxrl.rl.policy_losses.regression import a_star_po, flowrl, gvpo, sppo
from jaxrl.rl.policy_losses.reinforce import cispo, cispo_absolute, dro, reinforce, reinforce_capped, topr, vespo
from jaxrl.rl.policy_losses.smooth import sapo
from jaxrl.rl.policy_losses.trust_region import dppo_kl, dppo_tv, prime_rl, prime_rl_symmetric
from jaxrl.rl.tokens import Span, TokenLoss

POLICY_LOSSES: Mapping[str, Callable[..., TokenLoss]] = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "luspo": luspo,
    "gmpo": gmpo,
    "reinforce": reinforce,
    "cispo": cispo,
    "cispo_absolute": cispo_absolute,
    "reinforce_capped": reinforce_capped,
    "topr": topr,
    "dro": dro,
    "vespo": vespo,
    "sapo": sapo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "prime_rl": prime_rl,
    "prime_rl_symmetric": prime_rl_symmetric,
    "sppo": sppo,
    "gvpo": gvpo,
    "flowrl": flowrl,
    "a_star_po": a_star_po,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
}

AGAINST_BEHAVIOUR = frozenset({"dppo_tv", "dppo_kl", "prime_rl", "prime_rl_symmetric"})
"""Losses whose ratio is that to the behaviour policy, whatever the proximal one is."""

WITHOUT_RATIO = frozenset({"reinforce"})
"""Losses that compare the policy with none."""

SPANS: Mapping[str, Span] = {
    **dict.fromkeys(("gspo", "gspo_token", "luspo", "gmpo"), "geometric"),
    **dict.fromkeys(("vespo", "sppo", "gvpo", "flowrl", "a_star_po"), "product"),
}
"""Over what a loss takes its ratio, if not over the token and not by its setting ``span``."""
