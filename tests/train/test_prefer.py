"""`jaxrl prefer` on stories: programs that run against programs that fail at first."""

import dataclasses
import io
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl.config import Config, ConfigError, ModelConfig, PreferConfig
from jaxrl.data import packing, preferences
from jaxrl.data.demonstrations import story_demonstrations
from jaxrl.data.problems import DataError
from jaxrl.model import hf, logprob, spec, transformer
from jaxrl.observe import traces
from jaxrl.observe.progress import Progress
from jaxrl.observe.writers import read_metrics
from jaxrl.records import Demonstration, Problem, StopReason, Trajectory
from jaxrl.rl.example import example
from jaxrl.train import attention, prefer, preference_loss
from jaxrl.train.run import open_run
from jaxrl.train.session import open_offline_session

MODEL = ModelConfig(vocab_size=24, layers=1, width=16, query_heads=2, kv_heads=1, head_width=8, ffn_width=32)
STORIES = 80


def messages(demonstration: Demonstration) -> list[dict[str, str]]:
    roles = ["assistant", "tool"] * len(demonstration.turns)
    return [{"role": role, "content": text} for role, text in zip(roles, demonstration.turns, strict=False)]


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Pairs of stories, each row's prompt a plain text."""
    good, bad = (story_demonstrations(STORIES, 0.0, share, 3) for share in (0.0, 1.0))
    rows = [
        {"prompt": one.problem.question, "chosen": messages(one), "rejected": messages(other)}
        for one, other in zip(good, bad, strict=True)
    ]
    data = write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)
    overrides = [
        "ModelConfig.layers=1",
        "ModelConfig.width=32",
        "ModelConfig.query_heads=2",
        "ModelConfig.kv_heads=1",
        "ModelConfig.head_width=16",
        "ModelConfig.ffn_width=64",
        "TokenizerConfig.vocab_size=480",
        "ChatConfig.show_tools=False",
        f"PreferConfig.data='{data}'",
        "PreferConfig.held_out=16",
        "PreferConfig.steps=20",
        "PreferConfig.rows=4",
        "PreferConfig.learning_rate=3e-3",
        "PreferConfig.warmup_steps=2",
        "PreferConfig.measure_every=0",
        "PreferConfig.sft_weight=1.0",
        "CheckpointConfig.every=1",
    ]
    return configuration.load("", overrides)


def run(config: Config, folder: pathlib.Path, which: str = "latest") -> dict[str, Any]:
    with Progress("prefer", file=io.StringIO(), live=False) as view:
        return prefer.prefer(config, folder, view, which=which)


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder, asked = tmp_path_factory.mktemp("prefer") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.Crowding, "note", lambda self, section, batches: asked.append(section) or "")
        run(config, folder)
    assert asked == [config.prefer]  # whether its rows are too many for the kernels
    return folder


