import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, strategies as st

from compressed_ad.errors import ConfigError
from compressed_ad.learners.base import LEARNER
from compressed_ad.marking.apply import marker_params
from compressed_ad.marking.settings import MarkerSettings
from compressed_ad.models import MODEL
from compressed_ad.models.settings import ModelConfig
from compressed_ad.runs import config as config_module, yaml_file
from compressed_ad.runs.config import explicit_keys, load_config, plan
from compressed_ad.runs.directory import extras
from compressed_ad.runs.layers import (
    PRESETS,
    SECTIONS,
    Request,
    config_file,
    config_folder,
    describe,
    shipped_configs,
    study_file,
    suggest,
)
from compressed_ad.runs.settings import Config
from compressed_ad.runs.yaml_file import dump, dump_plain
from compressed_ad.tasks.base import TASK_FAMILY
from tests.test_layering import PACKAGE


def asked(
    *overrides: tuple[str, str], preset: str = "default", files: tuple[Path, ...] = (), **sections: str
):
    return load_config(Request(preset, files, sections, overrides))


def mistakes(*overrides: tuple[str, str], **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        asked(*overrides, **options)
    return caught.value.problems


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---------------------------------------------------------------- shipped files


@pytest.mark.parametrize("name", shipped_configs())
def test_every_whole_run_is_valid(name):
    config = load_config(Request(files=(Path(name),)))
    assert config == load_config(Request(files=(shipped_configs()[name],)))
    assert config.comparison.runs >= 1


@pytest.mark.parametrize(
    "family",
    [
        *(f"darkroom{kind}" for kind in ("", "_large", "_hard", "_permuted", "_recall", "_switching")),
        "point_mass",
    ],
)
def test_benchmarks_can_start(family):
    _benchmark_can_start(family)


def test_the_benchmark_of_bandits_plays_as_long_as_its_context_and_its_source():
    config = load_config(Request(files=(Path("benchmark/bandit"),)))
    assert plan(config).family.horizon == 1
    assert config.model.n_transit == config.evaluation.episodes == config.algorithm.n_timesteps


def test_the_benchmark_of_key_to_door_has_a_thousand_training_tasks():
    assert len(_benchmark_can_start("key_to_door").split.train) == 1000


def _benchmark_can_start(name):
    config = load_config(Request(files=(Path("benchmark", name),)))
    planned = plan(config)
    assert config.comparison.methods == ("AD",)
    assert planned.family.name == config.env.family == name
    assert "nothing of the task" in planned.learner.told
    assert len(planned.split.validation) >= 8 and len(planned.split.heldout) >= 8
    assert config.model.n_transit >= 100 and config.model.n_transit <= config.algorithm.n_timesteps
    return planned


def test_a_file_of_the_current_folder_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, shipped = Path("benchmark/darkroom"), Request(files=(Path("benchmark/darkroom.yaml"),))
    assert load_config(shipped).env.family == "darkroom"
    assert (shipped.name, Request("smoke").name) == ("benchmark/darkroom", "smoke")
    write(tmp_path, "benchmark/darkroom", "env: {family: darkroom_hard}\nmodel: {steps: 7}\n")
    assert load_config(Request(files=(here,))).model.steps == 7
    assert Request("smoke", (here,)).name == "smoke"
    assert mistakes(files=(Path("benchmark/darkrom"),)) == [
        "--config benchmark/darkrom: no such file or shipped configuration (did you mean"
        f" 'benchmark/darkroom'?); shipped are {', '.join(shipped_configs())}"
    ]


def test_an_installed_package_finds_its_configurations_by_name(tmp_path):
    """A wheel has them inside the package."""
    copy = tmp_path / "site" / "compressed_ad"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE.parent / "config", copy / "config_files")
    shutil.copytree(PACKAGE.parent / "studies", copy / "studies_files")
    calls = (
        ["run", "--config", "benchmark/key_to_door", "--dry-run"],
        ["study", "guide", "--small", "--families", "darkroom", "--dry-run"],
    )
    code = f"from compressed_ad.cli.main import main; raise SystemExit(any(main(x) for x in {calls}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(copy.parent)},
    )  # fmt: skip
    assert done.stderr == ""
    assert "Would make runs/benchmark/key_to_door" in done.stdout
    assert "output: runs/study/guide-small-families=darkroom" in done.stdout


