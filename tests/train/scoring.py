"""Run by test_processes.py as one of several processes: what reads tokens that other processes played.

``scoring.py PORT COUNT PROCESS FILE`` writes the values of a critic and its parameters after it learned, what a step's
tokens are scored with, and the experts that were replayed.
"""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np

from jaxrl.config import CriticConfig, EngineConfig, ModelConfig
from jaxrl.mesh import make_mesh
from jaxrl.model import moe
from jaxrl.model.transformer import param_specs
from jaxrl.processes import join
from jaxrl.processes.exchange import is_first
from jaxrl.records import Batch, Group, Trajectory, Turn
from jaxrl.rl import selection
from jaxrl.rl.outcomes import Outcomes
from jaxrl.rl.targets import TARGETS
from jaxrl.train import placement, shares
from jaxrl.train.critic import new_critic
from jaxrl.train.pack import earned, pack
from jaxrl.train.progress import RunProgress
from jaxrl.train.session import Session, what_is_recorded
from jaxrl.train.state import initial_params, new_state
from jaxrl.train.steering import Steering
from jaxrl.train.update import Updater, policy_gradient_loss
from tests.train import updating

OWN_ADVANTAGE = f"{__file__}:reads_all"
MODEL = ModelConfig(
    family="qwen3_moe",
    vocab_size=48,
    layers=1,
    width=16,
    query_heads=4,
    kv_heads=2,
    head_width=8,
    ffn_width=32,
    experts=8,
    experts_per_token=2,
    expert_width=16,
)
CONFIG = dataclasses.replace(
    updating.CONFIG,
    model=MODEL,
    engine=EngineConfig(max_response_tokens=24, record_experts=True),
    critic=CriticConfig(enabled=True, learning_rate=1e-2),
    algorithm=dataclasses.replace(
        updating.CONFIG.algorithm,
        square_sums=True,
        reference_ratios=True,
        advantage=OWN_ADVANTAGE,
        kl_coefficient=0.1,
        kl_placement="reward",
        kl_estimator="k1",
        proximal="recomputed",
    ),
)


def reads_all(outcomes: Outcomes) -> list[np.ndarray]:
    """An advantage of everything that trajectories hold."""
    fields = map(outcomes.need, ("logprobs", "nodes", "states"))
    rows = zip(outcomes.rewards_by_token(), *fields, strict=True)
    return [rewards + np.exp(logprobs) + sum(path) + len(set(names)) for rewards, logprobs, path, names in rows]


def targets_of(loss: str, session: Session, kept: tuple[selection.Selection, ...], *params: Any) -> list[np.ndarray]:
    """What the loss of a whole group fits, of the tokens of an update."""
    against_sampler = {"proximal": "behaviour", "kl_placement": "loss"}
    algorithm = dataclasses.replace(CONFIG.algorithm, loss=loss, advantage="dr_grpo", **against_sampler)
    config = dataclasses.replace(CONFIG, algorithm=algorithm)
    steering = Steering(dataclasses.replace(session, config=config))
    steering.compile(*params)
    updates = steering.prepared(pack(config, kept, {}), params[0], RunProgress())
    return [batch.advantages for batch in steering.completed(updates[0], *params)]


def with_experts(group: Group) -> Group:
    """The group as an engine that records plays it; its router would have chosen others. A tool wrote in between, and
    two trajectories begin alike."""
    record, random = moe.record(MODEL), np.random.default_rng(group.draw)

    def chosen(tokens: int) -> np.ndarray:
        ranks = random.random((tokens, record.shape[0], MODEL.experts)).argsort(axis=-1)
        experts = ranks[..., : record.shape[1]].astype(record.dtype)
        experts[-1] = -1
        return experts

    def whole(one: Trajectory, first: Trajectory) -> Trajectory:
        begins = first.ids[:3] if one.sample == 1 else one.ids[:3]
        return dataclasses.replace(
            one,
            prompt_ids=first.prompt_ids,
            ids=np.concatenate([begins, one.ids[3:]]),
            turns=(Turn(0, 3, "policy"), Turn(3, 4, "tool"), Turn(4, len(one.ids), "policy")),
            experts=chosen(len(one.prompt_ids) + len(one.ids)),
        )

    trajectories = tuple(whole(one, group.trajectories[0]) for one in group.trajectories)
    return dataclasses.replace(group, trajectories=trajectories)


