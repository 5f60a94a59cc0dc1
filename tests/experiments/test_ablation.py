"""The ablation: changes of its settings, resuming a grid, the table, the plot, the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.config import FamilyConfig
from pixellm_jax.cli.main import main
from pixellm_jax.config import MeshConfig
from pixellm_jax.errors import InputError
from pixellm_jax.experiments import ablation_run
from pixellm_jax.experiments.ablation_grid import (
    BASE,
    apply_changes,
    base_recipe,
    make_grid,
    select_settings,
    with_steps,
)
from pixellm_jax.experiments.ablation_report import (
    PLOT,
    RESULTS,
    TABLE,
    Result,
    append_result,
    draw_groups,
    format_groups,
    group_results,
    read_results,
    write_report,
)
from pixellm_jax.experiments.recipe import Recipe
from pixellm_jax.experiments.shapes_training import open_loader
from pixellm_jax.training.config import TrainConfig
from pixellm_jax.training.state import Blueprint, make_blueprint
from tests.support.small_training import small_data, small_model, small_train

# Settings, without training


@pytest.fixture(scope="module")
def base() -> Recipe:
    return base_recipe("simple", 400)


def blueprint(base: Recipe, name: str) -> Blueprint:
    recipe = apply_changes(base, make_grid(base.model)[name], seed=0)
    return make_blueprint(recipe.model, recipe.train)


def test_grid_has_every_setting(base):
    assert list(make_grid(base.model)) == [
        BASE,
        "tokens-1",
        "tokens-3",
        "scales-1",
        "scales-3",
        "early-tap-2",
        "early-tap-4",
        "plain-bce",
        "constant-fusion",
    ]


def test_base_is_the_full_method(base):
    recipe = apply_changes(base, {}, seed=0)
    assert recipe == base
    assert recipe.model.codebook.tokens_per_scale == recipe.model.codebook.scales == 2
    assert len(set(recipe.model.vision.taps)) == 2
    assert recipe.train.loss.alpha == 2
    whole = blueprint(base, BASE)
    assert {"codebook.token_fusion", "codebook.mask_fusion"} < whole.trainable


def test_every_setting_has_the_same_budget(base):
    for changes in make_grid(base.model).values():
        recipe = apply_changes(base, changes, seed=5)
        assert recipe.train.steps == recipe.train.evaluate_every == 400
        assert recipe.train.seed == recipe.data.seed == 5
        assert recipe.train.optimizer == base.train.optimizer
        same = {"length": base.data.length, "seed": base.data.seed}
        assert dataclasses.replace(recipe.data, **same) == base.data
        assert recipe.validation.seed == base.validation.seed != base.data.seed


@pytest.mark.parametrize("count", [1, 3])
def test_tokens_per_scale(base, count):
    name = f"tokens-{count}"
    changed = blueprint(base, name)
    recipe = apply_changes(base, make_grid(base.model)[name], seed=0)
    assert changed.shapes["codebook.token_fusion"].shape == (2, count)
    rows, width = blueprint(base, BASE).shapes["language_model.embedding"].shape
    added = 2 * (count - 2)
    assert changed.shapes["language_model.embedding"].shape == (rows + added, width)
    assert recipe.vocabulary(None).tokens_per_scale == count
    assert recipe.vocabulary(None).size == recipe.model.language.vocabulary
    for data, old in ((recipe.data, base.data), (recipe.validation, base.validation)):
        assert data.length == old.length + added * old.targets
    # Apart from rows of the embedding and of the head, only the fusion weights are more or fewer.
    more = ablation_run.count_parameters(changed) - ablation_run.count_parameters(
        blueprint(base, BASE)
    )
    assert more == added * (2 * width + 1)


@pytest.mark.parametrize(("count", "taps"), [(1, (-2,)), (3, (-2, -3, -4))])
def test_scales(base, count, taps):
    changed = blueprint(base, f"scales-{count}")
    assert changed.config.codebook.scales == count
    assert changed.config.vision.taps == taps
    assert changed.shapes["codebook.mask_fusion"].shape == (count,)
    transformers = {
        name.split(".")[2]
        for name in changed.shapes
        if name.startswith("pixel_decoder.transformers.")
    }
    assert transformers == set(map(str, range(count)))
    more = ablation_run.count_parameters(changed) - ablation_run.count_parameters(
        blueprint(base, BASE)
    )
    assert (more > 0) == (count > 2)


@pytest.mark.parametrize("tap", [-2, -4])
def test_early_tap(base, tap):
    changed = blueprint(base, f"early-tap{tap}")
    assert changed.config.vision.taps == (-2, tap) != base.model.vision.taps
    assert ablation_run.count_parameters(changed) == ablation_run.count_parameters(
        blueprint(base, BASE)
    )


def test_plain_bce(base):
    recipe = apply_changes(base, make_grid(base.model)["plain-bce"], seed=0)
    assert recipe.train.loss.alpha == 1
    loss = dataclasses.replace(recipe.train.loss, alpha=base.train.loss.alpha)
    train = dataclasses.replace(recipe.train, loss=loss)
    assert dataclasses.replace(recipe, train=train) == base


def test_constant_fusion(base):
    whole = blueprint(base, BASE)
    changed = blueprint(base, "constant-fusion")
    assert whole.trainable - changed.trainable == {"codebook.token_fusion", "codebook.mask_fusion"}
    assert changed.trainable < whole.trainable
    assert changed.shapes == whole.shapes


def test_full_level_has_its_own_scenes_and_budgets(base):
    full = base_recipe("full", 400)
    (family,) = full.data.families
    assert family.datasets == ("shapes/train",)
    assert full.validation.families[0].datasets == ("shapes/val",)
    assert base.data.families[0].datasets == ("shapes_simple/train",)
    assert full.data.targets > base.data.targets and full.data.length > base.data.length
    assert full.model == base.model


@pytest.mark.parametrize("level", ["simple", "full"])
def test_every_conversation_fits(level):
    base = base_recipe(level, 400)
    for name in (BASE, "tokens-3", "scales-3"):
        recipe = apply_changes(base, make_grid(base.model)[name], seed=0)
        batches = open_loader(recipe.data, recipe.model, recipe.vocabulary(None))
        for _ in range(6):
            next(batches)
        batches.close()
        assert batches.counts["examples"] == 6 * base.data.batch
        assert batches.counts["conversations over budget"] == 0


# Running


@pytest.fixture
def tiny() -> Recipe:
    """Recipe of two steps of four scenes."""
    data, model = small_data(), small_model()
    held_out = (FamilyConfig(weight=1.0, datasets=("shapes_simple/val",)),)
    return apply_changes(
        Recipe(
            model=model,
            data=data,
            train=small_steps(2),
            validation=dataclasses.replace(data, families=held_out, masks=32, seed=1),
            tokenizer="shapes",
        ),
        {},
        seed=0,
    )


def small_steps(steps: int) -> TrainConfig:
    train = small_train(mesh=MeshConfig(fsdp=1), keep_last=1, keep_best=0, evaluate_batches=1)
    return with_steps(train, steps)


RUNS = [(BASE, 0), ("plain-bce", 0), (BASE, 1), ("plain-bce", 1)]


def check_results(out: Path) -> list[Result]:
    """Check results of two steps each, and that the folder has no other files."""
    results = read_results(out)
    for result in results:
        assert result.steps == 2 and result.left_out == 0
        assert 0 <= result.giou <= 1 and 0 <= result.ciou <= 1
        terms = result.text + result.mask_bce + result.mask_dice
        assert result.loss == pytest.approx(terms) and result.text > 0 and result.mask_dice > 0
        assert 0 < result.seconds_per_step < result.seconds
        assert result.changes == ({} if result.name == BASE else {"train.loss.alpha": 1.0})
    assert sorted(path.name for path in out.iterdir()) == [RESULTS, TABLE, PLOT, "grid.json"]
    assert Image.open(out / PLOT).width > 300
    return results


@pytest.mark.slow
def test_grid_resumes(tiny, tmp_path, monkeypatch, capsys, quick_compilation):
    out = tmp_path / "new" / "ablations"
    grid = select_settings(make_grid(tiny.model), ["plain-bce", BASE])
    ablation_run.run_grid(tiny, select_settings(grid, ["plain-bce"]), [0], out)
    (first,) = check_results(out)
    assert (out / TABLE).read_text().count("plain-bce") == 1

    seen = []

    def train(base, name, changes, seed, folder):
        folder.mkdir()
        seen.append((name, seed))
        return first._replace(name=name, seed=seed, changes=dict(changes), giou=0.25 * len(seen))

    monkeypatch.setattr(ablation_run, "train", train)
    ablation_run.run_grid(tiny, grid, [0, 1], out)
    assert seen == [run for run in RUNS if run != ("plain-bce", 0)]
    assert len(check_results(out)) == 4
    table, text = (out / TABLE).read_text(), (out / RESULTS).read_text()
    assert table.count("| 0, 1 |") == 2

    (out / TABLE).unlink()
    capsys.readouterr()
    ablation_run.run_grid(tiny, grid, [1, 0], out)
    assert len(seen) == 3 and capsys.readouterr().out == ""
    assert (out / RESULTS).read_text() == text and (out / TABLE).read_text() == table


@pytest.mark.long
def test_grid_is_trained(tiny, tmp_path, quick_compilation):
    """The test before is its short form, which trains one run."""
    grid = select_settings(make_grid(tiny.model), ["plain-bce", BASE])
    ablation_run.run_grid(tiny, grid, [0, 1], tmp_path)
    results = check_results(tmp_path)
    assert [(result.name, result.seed) for result in results] == RUNS
    assert results[0].text != results[2].text  # another seed
    assert (tmp_path / TABLE).read_text().count(" ± ") == 2 * 3


def test_a_folder_belongs_to_one_recipe(tiny, tmp_path):
    ablation_run.run_grid(tiny, {}, [0], tmp_path)
    longer = dataclasses.replace(tiny, train=small_steps(40))
    with pytest.raises(InputError, match=r"train\.steps=2, now 40.*another --out"):
        ablation_run.run_grid(longer, {}, [0], tmp_path)


def test_runs_are_shared_with_another_process(tiny, tmp_path, monkeypatch, capsys):
    seen = []

    def train(base, name, changes, seed, folder):
        folder.mkdir()
        seen.append((name, seed))
        if len(seen) == 1:  # another process starts during this run
            ablation_run.run_grid(base, grid, [0], tmp_path)
        return made_result(name=name, seed=seed)

    monkeypatch.setattr(ablation_run, "train", train)
    grid = {"a": {}, "b": {}}
    ablation_run.run_grid(tiny, grid, [0], tmp_path)
    assert seen == [("a", 0), ("b", 0)]
    assert "a, seed 0: left to the process" in capsys.readouterr().out
    assert sorted(r.name for r in read_results(tmp_path)) == ["a", "b"]


# Results


def made_result(**changes: object) -> Result:
    numbers = dict.fromkeys(("giou", "ciou", "loss", "text", "mask_bce", "mask_dice"), 0.5)
    values = {"name": "a", "seed": 0, "changes": {}, "parameters": 1234567, "steps": 10, **numbers}
    times = {"seconds_per_step": 0.25, "seconds": 12.5, "left_out": 0}
    return Result(**{**values, **times, **changes})


RESULTS_BY_HAND = [
    made_result(name="good", seed=1, giou=0.9),
    made_result(name="bad", giou=0.1, changes={"model.vision.taps": (-2, -4)}),
    made_result(name="good", seed=0, giou=0.7),
]


def test_results_are_read_back(tmp_path):
    assert read_results(tmp_path) == []
    for result in RESULTS_BY_HAND:
        append_result(tmp_path, result)
    assert [r.name for r in read_results(tmp_path)] == ["good", "bad", "good"]
    assert read_results(tmp_path)[1].changes == {"model.vision.taps": [-2, -4]}
    with (tmp_path / RESULTS).open("a") as file:
        file.write(json.dumps({"name": "cut off"}) + "\n")
    with pytest.raises(InputError, match="line 4 is no result"):
        write_report(tmp_path)


def test_table():
    lines = format_groups(group_results(RESULTS_BY_HAND)).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == 10
    # The sample deviation of 0.7 and 0.9 is 0.1 times the root of two.
    good = "| good | none | 1,234,567 | 0.800 ± 0.141 | 0.500 ± 0.000 | 0.500 ± 0.000 | 10 |"
    assert lines[2] == f"{good} 0.250 | 0, 1 |"
    bad = "| bad | `model.vision.taps=-2,-4` | 1,234,567 | 0.100 | 0.500 | 0.500 | 10 |"
    assert lines[3:] == [f"{bad} 0.250 | 0 |"]
    incomplete = group_results([*RESULTS_BY_HAND, made_result(name="bad", seed=1, left_out=3)])
    assert "never trained on: bad 3." in format_groups(incomplete)


def test_plot_has_every_seed_and_the_best_on_top():
    (axes,) = draw_groups(group_results(RESULTS_BY_HAND)).axes
    labels = {
        round(tick): label.get_text()
        for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    }
    assert labels == {0: "bad", 1: "good"}
    points = [(list(map(float, line.get_xdata())), set(line.get_ydata())) for line in axes.lines]
    assert points[0] == ([0.1], {0}) and points[2] == ([0.7, 0.9], {1})
    assert points[3] == ([pytest.approx(0.8)], {1})


def test_estimate_by_hand():
    reference = made_result(name="a", steps=10, seconds_per_step=2.0, seconds=50.0)
    seconds = ablation_run.estimate_seconds(["a", "b", "b"], {"a": 4.0, "b": 6.0}, 100, reference)
    assert seconds == pytest.approx(3 * 30 + 100 * 2 + 2 * 100 * 3)


# The command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "base", "tokens-7"], "no setting tokens-7; choose from base, tokens-1"),
        (["--seeds", "0", "-1"], "--seeds: -1 must not be negative"),
        (["--steps", "0"], "steps=0 must be at least 1"),
    ],
)
def test_options_that_make_no_sense(tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert main(["ablate", *options, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("pixellm ablate: ") and message in err
    assert not out.exists()


def test_dry_run_estimates_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def train(base, name, changes, seed, folder):
        assert base.train.steps == ablation_run.TRIAL_STEPS and (name, changes) == (BASE, {})
        return made_result(name=name, steps=6, seconds_per_step=1.0, seconds=36.0)

    monkeypatch.setattr(ablation_run, "train", train)
    out = tmp_path / "out"
    options = [
        "ablate",
        "--dry-run",
        "--only",
        BASE,
        "plain-bce",
        "--steps",
        "90",
        "--out",
        str(out),
    ]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "6 runs of 90 steps, 6 to do" in printed
    assert "estimate: 12 minutes in one process, 6 in two" in printed  # 6 x (30 + 90) s
    assert not out.exists()