def test_the_last_part_of_a_name_is_enough_where_one_shipped_file_has_it():
    assert config_file(Path("bandit")) == config_file(Path("benchmark/bandit"))
    assert Request(files=(Path("bandit"),)).name == "benchmark/bandit"
    assert config_file(Path("point_mass")).parent.name == "config"  # whole names go first
    assert study_file(Path("guide")).name == "guide.yaml"
    with pytest.raises(ConfigError, match=r"gide: no such file or shipped study \(did you mean 'guide'\?\)"):
        study_file(Path("gide"))
    with pytest.raises(ConfigError, match="'bandit'; it is a configuration: give it as --config bandit"):
        load_config(Request("bandit"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_reads_back(preset, tmp_path):
    config = load_config(Request(preset))
    path = write(tmp_path, "config.yaml", dump(config))
    others = [name for name in PRESETS if name != preset]
    for other in others:
        assert load_config(Request(other, (path,))) == config


@pytest.mark.parametrize(
    "path",
    sorted(path for path in config_folder().glob("*/*.yaml") if path.parent.name in SECTIONS),
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_every_shipped_section_is_valid(path):
    section, stored = path.parent.name, yaml.safe_load(path.read_text())
    prefix = str(stored.get("family")).partition(":")[0]
    if not extras().get(prefix, True):
        pytest.skip(f"the extra {prefix} is not installed")
    continuous = {"env": "point_mass", "algorithm": "sb3_sac"}
    needed = {"sb3:SAC", "homing"} & {*map(str, stored.values())} or path.stem in ("point_mass", "metaworld")
    fits = continuous if needed else {}
    config = asked(**{**fits, section: path.stem})
    for key in stored.keys() & {"family", "learner", "tf_n_embd", "n_task"}:
        assert getattr(getattr(config, section), key) == stored[key]


def test_guide_keys_are_in_the_shipped_model_file():
    keys = set(yaml.safe_load((config_folder() / "model" / "ad_dr.yaml").read_text()))
    assert {"tf_n_embd", "tf_n_head", "tf_n_layer", "n_transit", "batch_size", "lr"} <= keys


@pytest.mark.parametrize(("preset", "heldout"), [("default", 16), ("full", 16), ("smoke", 8)])
def test_darkroom_is_judged_on_16_goals_and_validated_on_8(preset, heldout):
    """As 57/8/16 of its 81 goals; the file of the family says 65/8/8, which others use."""
    env = load_config(Request(preset)).env
    assert (env.train, env.validation, env.heldout) == (None, 8, heldout)


def test_what_a_registry_imports_later_is_there():
    assert {"CompressedAD", "CompressedADv2"} <= set(MODEL)
    for registry in (MODEL, TASK_FAMILY, LEARNER):
        for name, found in registry.items():
            assert callable(found), name


def test_every_setting_has_a_description():
    bare = [key for section in ("", *SECTIONS) for key, _, words in describe(section) if not words]
    assert not bare


# ---------------------------------------------------------------- layers


def test_layers_go_over_each_other(tmp_path):
    one = write(tmp_path, "one.yaml", "model: {lr: 1e-4, steps: 7}\nseed: 3\n")
    two = write(tmp_path, "two.yaml", "model: {steps: 8}\n")
    config = asked(("model.steps", "9"), files=(one, two))
    assert (config.model.lr, config.model.steps, config.seed) == (1e-4, 9, 3)
    assert config.model.tf_n_embd == load_config(Request()).model.tf_n_embd


def test_include_is_relative_to_the_file_then_to_the_shipped_folder(tmp_path):
    write(tmp_path, "sub/mine.yaml", "lr: 5e-4\n")
    path = write(
        tmp_path, "sub/all.yaml", "include: {model: mine.yaml, env: env/key_to_door.yaml}\nseed: 1\n"
    )
    outer = write(tmp_path, "outer.yaml", "include: sub/all.yaml\nmodel: {steps: 11}\n")
    config = asked(files=(outer,))
    assert (config.model.lr, config.model.steps, config.env.family, config.seed) == (
        5e-4,
        11,
        "key_to_door",
        1,
    )
    assert asked(files=(path,)).env.family == "key_to_door"


def test_an_included_section_begins_anew_as_with_its_option(tmp_path):
    write(tmp_path, "small.yaml", "tf_n_embd: 32\n")
    path = write(tmp_path, "all.yaml", "include: {model: small.yaml}\nmodel: {steps: 11}\n")
    assert load_config(Request()).model.transforms  # of the preset
    config = asked(files=(path,))
    assert (config.model.transforms, config.model.tf_n_embd, config.model.steps) == ((), 32, 11)
    assert config.model == asked(("model.steps", "11"), model=str(tmp_path / "small.yaml")).model
    assert config.algorithm == load_config(Request()).algorithm
    # Through a file that is included as a whole, and over files before; what comes later counts again.
    outer = write(tmp_path, "outer.yaml", "include: [before.yaml, all.yaml]\nmodel: {lr: 1e-4}\n")
    write(tmp_path, "before.yaml", "model: {batch_size: 3}\nseed: 5\n")
    config = asked(files=(outer,))
    assert (config.model.batch_size, config.model.lr, config.seed) == (ModelConfig().batch_size, 1e-4, 5)
    # A file that cannot be read changes nothing.
    wrong = write(tmp_path, "wrong.yaml", "include: [all.yaml, gone.yaml]\n")
    assert len(mistakes(files=(wrong,))) == 1


def test_include_cycle_and_missing_file_are_named(tmp_path):
    path = write(tmp_path, "a.yaml", "include: a.yaml\n")
    assert "includes itself" in mistakes(files=(path,))[0]
    path = write(tmp_path, "b.yaml", "include: {model: nothing.yaml}\n")
    assert "b.yaml:1: no such file: nothing.yaml" in mistakes(files=(path,))[0]
    path = write(tmp_path, "c.yaml", "include: {modle: model/ad_dr.yaml}\n")
    assert "include must be" in mistakes(files=(path,))[0]


def test_another_learner_drops_the_parameters_of_the_old_one():
    assert "n_epochs" in load_config(Request()).algorithm.learner_kwargs
    config = asked(
        ("algorithm.learner_kwargs.n_steps", "40"),
        ("algorithm.learner", "compressed_ad.learners.ppo:BatchedPPO"),
    )
    assert config.algorithm.learner_kwargs == {"n_steps": 40}
    assert "n_epochs" in asked(("algorithm.learner", "ppo")).algorithm.learner_kwargs  # it is the same one
    again = asked(("algorithm.learner", "ppo"), ("algorithm.learner_kwargs.n_steps", "40"))
    assert again.algorithm.learner_kwargs == {"n_steps": 40}  # named with all its parameters
    assert asked(("env.family", "darkroom_hard")).env.kwargs == {}
    assert asked(env="compressed_ad.tasks.gridworld:DarkroomLarge").env.kwargs == {}


def test_sections_by_file_name_and_by_main_key(tmp_path):
    assert asked(model="AD").model.model == "AD"
    assert asked(marker="random").marker.marker == "random"
    path = write(tmp_path, "m.yaml", "tf_n_embd: 8\n")
    config = asked(model=str(path))
    assert (config.model.tf_n_embd, config.model.transforms) == (8, ())  # the whole section is replaced
    assert "no such file" in mistakes(model="nothing.yaml")[0]


def test_explicit_keys():
    request = Request("default", (), {"model": "AD"}, [("seed", "3"), ("evaluation.episodes", "50")])
    assert explicit_keys(request) == {"seed", "model.model", "evaluation.episodes"}


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1E3", 1000.0), ("-.5", -0.5), ("7", 7), ("010", 10), ("off", "off"), ("yes", "yes"),
        ("true", True), ("null", None), ("~", None), ("", None), ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("sb3:PPO", "sb3:PPO"), ("'7'", "7"), ("[1, a, 2e0]", [1, "a", 2.0]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("0x10", "0x10"), (".inf", float("inf")),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = yaml_file.value(text, "here")
    assert found == value
    assert type(found) is type(value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1), plain, max_size=3))
def test_dumped_values_read_back(values):
    assert yaml_file.value(dump_plain(values), "here") == values


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("seed: 1\nmodel: {lr: 1}\nseed: 2\n", "x.yaml:3: duplicate key 'seed', first given at .*:1"),
        ("seed: !!python/object/apply:os.system ['true']\n", "x.yaml:1: the tag .* is refused"),
        ("a: &b [1]\nc: *b\n", "x.yaml:1: anchors and aliases are not supported"),
        ("model: [1\n", "x.yaml:2: "),
        ("- 1\n", "expected keys and values, not a sequence"),
        ("model: {lr: 1, lr: 2}\n", "duplicate key 'lr', first given at .*:1"),
        ("[" * 5000, "x.yaml"),
        ("tf_n_embd: 8\nlr: 1\n", "holds only the section 'model'; give it as --model"),
        ("? [a]\n: 1\n", "a key must be a word"),
    ],
)
def test_hostile_and_broken_files_are_refused(text, cause, tmp_path):
    path = write(tmp_path, "x.yaml", text)
    with pytest.raises(ConfigError, match=cause):
        asked(files=(path,))


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in mistakes(files=(tmp_path / "x.yaml",))[0]
    (tmp_path / "big.yaml").write_text("#" * (1 << 21))
    assert "larger than" in mistakes(files=(tmp_path / "big.yaml",))[0]
    assert "no such file" in mistakes(files=(tmp_path / "none.yaml",))[0]