def test_margins_grow_on_pairs_never_trained_on(finished: pathlib.Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert before["margin"] == 0 and before["preference_loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert after["accuracy"] > 0.9 and after["margin"] > 1 and after["preference_loss"] < 0.6
    assert after["chosen_nll"] < before["chosen_nll"]
    assert [row["step"] for row in read_metrics(finished, "held_out")] == [0, 20]


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(config: Config, finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    again = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(again / "export")
    run(config, again, which="10")
    assert [row["step"] for row in read_metrics(again, "prefer")] == list(range(1, 21))
    weights = [(folder / "export" / "model.safetensors").read_bytes() for folder in (finished, again)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_the_export_is_a_model_to_go_on_from(config: Config, finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Judged answers this time; the reference is the export, so the log-ratios begin at 0 and the KL estimate too."""
    rows = [json.loads(line) for line in pathlib.Path(config.prefer.data).read_text().splitlines()]
    judged = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    section = dataclasses.replace(
        config.prefer, data=write(tmp_path / "judged.jsonl", judged), kind="judged", loss="kto", steps=2
    )
    model = dataclasses.replace(config.model, path=str(finished / "export"))
    after = run(dataclasses.replace(config, model=model, prefer=section), tmp_path / "run")
    assert after["before"]["kl_estimate"] == 0 and after["before"]["preference_loss"] == pytest.approx(0.5)
    hf.load_folder(after["export"])


def sequences(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(4, 9, count)
    ids = [draw.integers(0, 24, length).astype(np.int32) for length in lengths]
    masks = [np.arange(length) >= draw.integers(1, 4) for length in lengths]
    return list(zip(ids, masks, strict=True))


def couples(count: int, rows: int, learned_weight: float = 0.0) -> list[Any]:
    pairs = list(zip(sequences(count), sequences(count, 1), strict=True))
    return packing.pack_couples(pairs, [1.0] * count, rows=rows, row_tokens=40, learned_weight=learned_weight)


def parameters(seed: int) -> Any:
    return spec.initialize(transformer.param_specs(MODEL), jax.random.key(seed))


def test_packed_pairs_have_the_loss_of_answers_scored_one_by_one() -> None:
    config = PreferConfig(loss_settings={"beta": 0.3}, sft_weight=0.5)
    params, reference = parameters(0), parameters(1)
    (batch,) = couples(5, 4, 0.5)
    loss, metrics = preference_loss.preference_loss(MODEL, config, 4)(params, batch, reference)

    def summed(params: Any, sequence: tuple[np.ndarray, np.ndarray]) -> float:
        ids, mask = sequence
        row = ids[None], np.arange(len(ids), dtype=np.int32)[None], np.ones((1, len(ids)), np.int32)
        return float((logprob.sequence_logprobs(params, MODEL, *map(jnp.asarray, row)).logprobs[0] * mask).sum())

    ratios = [[summed(params, one) - summed(reference, one) for one in sequences(5, seed)] for seed in (0, 1)]
    margin = np.subtract(*ratios)
    nll = -sum(summed(params, one) for one in sequences(5)) / sum(mask.sum() for _, mask in sequences(5))
    assert float(loss) == pytest.approx(np.logaddexp(0, -0.3 * margin).mean() + 0.5 * nll, rel=1e-4)
    assert float(metrics["margin"][0]) == pytest.approx(margin.sum(), rel=1e-3, abs=1e-4)
    assert metrics["margin"][1] == 5 and float(metrics["accuracy"][0]) == (margin > 0).sum()


@pytest.mark.slow
def test_what_the_policy_would_write_itself_counts_for_more() -> None:
    """The weight of a pair is the product of its answers', and has no gradient of its own."""
    params, reference = parameters(0), parameters(1)
    (batch,) = couples(5, 4)
    plain = preference_loss.preference_loss(MODEL, PreferConfig(), 4)
    weighted = preference_loss.preference_loss(MODEL, PreferConfig(on_policy_weights=True), 4)

    def weight(sequence: tuple[np.ndarray, np.ndarray]) -> float:
        ids, mask = sequence
        row = ids[None], np.arange(len(ids), dtype=np.int32)[None], np.ones((1, len(ids)), np.int32)
        row = tuple(map(jnp.asarray, row))
        logprobs = logprob.sequence_logprobs(params, MODEL, *row).logprobs[0]
        squares = np.log(np.maximum(logprob.square_sums(params, MODEL, *row)[0], 1e-30))
        return float(np.exp(((logprobs - squares) * mask).sum() / mask.sum()))

    weights = np.array([weight(one) * weight(other) for one, other in zip(sequences(5), sequences(5, 1), strict=True)])
    wanted = 0.0
    pairs = list(zip(sequences(5), sequences(5, 1), strict=True))
    gradients = []
    for pair, own in zip(pairs, weights, strict=True):
        (alone,) = packing.pack_couples([pair], [1.0], rows=1, row_tokens=40)
        (value, _), gradient = jax.value_and_grad(plain, has_aux=True)(params, alone, reference)
        wanted += own * float(value) / 5
        gradients.append(jax.tree.map(lambda leaf, own=own: own * leaf / 5, gradient))
    (value, _), gradient = jax.value_and_grad(weighted, has_aux=True)(params, batch, reference)
    assert float(value) == pytest.approx(wanted, rel=1e-4)
    total = jax.tree.map(lambda *leaves: sum(leaves), *gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, total)
    with pytest.raises(ConfigError, match="asks what a policy would write"):
        preference_loss.method(PreferConfig(kind="reward", loss="bradley_terry", on_policy_weights=True))


def test_the_weights_of_pairs_sum_to_one_and_stand_on_chosen_answers() -> None:
    for batch in couples(9, 1, 0.5):
        assert batch.rl_weights.sum() == pytest.approx(1)
        assert (batch.segment_ids[batch.rl_weights > 0] % 2 == 1).all()
        assert batch.ce_weights.sum() == pytest.approx(0.5) and not batch.ce_weights[batch.mask == 0].any()
        assert int(batch.segment_ids.max()) % 2 == 0


def test_prompts_and_tool_turns_have_no_gradient() -> None:
    """The gradient of the loss with respect to the embedding of a masked-out target alone is zero."""
    config = PreferConfig()
    (batch,) = couples(3, 3)
    changed = batch.replace(behaviour_logprobs=np.full_like(batch.mask, np.nan), versions=batch.versions + 1)
    loss = preference_loss.preference_loss(MODEL, config, 3)
    first, second = (jax.grad(loss, has_aux=True)(parameters(0), one, parameters(1))[0] for one in (batch, changed))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    nothing = batch.replace(mask=np.zeros_like(batch.mask))
    gradient, _ = jax.grad(loss, has_aux=True)(parameters(0), nothing, parameters(1))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("kind", "row", "complaint"),
    [
        ("pairs", {"prompt": "q", "chosen": "a"}, "no 'rejected'; a row of kind 'pairs' has prompt, chosen, rejected"),
        ("judged", {"prompt": "q", "completion": "a"}, "no 'label'"),
        ("judged", {"prompt": "q", "completion": "a", "label": 1}, "label is 1; it must be true or false"),
        ("pairs", {"prompt": "q", "chosen": [], "rejected": "b"}, "must be a list of objects"),
        (
            "pairs",
            {
                "prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                "chosen": "",
                "rejected": "",
            },
            "the prompt ends with the assistant",
        ),
        (
            "pairs",
            {"prompt": "q", "chosen": [{"role": "tool", "content": "a"}], "rejected": "b"},
            "is of 'tool', but after 'user' comes one of assistant",
        ),
    ],
)
def test_a_row_that_is_no_preference_is_named(
    tmp_path: pathlib.Path, kind: Any, row: dict[str, Any], complaint: str
) -> None:
    data = write(tmp_path / "rows.jsonl", [row, row])
    with pytest.raises(DataError, match=complaint) as error:
        preferences.load(PreferConfig(data=data, kind=kind), 0)
    assert "rows.jsonl:1" in str(error.value)


def test_earlier_answers_in_a_prompt_are_context_alone(tmp_path: pathlib.Path) -> None:
    prompts = [[{"role": role, "content": x} for role in ("user", "assistant", "user")] for x in "abcd"]
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in prompts]
    train, held_out = preferences.load(PreferConfig(data=write(tmp_path / "rows.jsonl", rows), held_out=1), 0)
    assert (len(train), len(held_out)) == (3, 1)
    alike = write(tmp_path / "alike.jsonl", [row for row in rows[:1] for _ in range(8)])
    with pytest.raises(DataError, match="held_out=4 of 8 rows cannot be kept back, .* fewest has 8"):
        preferences.load(PreferConfig(data=alike, held_out=4), 0)
    learned = [message.learned for message in (*train[0].prompt, *train[0].answers[1])]
    assert learned == [False, False, False, True]


def test_no_prompt_is_both_learned_and_kept_back(tmp_path: pathlib.Path) -> None:
    rows = [{"prompt": p, "chosen": "a", "rejected": "b"} for p in "aaabbbccd"]
    data = write(tmp_path / "rows.jsonl", rows)
    for seed in range(5):
        train, held_out = preferences.load(PreferConfig(data=data, held_out=4), seed)
        assert not {one.prompt for one in train} & {one.prompt for one in held_out}
        assert len(held_out) in (3, 4) and len(train) + len(held_out) == len(rows)


def test_a_loss_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="PreferConfig.loss='kto' is no method"):
        preference_loss.method(PreferConfig(loss="kto"))
    assert preference_loss.method(PreferConfig(loss="kto", kind="judged"))


def test_an_unrelated_answer_is_to_another_prompt(tmp_path: pathlib.Path) -> None:
    rows = [{"prompt": p, "completion": f"{p}{i}", "label": True} for i, p in enumerate("aabca")]
    section = PreferConfig(data=write(tmp_path / "rows.jsonl", rows), kind="judged", loss="kto", held_out=0)
    loaded, _ = preferences.load(section, 0)
    others = [one.prompt[-1].text for one in preferences.unrelated(section, loaded)]
    assert others == ["b", "b", "c", "a", "b"]
    alike = dataclasses.replace(section, data=write(tmp_path / "alike.jsonl", rows[:2]))
    with pytest.raises(DataError, match="a part of 2 rows has a single prompt"):
        preferences.load(alike, 0)


def episode(problem: int, sample: int) -> Trajectory:
    """Sample 0 is right; the others are wrong, and a token longer."""
    one = example(min(sample, 1))
    return dataclasses.replace(one, problem=Problem(f"p{problem}", f"{problem}?", "2"), sample=sample)


def dump(run: pathlib.Path, episodes: list[Trajectory]) -> str:
    traces.write_episodes(run, "rl", 1, episodes)
    return str(run)


def test_right_and_wrong_episodes_of_a_problem_make_pairs(tmp_path: pathlib.Path) -> None:
    played = [episode(problem, sample) for problem in range(3) for sample in (1, 0, 0, 2, 0)]
    fault = dataclasses.replace(episode(0, 1), stop_reason=StopReason.INFRA_ERROR)
    data = dump(tmp_path / "run", [fault, *played, episode(3, 0)])
    pairs, _ = preferences.load(PreferConfig(data=data, held_out=0), 0)
    assert [one.prompt[0].text for one in pairs] == ["0?", "0?", "1?", "1?", "2?", "2?"]
    assert [[answer.correct for answer in one.answers] for one in pairs] == [[True, False]] * 6
    assert [one.answers[1].sample for one in pairs] == [1, 2] * 3
    single, _ = preferences.load(PreferConfig(data=data, held_out=0, pairs_of_problem=1), 0)
    assert [one.answers[1].sample for one in single] == [1, 1, 1]
    judged, _ = preferences.load(PreferConfig(data=data, held_out=0, kind="judged"), 0)
    assert len(judged) == 16 and sum(one.good for one in judged) == 10
    with pytest.raises(DataError, match="episodes have no judged steps"):
        preferences.load(PreferConfig(data=data, kind="process"), 0)
    with pytest.raises(DataError, match="none has both a right and a wrong answer"):
        preferences.load(PreferConfig(data=dump(tmp_path / "one", [episode(0, 0)]), held_out=0), 0)


def test_pairs_of_episodes_that_a_row_cannot_hold_are_left_out_and_counted(
    config: Config, finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Nobody can take them out of a run's folder; a row of a file can be, and is refused."""
    with open_run(tmp_path / "packing") as opened:
        shutil.copytree(finished / "tokenizer", opened.tokenizer)
        session = open_offline_session(config, opened, [])
        texts = [" one" * count for count in (2, 9, 4, 30)]
        pairs = []
        for number, text in enumerate(texts):
            ids = np.asarray(session.tokenizer.encode(text), np.int32)
            for sample in (0, 1):
                fields = {"ids": ids, "mask": np.ones(len(ids), np.int8), "text": session.tokenizer.decode(ids)}
                pairs.append(dataclasses.replace(episode(number, sample), **fields, logprobs=np.zeros(len(ids))))
        lengths = [2 * (1 + len(one.ids)) for one in pairs[::2]]
        data = dump(tmp_path / "played", pairs)

        def packed(limit: int, notes: list[str]) -> list[Any]:
            section = dataclasses.replace(config.prefer, data=data, held_out=0, row_tokens=limit)
            short = dataclasses.replace(session, config=dataclasses.replace(config, prefer=section))
            return prefer.packed(short, preferences.load(section, 0)[0], notes.append)

        notes: list[str] = []
        batches = packed(sorted(lengths)[1], notes)
        assert sum(np.count_nonzero(batch.rl_weights) for batch in batches) == 2
        assert notes == [
            f"left out: 2 of 4 couples of episodes, with more than PreferConfig.row_tokens={sorted(lengths)[1]} tokens"
        ]
        with pytest.raises(ConfigError, match=rf"4 of 4 couples of .* the shortest {min(lengths)}; raise it"):
            packed(min(lengths) - 1, [])
        section = dataclasses.replace(config.prefer, row_tokens=8)
        short = dataclasses.replace(session, config=dataclasses.replace(config, prefer=section))
        with pytest.raises(ConfigError, match=r"row_tokens=8; raise PreferConfig.row_tokens or leave it out"):
            prefer.packed(short, preferences.load(section, 0)[0])


def test_episodes_are_packed_as_the_same_answers_in_messages(
    config: Config, finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Prompt, answer, and what of it counts: tool turns do not."""
    good, bad = (story_demonstrations(6, 0.0, share, 3) for share in (0.0, 1.0))
    with open_run(tmp_path / "packing") as opened:
        shutil.copytree(finished / "tokenizer", opened.tokenizer)
        session = open_offline_session(config, opened, [])

        def played(demonstration: Demonstration, sample: int) -> Trajectory:
            ids, mask = session.chat.demonstration(demonstration)
            start = int(np.argmax(mask))
            return dataclasses.replace(
                example(sample),
                problem=demonstration.problem,
                prompt_ids=ids[:start],
                ids=ids[start:],
                mask=mask[start:],
                text=session.tokenizer.decode(ids[start:]),
            )

        pairs = [episode for couple in zip(good, bad, strict=True) for episode in map(played, couple, (0, 1))]
        rows = [
            {"prompt": one.problem.question, "chosen": messages(one), "rejected": messages(other)}
            for one, other in zip(good, bad, strict=True)
        ]
        sources = dump(tmp_path / "played", pairs), write(tmp_path / "rows.jsonl", rows)
        for kind in ("pairs", "judged"):
            section = dataclasses.replace(config.prefer, kind=kind, held_out=0)
            both = [(row | {"completion": row["chosen"], "label": True}) for row in rows]
            write(tmp_path / "rows.jsonl", both)
            dump(tmp_path / "played", pairs if kind == "pairs" else pairs[::2])
            as_kind = dataclasses.replace(session, config=dataclasses.replace(config, prefer=section))
            packed = [
                prefer.packed(as_kind, preferences.load(dataclasses.replace(section, data=data), 0)[0])
                for data in sources
            ]
            jax.tree.map(np.testing.assert_array_equal, *packed)
        other = dataclasses.replace(pairs[0], text="of another tokenizer")
        with pytest.raises(ConfigError, match="was played with another tokenizer"):
            prefer.packed(session, [preferences.Preference((), (other, pairs[1]))])
