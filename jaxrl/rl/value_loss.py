"""What a critic learns from."""

import jax
import jax.numpy as jnp
import optax


def clipped_value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, clip: float, huber: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """max(h(V - R), h(V' - R)) of every sampled token, V' = V kept within ``clip`` of its old value and h(e) = ½ e².

    A token whose value moved further than that towards its return has no gradient (OpenAI baselines' PPO; verl).

    Args:
        values: [B, T] of the critic being trained; gradients flow through these.
        old_values: [B, T] of the critic when the step began.
        returns: [B, T].
        mask: [B, T], non-zero where the policy sampled the token; elsewhere nothing matters, NaN included.
        clip: in units of reward.
        huber: above 0, h grows linearly beyond errors of this size, with this slope (Huber 1964; AReaL's "huber", whose
            size is 10), so that a few returns far off do not carry the gradient.

    Returns:
        The loss before aggregation and where the clipped term was the larger, [B, T] both, 0 where the mask is.
    """
    here = mask > 0
    values = jnp.where(here, values, 0.0)
    old_values, returns = (jax.lax.stop_gradient(jnp.where(here, x, 0.0)) for x in (old_values, returns))
    near = jnp.clip(values, old_values - clip, old_values + clip)
    plain, clipped = (_penalty(estimate - returns, huber) for estimate in (values, near))
    return jnp.maximum(plain, clipped), (clipped > plain).astype(values.dtype)


def _penalty(errors: jax.Array, huber: float) -> jax.Array:
    return optax.losses.huber_loss(errors, delta=huber) if huber else 0.5 * errors**2