# ---------------------------------------------------------------- mistakes


def test_all_mistakes_of_all_layers_are_reported_together(tmp_path):
    path = write(
        tmp_path,
        "bad.yaml",
        "model:\n  tf_n_embed: 3\n  lr: -1\n  transforms: [{name: subsampel}]\nmodle: {lr: 1}\n"
        "env: {family: darkrom}\n",
    )
    lines = mistakes(
        ("algorithm.learner_kwargs.n_step", "3"),
        ("model.steps", "many"),
        ("comparison.methods", "[AD, CompresedAD]"),
        ("seed", "-1"),
        files=(path,),
        marker="thresold",
    )
    expected = [
        "bad.yaml:2: unknown key 'model.tf_n_embed' (did you mean 'tf_n_embd'?)",
        "bad.yaml:3: model.lr must be a number above 0, got -1",
        "bad.yaml:4: model: unknown history transform 'subsampel' (did you mean 'subsample'?)",
        "bad.yaml:5: unknown key 'modle' (did you mean 'model'?)",
        "bad.yaml:6: env: unknown task family 'darkrom' (did you mean 'darkroom'?)",
        "--algorithm.learner_kwargs.n_step: algorithm: ppo: unknown key 'n_step' (did you mean 'n_steps'?)",
        "--model.steps: model.steps must be a whole number of at least 1, got 'many'",
        "--comparison.methods: comparison: unknown model 'CompresedAD' (did you mean 'CompressedAD'?)",
        "--seed: seed must be a whole number of at least 0, got -1",
        "--marker: marker: unknown marker 'thresold' (did you mean 'threshold'?)",
    ]
    assert len(lines) == len(expected)
    for part in expected:
        assert any(part in line for line in lines), part


