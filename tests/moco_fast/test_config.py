import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moco_fast.commandline import main, parse
from moco_fast.config import Config, differences, from_dict, to_dict, validate
from moco_fast.methods.momentum_contrast import MomentumContrast
from moco_fast.presets import PRESETS
from pipelines.config import DataConfig


def config(**sections) -> Config:
    return Config(data=DataConfig(shards="somewhere"), method=MomentumContrast(), **sections)


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    return str(tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_validates_and_survives_json(name, shards):
    parsed = parse([name, "--data.shards", shards])
    assert (parsed.recipe, parsed.data.shards) == (name, shards)
    assert from_dict(to_dict(parsed)) == parsed


def options():
    """Options of every kind that all recipes take."""
    number = st.floats(1e-8, 10).map(repr)
    options = {
        "--run.steps": st.integers(1, 10**12).map(str),
        "--optim.lr": number,
        "--optim.weight-decay": number,
        # An address is refused.
        "--run.out": st.text("ab /é,#:'\"😀", min_size=1, max_size=6)
        .map("x{}".format)
        .filter(lambda it: "://" not in it),
        "--views.query.crop-scale": st.floats(0.01, 0.5).map(lambda low: f"{low!r} 0.75"),
        "--run.allow-changes": st.sampled_from(["run.steps", "run.steps data.shards"]),
        "--optim.clip-norm": st.sampled_from(["None", "1e-05", "3"]),
    }
    return st.fixed_dictionaries({}, optional=options)


def feed_back(resolved, folder):
    """The run of another run's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(to_dict(resolved)))
    assert parse(["--config", str(file)]) == resolved


@pytest.mark.parametrize("name", PRESETS)
def test_the_config_of_a_run_fed_back_is_the_same_run(name, shards, tmp_path):
    feed_back(parse([name, "--data.shards", shards, "--optim.lr", "1e-05"]), tmp_path)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from([*PRESETS]), options=options())
def test_it_is_with_any_options(name, options, shards, tmp_path):
    words = [name, "--data.shards", shards]
    for option, value in options.items():
        words += [option, *([value] if option == "--run.out" else value.split())]
    feed_back(parse(words), tmp_path)


def test_options_override_the_file_which_overrides_the_recipe(shards, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"# a comment\nrecipe: simsiam\ndata: {{shards: {shards}, batch-size: 64}}\noptim:\n  lr: 1e-2\n"
        "method:\n  predictor_dim: 32\n"
    )
    found = parse(["--config", str(file), "--data.batch-size", "32"])
    recipe = PRESETS["simsiam"][1]
    assert (found.data.batch_size, found.optim.lr, found.method.predictor_dim) == (32, 0.01, 32)
    assert found.run == recipe.run
    assert parse(["simsiam", f"--config={file}"]).data.batch_size == 64


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("data: {shards: here}", [], "names no recipe"),
        ("recipe: moco-v9", [], "line 1: there is no recipe 'moco-v9': choose moco-v1"),
        ("recipe: moco-v2", ["moco-v1"], "the recipe is moco-v2, but the command names moco-v1"),
        ("recipe: moco-v2\nmethod: {name: byol}", [], "line 2: method.name is 'byol', but moco-v2 trains by"),
        ("recipe: moco-v2\noptim: {lrr: 1}", [], "line 2: there is no option optim.lrr: did you mean optim.lr?"),
        ("recipe: moco-v2\nbatch_size: 1", [], "there is no option batch_size: did you mean data.batch_size?"),
        ("recipe: moco-v2\noptim: {lr: [1]}", [], "line 2: optim.lr is [1], but must be a number"),
        ("recipe: moco-v2\ndata: {batch_size: 0}", [], "run.yaml: data.batch_size is 0"),
        ("recipe: moco-v2\ndata: {shards: here}\nrun: {steps: 3, epochs: 4}", [], "--run.epochs 4.0 means nothing"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(text, words, says, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main([*words, "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_file_without_shards_leaves_them_to_the_options(shards, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("recipe: moco-v2\nrun: {steps: 3}")
    assert parse(["--config", str(file), "--data.shards", shards]).run.steps == 3
    with pytest.raises(SystemExit, match="2"):
        main(["--config", str(file)])
    assert "--data.shards" in capsys.readouterr().err


# The published numbers, from the papers and the authors' code.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "moco-v1",
            {"head": "linear", "temperature": 0.07, "lr": 0.03, "weight_decay": 1e-4, "schedule": "step", "hue": 0.4}
            | {"queue_size": 65536, "momentum": 0.999, "batch_size": 256, "blur_p": 0.0, "jitter_p": 1.0},
        ),
        (
            "moco-v2",
            {"head": "mlp", "temperature": 0.2, "lr": 0.03, "weight_decay": 1e-4, "schedule": "cosine", "hue": 0.1}
            | {"queue_size": 65536, "momentum": 0.999, "batch_size": 256, "blur_p": 0.5, "jitter_p": 0.8},
        ),
        (
            "moco-v1-1b",
            {"head": "linear", "temperature": 0.07, "lr": 0.12, "schedule": "exponential", "decay": 0.9}
            | {"decay_every": 62_500 / 1_250_000, "queue_size": 65536, "momentum": 0.999, "batch_size": 1024},
        ),
        (
            "moco-v3-resnet50",
            {"dim": 256, "temperature": 1.0, "lr": 9.6, "weight_decay": 1e-6, "schedule": "cosine"}
            | {"name": "lars", "trust": 0.001, "warmup": 10 / 100, "momentum": 0.99, "batch_size": 4096}
            | {"momentum_schedule": "cosine", "blur_p": 1.0, "saturation": 0.2, "mlp_dim": 4096},
        ),
        (
            "moco-v3-vit-small",
            {"dim": 256, "temperature": 0.2, "lr": 2.4e-3, "weight_decay": 0.1, "warmup": 40 / 300, "name": "adamw"}
            | {"freeze_patch_projection": True, "crop_scale": (0.08, 1.0), "momentum": 0.99, "batch_size": 4096},
        ),
        ("memory-bank", {"num_negatives": 65536, "momentum": 0.5, "lr": 0.03, "batch_size": 256}),
        ("end-to-end", {"temperature": 0.07, "head": "linear", "lr": 0.12, "batch_size": 1024}),
        (
            # Grill et al. 2020, appendix; byol/configs/byol.py at 4822a45 of google-deepmind/deepmind-research.
            "byol",
            {"dim": 256, "mlp_dim": 4096, "momentum": 0.99, "momentum_schedule": "cosine", "name": "lars"}
            | {"lr": 0.3 * 4096 / 256, "weight_decay": 1e-6, "trust": 1e-3, "warmup": 10 / 300, "epochs": 300}
            | {"batch_size": 4096, "crop_scale": (0.08, 1.0), "saturation": 0.2, "blur_p": 1.0, "policy": "sync"},
        ),
        (
            # Chen & He 2021; main_simsiam.py at 39ac33e of facebookresearch/simsiam.
            "simsiam",
            {"dim": 2048, "predictor_dim": 512, "name": "sgd", "lr": 0.05 * 512 / 256, "weight_decay": 1e-4}
            | {"schedule": "cosine", "warmup": 0.0, "epochs": 100, "batch_size": 512, "zero_init_residual": True}
            | {"crop_scale": (0.2, 1.0), "hue": 0.1, "blur_p": 0.5, "policy": "sync"},
        ),
        (
            "cifar10",
            {"head": "linear", "temperature": 0.1, "lr": 0.06, "weight_decay": 5e-4, "schedule": "cosine", "hue": 0.1}
            | {"queue_size": 4096, "momentum": 0.99, "batch_size": 512, "blur_p": 0.0, "jitter_p": 0.8},
        ),
    ],
)
def test_presets_hold_the_published_numbers(name, expected):
    preset = PRESETS[name][1]
    sections = (preset.model, preset.method, preset.optim, preset.data, preset.views.query, preset.bn, preset.run)
    found = {}
    for section in reversed(sections):
        found |= {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    # The optimizer's has the same name.
    found |= {"momentum": getattr(preset.method, "momentum", None)}
    assert {name: found[name] for name in expected} == expected
    assert preset.optim.momentum == 0.9


def test_every_option_reaches_the_configuration(shards):
    parsed = parse(["moco-v2", "--data.shards", shards, "--optim.lr", "0.5", "--run.steps", "3", "--bn.policy", "none"])
    assert (parsed.optim.lr, parsed.run.steps, parsed.bn.policy) == (0.5, 3, "none")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method.momentum", "1.5"], "--method.momentum is 1.5"),
        (["--optim.accumulate", "0"], "--optim.accumulate is 0"),
        (["--run.steps", "0"], "--run.steps is 0"),
        (["--run.samples", "0"], "--run.samples is 0"),
        (["--run.samples", "9", "--run.steps", "9"], "--run.steps 9 and --run.samples 9 both set the length"),
        (["--eval.crop", "2"], "--eval.crop is 2"),
        (["--run.cuda-graphs", "--optim.accumulate", "2"], "--run.cuda-graphs keeps the gradient of one"),
        (["--run.cuda-graphs", "--method.symmetric"], "--run.cuda-graphs keeps the gradient of one"),
        (["--optim.warmup", "1"], "--optim.warmup is 1"),
        (["--optim.lr", "nan"], "--optim.lr is nan"),
    ],
)
def test_impossible_values_are_named(shards, capsys, options, says):
    assert main(["moco-v2", "--data.shards", shards, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says}")
    assert error.count("\n") == 1


def test_an_impossible_section_is_named(shards, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["moco-v2", "--data.shards", shards, "--data.batch-size", "0"])
    assert "data.batch_size is 0" in capsys.readouterr().err


def test_missing_shards_are_named_before_any_work(tmp_path, capsys):
    assert main(["moco-v2", "--data.shards", str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_a_misspelt_option_suggests_the_right_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["moco-v2", "--data.shards", "x", "--optim.lrr", "3"])
    assert "--optim.lr" in capsys.readouterr().err


def test_differences_name_the_options():
    old = config()
    new = dataclasses.replace(old, optim=dataclasses.replace(old.optim, weight_decay=0.5))
    assert differences(old, new) == ["--optim.weight-decay: 0.0001 -> 0.5"]
    assert differences(old, old) == []


def test_from_dict_refuses_what_it_does_not_know():
    data = to_dict(config())
    data["optim"]["lrr"] = 1
    with pytest.raises(ValueError, match="OptimConfig has no field lrr"):
        from_dict(data)
    with pytest.raises(ValueError, match="data"):
        from_dict({})


def test_validate_accepts_the_defaults():
    validate(config())


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom moco_fast.commandline import main\n"
        "try:\n    main(['moco-v2', '--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "sys.exit('torch' in sys.modules or 'nvidia.dali' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [("memory-bank", "samples have none"), ("moco-v2 --eval.shards val", "numbers of the training samples")],
)
def test_streamed_samples_have_no_number(words, message):
    with pytest.raises(ValueError, match=message):
        parse([*words.split(), "--data.shards", "d", "--run.out", "o", "--data.stream-samples", "1000"])


def test_several_sets_are_looked_for_one_by_one(shards, tmp_path):
    both = f"{shards},s3://bucket/set"
    assert parse(["moco-v2", "--data.shards", both]).data.shards == both
    with pytest.raises(ValueError, match=r"--data\.shards \S+/nowhere has no manifest\.json"):
        parse(["moco-v2", "--data.shards", f"{shards},{tmp_path}/nowhere"])


@pytest.mark.parametrize("name", ["moco-v3-resnet50", "moco_v3_resnet50"])
def test_what_was_given_is_seen_beside_the_recipe_in_either_spelling(shards, name):
    # Groups mean nothing beside sync, and the recipe `demo` has others.
    words = [name, "--data.shards", str(shards), "--run.out", "demo"]
    assert parse(words).bn.num_groups == 8
    with pytest.raises(ValueError, match=r"--bn\.num-groups 4 means nothing"):
        parse([*words, "--bn.num-groups", "4"])


def test_the_name_of_the_preset_is_no_option(capsys):
    with pytest.raises(SystemExit):
        parse(["moco-v2", "--data.shards", "x", "--preset", "moco-v1"])
    assert "--preset" in capsys.readouterr().err


@pytest.mark.parametrize(("tensorboard", "trackers"), [(True, ("tensorboard",)), (False, ())])
def test_the_configuration_of_a_run_from_before_trackers_had_names_opens(tensorboard, trackers):
    before = to_dict(config())
    del before["log"]["trackers"]
    before["log"]["tensorboard"] = tensorboard
    assert from_dict(before).log.trackers == trackers
