"""A study file: variants x runs x families, the comparisons that are asked for, and every cell's settings.

    question: Does marking help?
    baseline: AD
    runs: 10                       # or a number for each family
    families:
      darkroom: {env: darkroom}    # a shipped section by name, or settings
    variants:
      AD: {model: {model: AD}}
      CompressedAD: {}
      prompted: {weights: CompressedAD, evaluation: {marks: prompt}}

A cell's settings come in layers: the preset, ``settings``, the family, the variant, what the variant says
``in`` this family, and the command line. Every run has its own learning histories and its own split; the
variants of a run share both. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from compressed_ad.errors import ConfigError, nearest
from compressed_ad.report.measures import MEASURES
from compressed_ad.runs import layers, yaml_file
from compressed_ad.runs.config import validated_config
from compressed_ad.runs.job import playing
from compressed_ad.runs.settings import Config
from compressed_ad.runs.yaml_file import Leaves

KEYS = {
    "question": "what the study asks",
    "preset": "the preset below everything (default: default)",
    "settings": "settings of every cell",
    "families": "task families: a name of your choice and its settings",
    "variants": "what is compared: a name of your choice and its settings",
    "baseline": "the variant that the others are compared with (default: the first)",
    "compare": "further comparisons, pairs [one, other]: other minus one",
    "curves": "cost curves: a name of your choice and variants that differ in their model's size or context",
    "runs": "runs of each variant, a number or one for each family",
    "first_seed": "seed of the first run (default: 0)",
    "metric": "the measure that the verdicts rest on (default: final)",
    "spread": "standard deviation of a paired difference between runs that was assumed when planning",
}
SMALL_RUNS = 2


@dataclass(frozen=True)
class Cell:
    """One variant, one run, one family."""

    family: str
    variant: str
    run: int
    data: Config  # what is collected: its seed is that of the histories and the split
    trained: Config  # the run whose weights play
    played: Config  # how they play: ``trained`` but for the evaluation, unless ``weights`` names another

    @property
    def data_key(self) -> str:
        """Names the histories: the same for cells that share them."""
        content = self.data.model_dump(mode="json", include={"env", "algorithm", "seed"})
        for section, keys in (("env", ("training_tasks", "name")), ("algorithm", ("n_process", "timeout"))):
            for key in keys:
                content[section].pop(key)
        return _digest({**content, "split_seed": self.data.split_seed})

    @property
    def training_key(self) -> str:
        """Names the trained run: the same for cells that play the same weights."""
        content = self.trained.model_dump(mode="json", include={"marker", "model", "seed"})
        tasks = self.trained.env.training_tasks
        return _digest({**content, "data": self.data_key, "tasks": tasks, "playing": playing(self.trained)})

    @property
    def playing_key(self) -> str:
        """Names the evaluation of the trained run."""
        return _digest({**self.played.evaluation.model_dump(mode="json"), **playing(self.played)})


@dataclass(frozen=True)
class Study:
    name: str
    path: Path
    question: str
    baseline: str
    comparisons: tuple[tuple[str, str], ...]  # (one, other): other minus one
    metric: str
    spread: float | None
    families: tuple[str, ...]
    variants: tuple[str, ...]
    curves: Mapping[str, tuple[str, ...]]  # what cost is compared with result along: variants by curve
    runs: Mapping[str, int]  # by family
    cells: tuple[Cell, ...]  # runs outermost, so that every comparison fills evenly
    small: bool = False  # shrunk: shows that everything works, not what is true


def load_study(
    path: Path,
    *,
    runs: int | None = None,
    families: Sequence[str] = (),
    variants: Sequence[str] = (),
    overrides: Sequence[tuple[str, str]] = (),
    small: bool = False,
    own: bool = True,
) -> Study:
    """The study of ``path``; ``ConfigError`` lists every mistake with its place.

    ``runs``, ``families`` and ``variants`` leave out part of it; the baseline and the variants whose weights
    are played stay. ``overrides`` are (dotted key, YAML text) pairs over all cells. ``small`` shrinks
    histories, models and evaluations to a fraction. Without ``own``, the user's own code is not imported.
    """
    tree = _Tree(path)
    known_families, known = tree.names("families"), tree.names("variants")
    baseline = tree.value("baseline", known[0])
    problems: list[str] = []

    def attempt(read: Callable[[], Any], otherwise: Any = None) -> Any:
        """What ``read`` gives; ``otherwise`` if it finds mistakes, which are told together."""
        try:
            return read()
        except ConfigError as error:
            problems.extend(error.problems)
            return otherwise

    attempt(tree.check_keys)
    attempt(lambda: tree.among("baseline", baseline, known))
    weights = {name: attempt(partial(_weights, tree, name, known), name) for name in known}
    for name in families:
        attempt(partial(_among, "--families", name, known_families))
    for name in variants:
        attempt(partial(_among, "--variants", name, known))
    chosen_families = [name for name in known_families if name in (families or known_families)]
    wanted = {*(variants or known), baseline}
    wanted |= {weights[name] for name in wanted if name in weights}
    chosen = [name for name in known if name in wanted]
    counts = attempt(lambda: _runs(tree, known_families), {})
    if small or runs is not None:
        counts = dict.fromkeys(counts, SMALL_RUNS if runs is None else runs)
    first_seed, spread = (attempt(partial(_number, tree, key)) for key in ("first_seed", "spread"))
    metric = str(tree.value("metric", "final"))
    attempt(lambda: tree.among("metric", metric, list(MEASURES)))
    comparisons = attempt(lambda: _comparisons(tree, baseline, known, chosen), ())
    curves = attempt(lambda: _curves(tree, known, chosen), {})
    if problems:  # what is wrong with settings costs more to find
        raise ConfigError(dict.fromkeys(problems))
    bottom = layers.request_leaves(layers.Request(str(tree.value("preset", "default"))))
    top = layers.override_leaves(overrides)
    if small:
        layers.merge(bottom, layers.read_file(layers.config_folder() / "study_small.yaml"))
    configs: dict[tuple[str, str], Config] = {}
    for family in chosen_families:
        for variant in chosen:
            args = tree, bottom, top, family, variant, small, own
            if (config := attempt(partial(_config, *args))) is not None:
                configs[family, variant] = config
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    cells = [
        _cell(configs, family, variant, weights[variant], run, int(first_seed or 0) + run)
        for run in range(max(counts[family] for family in chosen_families))
        for family in chosen_families
        if run < counts[family]
        for variant in chosen
    ]
    return Study(
        name=path.stem,
        path=path,
        question=str(tree.value("question", "")).strip(),
        baseline=baseline,
        comparisons=comparisons,
        metric=metric,
        spread=spread,
        families=tuple(chosen_families),
        variants=tuple(chosen),
        curves=curves,
        runs={family: counts[family] for family in chosen_families},
        cells=tuple(cells),
        small=small,
    )


def _among(where: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ConfigError(f"{where}: unknown {name!r}{nearest(str(name), known)}; one of {', '.join(known)}")


class _Tree:
    """Reads parts of a study file, and knows where each was written."""

    def __init__(self, path: Path) -> None:
        self.path, self.leaves = path, yaml_file.read(path)
        if not self.leaves:
            raise ConfigError(f"{path}: an empty study; it needs families and variants")

    def check_keys(self) -> None:
        unknown = dict.fromkeys(p[0] for p in self.leaves if p[0] not in KEYS)
        if unknown:
            raise ConfigError(f"{self.where(k)}: unknown key {k!r}{nearest(k, KEYS)}" for k in unknown)

    def mistake(self, key: str, text: str) -> ConfigError:
        return ConfigError(f"{self.where(key)}: {text}")

    def among(self, key: str, name: str, known: Sequence[str]) -> None:
        _among(f"{self.where(key)}: {key}", name, known)

    def where(self, *key: str) -> str:
        return next((where for p, (_, where) in self.leaves.items() if p[: len(key)] == key), str(self.path))

    def value(self, key: str, default: Any) -> Any:
        nested = next((p for p in self.leaves if p[0] == key and len(p) > 1), None)
        if nested is not None:
            raise self.mistake(key, f"{key} must be one value, got keys ({nested[1]}, ...)")
        found = self.leaves.get((key,), (default, ""))[0]
        return default if found is None else found

    def names(self, section: str) -> list[str]:
        found = list(dict.fromkeys(p[1] for p in self.leaves if p[0] == section and len(p) > 1))
        if not found:
            raise self.mistake(section, f"{section} must name at least one, with its settings")
        if strange := [name for name in found if not str(name).isprintable()]:
            raise self.mistake(section, f"{section} must have names of one line, not {strange[0]!r}")
        return found

    def settings(self, *key: str) -> Leaves:
        """The settings under ``key``, without what is not a setting."""
        own = {p[len(key) :]: leaf for p, leaf in self.leaves.items() if p[: len(key)] == key}
        return {p: leaf for p, leaf in own.items() if p and p[0] not in ("weights", "in")}


def _weights(tree: _Tree, variant: str, known: Sequence[str]) -> str:
    """The variant whose weights ``variant`` plays."""
    leaf = ("variants", variant, "weights")
    if leaf not in tree.leaves:
        return variant
    name, where = str(tree.leaves[leaf][0]), tree.leaves[leaf][1]
    tree.among("variants", name, known)
    strange = [p[0] for p in tree.settings("variants", variant) if p[0] != "evaluation"]
    if strange:
        raise ConfigError(
            f"{where}: {variant} plays the weights of {name}, so it can only set evaluation, not {strange[0]}"
        )
    if ("variants", name, "weights") in tree.leaves:
        raise ConfigError(f"{where}: {name} has no weights of its own")
    return name


def _runs(tree: _Tree, families: Sequence[str]) -> dict[str, int]:
    given = {p[1]: value for p, (value, _) in tree.leaves.items() if p[0] == "runs" and len(p) == 2}
    given = given or dict.fromkeys(families, tree.value("runs", 3))
    for family, count in given.items():
        tree.among("runs", family, families)
        if not _at_least(1, count, int):
            raise tree.mistake("runs", f"runs must be whole numbers from 1 on: {count!r}")
    for family in families:
        if family not in given:
            raise tree.mistake("runs", f"runs does not say how many for {family}")
    return given


def _number(tree: _Tree, key: str) -> float | None:
    """``first_seed`` or ``spread``, None if it is not given."""
    value = tree.value(key, None)
    if value is None:
        return None
    if key == "first_seed" and not _at_least(0, value, int):
        raise tree.mistake(key, f"first_seed must be a whole number: {value!r}")
    if key == "spread" and not (_at_least(0, value, int | float) and value > 0):
        raise tree.mistake(key, f"spread must be a number above 0, got {value!r}")
    return float(value)


def _at_least(least: int, value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value >= least


def _comparisons(
    tree: _Tree, baseline: str, known: Sequence[str], chosen: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    pairs = [(baseline, name) for name in known]
    more = tree.value("compare", [])
    for pair in more if isinstance(more, list) else [more]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise tree.mistake("compare", f"compare must be pairs [one, other], got {pair!r}")
        for name in pair:
            tree.among("compare", name, known)
        pairs.append((pair[0], pair[1]))
    return tuple(p for p in dict.fromkeys(pairs) if set(p) <= set(chosen) and p[0] != p[1])


def _curves(tree: _Tree, known: Sequence[str], chosen: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, names in ((p[1:], value) for p, (value, _) in tree.leaves.items() if p[0] == "curves"):
        if len(name) != 1 or not isinstance(names, list):
            raise tree.mistake("curves", "curves must be a list of variants by name")
        for variant in names:
            tree.among("curves", variant, known)
        found[name[0]] = tuple(variant for variant in chosen if variant in names)
    return {name: names for name, names in found.items() if names}


def _config(
    tree: _Tree, bottom: Leaves, top: Leaves, family: str, variant: str, small: bool, tried: bool
) -> Config:
    leaves, own = dict(bottom), ("variants", variant)
    for key in (("settings",), ("families", family), own, (*own, "in", family)):
        layer = tree.settings(*key)
        if small:  # what makes a study small goes over what makes it big
            layer = {p: leaf for p, leaf in layer.items() if p not in _SIZES}
        layers.merge(leaves, layers.resolve_sections(leaves, layer))
        if small:
            layers.merge(leaves, {p: leaf for p, leaf in bottom.items() if p in _SIZES})
    layers.merge(leaves, top)
    return validated_config(leaves, own=tried)


_SIZES = {
    ("env", "n_task"),
    ("env", "validation"),
    ("env", "heldout"),
    ("algorithm", "n_stream"),
    ("algorithm", "n_timesteps"),
    *(("model", key) for key in ("tf_n_embd", "tf_n_layer", "steps", "validations", "n_transit")),
    *(("model", key) for key in ("validation_episodes", "validation_rollouts")),
    *(("evaluation", key) for key in ("episodes", "rollouts", "training_tasks", "imitation_windows")),
}
"""What ``small`` decides, whatever the study says."""


def _cell(
    configs: Mapping[tuple[str, str], Config], family: str, variant: str, weights: str, run: int, seed: int
) -> Cell:
    trained = configs[family, weights].model_copy(update={"seed": seed})
    played = trained.model_copy(update={"evaluation": configs[family, variant].evaluation})
    env = trained.env.model_copy(update={"training_tasks": None, "name": trained.env.short_name})
    data = trained.model_copy(update={"env": env})
    return Cell(family, variant, run, data, trained, played)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