def test_a_name_for_the_thing_itself_is_told_its_key(tmp_path):
    path = write(tmp_path, "bad.yaml", "marker: {name: threshold}\nalgorithm: {name: ppo}\n")
    one, other = sorted(mistakes(files=(path,)))
    assert one.endswith("bad.yaml:1: unknown key 'marker.name' (did you mean 'marker'?)")
    assert other.endswith("bad.yaml:2: unknown key 'algorithm.name' (did you mean 'learner'?)")


@pytest.mark.parametrize(
    ("key", "text", "cause"),
    [
        ("env.kwargs.siez", "3", "unknown parameter 'siez' (did you mean 'size'?)"),
        ("env.kwargs.size", "1", "size must be a whole number between 2 and 1000"),
        ("env.heldout", "100", "cannot be made of 81 tasks"),
        ("env.n_task", "1000", "n_task must lie in 1..81"),
        ("env.name", "a/b", "must be text that matches ^[A-Za-z0-9_.]+$, got 'a/b'"),
        ("marker.params.windw", "3", "unknown parameter 'windw'"),
        ("marker.on_policy_threshold", "1.5", "must be a number between 0 and 1, got 1.5"),
        ("marker.compression_window", "0", "must be a whole number of at least 1, got 0"),
        ("model.tf_n_embd", "10", "tf_n_embd 10 is not a multiple of tf_n_head 4"),
        ("model.transforms", "[subsample]", "parameter 'every' is missing"),
        ("model.transforms", "[{name: subsample, evry: 2, every: 2}]", "unknown parameter 'evry'"),
        ("model.lr", ".inf", "finite number"),
        ("model.token_inputs", "[state]", "one of previous_state, episode_return, episode_time, got 'state'"),
        ("model.token_inputs", "[episode_time, episode_time]", "episode_time is named twice"),
        ("model.loss_min_probability", "1.1", "must be a number between 0 and 1, got 1.1"),
        ("model", "5", "must be keys with values, got 5"),
        ("evaluation.marks", "on", "must be one of off, self, prompt, prompt_rewarded, got 'on'"),
        ("comparison.methods", "[AD, AD]", "names a model twice"),
        ("comparison.runs", "0", "must be a whole number of at least 1, got 0"),
        ("algorithm.learner", "ppoo", "unknown learner 'ppoo'"),
        ("algorithm.learner", "no_such_module:X", "cannot import 'no_such_module'"),
        ("device", "gpu", "must be one of auto, cpu, cuda, got 'gpu'"),
    ],
)
def test_each_mistake_is_one_clear_line(key, text, cause):
    (line,) = mistakes((key, text))
    assert cause in line
    assert line.startswith(f"--{key}: ")