def check_held(updater: Updater, batch: Batch) -> None:
    """Of experts, a device is given no more of all processes' parts at once than what it keeps of them."""
    place, held = updater._place, []
    add = place._add

    def watched_add(parts: jax.Array, unsaid: np.generic) -> jax.Array:
        added = add(parts, unsaid)
        if parts.dtype == batch.experts.dtype:
            held.append(parts.addressable_shards[0].data.nbytes)
        return added

    place._add = watched_add
    placed = updater._placed(batch)
    place._add = add
    kept = placed.experts.addressable_shards[0].data.nbytes
    if jax.process_count() > 1 and not 0 < max(held) <= kept:
        raise AssertionError(f"{max(held)} bytes of experts at once, of which {kept} are kept")


def main() -> int:
    placement.AT_ONCE_BYTES = 0
    session = Session(CONFIG, None, None, None, MODEL, make_mesh(updating.MESH))
    params, reference = (initial_params(param_specs(MODEL), session.mesh, seed) for seed in (0, 1))
    critic, steering, progress = new_critic(session, params), Steering(session), RunProgress()
    critic.compile()
    steering.compile(params, reference)
    rules = selection.chooser(CONFIG.algorithm)
    groups = [shares.known_here(with_experts(updating.group(draw))) for draw in range(6)]
    kept = tuple(rules.choose(group.trajectories, np.random.default_rng(0)) for group in groups)
    trajectories = tuple(one for chosen in kept for one in chosen.kept)

    values = critic.values(trajectories)
    outcomes = earned(what_is_recorded(CONFIG), kept, {}, values)
    outcomes = steering.seen(outcomes, trajectories, params, reference, progress)
    learned = critic.learn(trajectories, outcomes)
    updates = steering.prepared(pack(CONFIG, kept, {}, outcomes), params, progress)

    targets = [targets_of(loss, session, kept, params, reference) for loss in sorted(TARGETS)]
    loss = policy_gradient_loss(MODEL, CONFIG.algorithm, CONFIG.engine.temperature)
    optimizer = session.rl_optimizer
    updater = Updater(loss, optimizer, session.mesh, experts=session.recorded_experts, pooled=True)
    state, metrics = new_state(params, optimizer, session.mesh), []
    with jax.set_mesh(session.mesh):
        placed = [updater._placed(batch) for batch in updates[1]]
        check_held(updater, updates[1][0])
    for batches in updates:
        state, found = updater.step(state, batches)
        metrics.append(found)
    with jax.set_mesh(session.mesh):
        seen = {"params": state.params, "critic": critic.state.params}
        seen |= {"experts": [b.experts for b in placed], "proximal": [b.proximal_logprobs for b in placed]}
        seen = jax.jit(lambda tree: tree, out_shardings=jax.sharding.NamedSharding(session.mesh, jax.P()))(seen)
    if is_first():
        seen |= {"values": values, "square_sums": outcomes.square_sums, "token_rewards": outcomes.token_rewards}
        seen |= {"learned": learned, "metrics": metrics, "targets": targets, "logprobs": outcomes.logprobs}
        seen |= {"reference_ratios": outcomes.reference_ratios, "nodes": outcomes.nodes}
        seen |= {"states": np.unique(np.concatenate(outcomes.states), return_inverse=True)[1]}
        named = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(seen)}
        np.savez(sys.argv[4], **named)
    return 0


if __name__ == "__main__":
    port, count, process = map(int, sys.argv[1:4])
    sys.exit(join.run(join.Place(f"127.0.0.1:{port}", count, process, 60), main))