def test_a_query_has_no_weight():
    (line,) = mistakes(("model.loss_at", "query"), ("model.loss_min_probability", "0.1"))
    assert "model: loss_min_probability has no effect with loss_at query; set it to 0" in line


def test_unknown_preset():
    with pytest.raises(ConfigError, match=r"unknown preset 'smok' \(did you mean 'smoke'\?\)"):
        load_config(Request("smok"))


def test_suggestions_for_options():
    assert suggest("lr") == "--model.lr"
    assert suggest("n_transt") == "--model.n_transit"
    assert suggest("zzzzzz") == ""


def test_a_marker_keeps_its_own_default_threshold():
    assert marker_params(MarkerSettings(marker="high_confidence")) == {}
    chosen = MarkerSettings(marker="high_confidence", on_policy_threshold=0.8)
    assert marker_params(chosen) == {"on_policy_threshold": 0.8}
    # A value that is set is used, also where it equals the guide's default.
    assert marker_params(MarkerSettings(marker="high_confidence", on_policy_threshold=0.7)) == {
        "on_policy_threshold": 0.7
    }
    assert marker_params(MarkerSettings()) == {}
    assert marker_params(MarkerSettings(marker="none", on_policy_threshold=0.5)) == {}


def test_the_configuration_states_the_call_of_the_marker():
    def marker(*overrides: tuple[str, str], preset: str = "default") -> MarkerSettings:
        return load_config(Request(preset, overrides=overrides)).marker

    assert (marker().on_policy_threshold, marker().compression_window) == (0.7, 10)
    high = marker(("marker.marker", "high_confidence"))
    assert (high.on_policy_threshold, high.compression_window) == (0.95, None)
    explicit = marker(("marker.marker", "high_confidence"), ("marker.on_policy_threshold", "0.7"))
    assert explicit.on_policy_threshold == 0.7
    assert marker_params(explicit) == {"on_policy_threshold": 0.7}
    none = marker(("marker.marker", "none"), preset="smoke")  # the preset's 0.2 and 3 are another marker's
    assert (none.on_policy_threshold, none.compression_window) == (None, None)
    with pytest.raises(ConfigError, match="marker 'none' has no compression_window"):
        marker(("marker.marker", "none"), ("marker.compression_window", "5"))


def test_configuration_is_immutable_and_hashes_out_no_torch():
    assert Config.model_config["frozen"]
    assert dataclasses.is_dataclass(Request)
    code = (
        "import sys; from compressed_ad.runs.config import Request, load_config; load_config(Request());"
        "import compressed_ad.cli.main; assert 'torch' not in sys.modules and 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_family_and_learner_are_built_once_for_validation_and_plan(monkeypatch):
    built: list[str] = []
    for name in ("make_family", "make_learner"):
        maker = getattr(config_module, name)

        def counted(*args, maker=maker, name=name):
            built.append(name)
            return maker(*args)

        monkeypatch.setattr(config_module, name, counted)
    config = asked(("seed", "1234"), preset="smoke")
    made = plan(config)
    assert plan(config) is made
    assert sorted(built) == ["make_family", "make_learner"]
    assert len(made.task_ids) == sum(map(len, (made.split.train, made.split.validation, made.split.heldout)))
    other = plan(config.model_copy(update={"seed": 1235}))
    assert not np.array_equal(other.split.heldout, made.split.heldout)


def test_mistakes_in_python_are_those_of_the_command_line():
    with pytest.raises(ConfigError, match=r"unknown key 'tf_nembd' \(did you mean 'tf_n_embd'\?\)"):
        ModelConfig(tf_nembd=3)
    with pytest.raises(ConfigError) as caught:
        Config(env={"n_task": 0, "kwargs": {"size": float("nan")}}, seed=-1)
    assert [p.paths for p in caught.value.problems] == [
        (("env", "kwargs", "size"),),
        (("env", "n_task"),),
        (("seed",),),
    ]


def test_what_one_wrong_parameter_leaves_is_tried_with_the_others():
    """No mistake follows from another one: the learner is not tried with defaults that nobody asked for."""
    overrides = [(f"algorithm.learner_kwargs.{key}", value) for key, value in (("learning_rate", ".nan"),)]
    with pytest.raises(ConfigError) as caught:
        load_config(Request(overrides=overrides))
    assert len(caught.value.problems) == 1
    wrong = [*overrides, ("algorithm.learner_kwargs.n_stepz", "3")]
    with pytest.raises(ConfigError, match=r"n_stepz.*did you mean 'n_steps'") as caught:
        load_config(Request(overrides=wrong))
    assert len(caught.value.problems) == 2


def test_what_has_no_effect_is_refused_where_it_is_asked_for_but_read_where_it_is_stored():
    """Runs of earlier versions may have such settings."""
    for key, value in (("kept_tokens", 5), ("memory_steps", 5), ("recent_steps", 300)):
        assert getattr(Config.model_validate({"model": {key: value}}).model, key) == value
        with pytest.raises(ConfigError, match=f"^--model.{key}: .*(no effect|alone|nothing leaves)"):
            load_config(Request(overrides=[(f"model.{key}", str(value))]))
    own = [("model.model", "mine:Own"), ("model.memory_tokens", "4"), ("model.kept_tokens", "4")]
    assert load_config(Request(overrides=own), own=False).model.memory_tokens == 4


def test_where_nothing_is_compared_settings_need_fit_the_model_alone(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("{model: {model: AD, kept_tokens: 5}, comparison: {methods: [AD, GistAD]}}")
    request = Request(files=(file,))
    assert load_config(request).model.kept_tokens == 5
    with pytest.raises(ConfigError, match=r"own.yaml:1: .*kept_tokens has no effect without segments"):
        load_config(request, compares=False)
    file.write_text("{model: {model: GistAD, segment_every: 4}}")
    assert load_config(request, compares=False).model.segment_every == 4
    with pytest.raises(ConfigError, match="segment_every has no effect with segments none"):
        load_config(request)
