"""A study file: variants x runs x families, the comparisons that are asked for, and every cell's settings.

    question: Does marking help?
    baseline: AD
    runs: 10                       # or a number for each family
    families:
      darkroom: {env: darkroom}    # a shipped section by name, or settings
      large: {config: benchmark/darkroom_large}    # a whole configuration by name or file, and settings
    variants:
      AD: {model: {model: AD}}
      CompressedAD: {}
      big: {model: {tf_n_layer: 4}, runs: {large: 3}}    # in this family alone, and so many
      prompted: {weights: CompressedAD, evaluation: {marks: prompt}}

A cell's settings come in layers: the preset, ``settings``, the family, the variant, what the variant says
``in`` this family, and the command line. Every run has its own learning histories and its own split; the
variants of a run share both. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Le
from pydantic import Field, Strict

from compressed_ad.errors import ConfigError, nearest
from compressed_ad.report.measures import MEASURES
from compressed_ad.runs import layers, yaml_file
from compressed_ad.runs.config import origin, valid_part, validated_config
from compressed_ad.runs.directory import ELSEWHERE
from compressed_ad.runs.job import playing
from compressed_ad.runs.settings import Config
from compressed_ad.runs.yaml_file import Leaves
from compressed_ad.settings import Count, Positive, Settings, Whole

SMALL_RUNS, SMALL_EPISODES = 2, 10
MAX_RUNS = 10_000
_Runs = Annotated[Count, Strict(), Le(MAX_RUNS)]


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
    runs: Mapping[str, Mapping[str, int]]  # by family, of each variant that it has
    cells: tuple[Cell, ...]  # runs outermost, so that every comparison fills evenly
    small: bool = False  # shrunk: shows that everything works, not what is true
    options: tuple[str, ...] = ()  # what makes it another study than its file describes: "--runs 3", ...

    @property
    def folder(self) -> str:
        """Of what it writes; a part of a study, or one with other settings, has a folder of its own."""
        words = [option.lstrip("-").replace(" ", "=", 1) for option in self.options]
        named = "-".join([self.name, *words])
        plain = re.sub(r"[^\w.=+-]", "_", named.replace(",", "+"))[:80]
        unique = plain == named.replace(",", "+")
        return plain if unique else f"{plain}-{hashlib.sha256(named.encode()).hexdigest()[:6]}"

    @property
    def note(self) -> str:
        """A sentence or two where this is not the whole study; else empty."""
        if not self.options:
            return ""
        what = f"This is not the study {self.name} as its file describes it: {', '.join(self.options)}."
        tiny = (
            " Histories and models are tiny: this shows that everything works, and its numbers mean nothing."
        )
        return what + tiny * self.small


class StudyFile(Settings):
    """What a study file may say; the settings in it are validated cell by cell."""

    question: str = ""  # what the study asks
    preset: str = "default"  # below everything
    settings: dict[str, Any] = Field(default_factory=dict)  # of every cell
    families: dict[str, dict[str, Any] | None] = Field(default_factory=dict)  # settings by a chosen name
    variants: dict[str, dict[str, Any] | None] = Field(default_factory=dict)  # what is compared
    baseline: str | None = None  # the variant that the others are compared with; None: the first
    compare: tuple[tuple[str, str], ...] = ()  # further comparisons, pairs [one, other]: other minus one
    curves: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # variants of other size or context
    runs: _Runs | dict[str, _Runs] = 3  # of each variant, a number or one for each family
    first_seed: Whole = 0  # seed of the first run
    metric: str = "final"  # the measure that the verdicts rest on
    spread: Positive | None = None  # assumed standard deviation of a paired difference between runs


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
    leaves = {p: leaf for p, leaf in yaml_file.read(path).items() if len(p) > 1 or leaf[0] is not None}
    file, invalid = valid_part(StudyFile, layers.nested(leaves))
    mistakes = _Mistakes(path, leaves)
    mistakes.found.extend(f"{mistakes.where(*problem.paths[0])}: {problem}" for problem in invalid)
    for section in ("families", "variants"):
        names, place = getattr(file, section), mistakes.where(section)
        if not names:
            mistakes.found.append(f"{place}: {section} must name at least one, with its settings")
            mistakes.stop()
        for name in [name for name in names if not name.isprintable()]:
            mistakes.found.append(f"{place}: {section} must have names of one line, not {name!r}")
    known_families, known = list(file.families), list(file.variants)
    baseline = known[0] if file.baseline is None else file.baseline
    mistakes.unknown(f"{mistakes.where('baseline')}: baseline", [baseline], known)
    mistakes.unknown(f"{mistakes.where('metric')}: metric", [file.metric], list(MEASURES))
    mistakes.unknown("--families", families, known_families)
    mistakes.unknown("--variants", variants, known)
    _not_for_studies(mistakes, overrides)
    plays = _plays(file, mistakes)
    planned = _planned(file, plays, mistakes)
    mistakes.unknown(f"{mistakes.where('compare')}: compare", chain.from_iterable(file.compare), known)
    for one, other in file.compare:
        if {one, other} <= {*known} and not any(one in of and other in of for of in planned.values()):
            place = mistakes.where("compare")
            mistakes.found.append(f"{place}: compare: {one} and {other} have no family in common")
    mistakes.unknown(f"{mistakes.where('curves')}: curves", chain(*file.curves.values()), known)
    mistakes.stop()  # what is wrong with settings costs more to find
    chosen_families = [name for name in known_families if name in (families or known_families)]
    wanted = {*(variants or known), baseline}
    wanted |= {plays.get(name, name) for name in wanted}
    chosen = [name for name in known if name in wanted]
    has = {f: {v: n for v, n in planned[f].items() if v in chosen} for f in chosen_families}
    counted = {
        f: {v: (SMALL_RUNS if small else n) if runs is None else runs for v, n in of.items()}
        for f, of in has.items()
    }
    if not any(counted.values()):
        places = {v: [f for f in known_families if v in planned[f]] for v in chosen}
        only = "; ".join(f"{v} only on {', '.join(on)}" for v, on in places.items())
        raise ConfigError([f"{path}: nothing to run on {', '.join(chosen_families)}: {only}"])
    configs = _configs(counted, plays, mistakes, file.preset, overrides, small=small, own=own)
    cells = [
        _cell(configs, family, variant, plays.get(variant, variant), run, file.first_seed + run)
        for run in range(max(chain.from_iterable(of.values() for of in counted.values())))
        for family, of in counted.items()
        for variant, n in of.items()
        if run < n
    ]
    curves = {curve: tuple(v for v in chosen if v in names) for curve, names in file.curves.items()}
    options = ["--small"] * small
    if runs is not None and counted != has:
        options.append(f"--runs {runs}")
    if chosen_families != known_families:
        options.append(f"--families {','.join(chosen_families)}")
    if chosen != known:
        options.append(f"--variants {','.join(name for name in known if name in variants)}")
    options += [f"--{key} {text}" for key, text in overrides if key not in ELSEWHERE]
    pairs = dict.fromkeys([*((baseline, name) for name in known), *file.compare])
    return Study(
        name=path.stem,
        path=path,
        question=file.question.strip(),
        baseline=baseline,
        comparisons=tuple(p for p in pairs if set(p) <= set(chosen) and p[0] != p[1]),
        metric=file.metric,
        spread=file.spread,
        families=tuple(chosen_families),
        variants=tuple(chosen),
        curves={curve: names for curve, names in curves.items() if names},
        runs=counted,
        cells=tuple(cells),
        small=small,
        options=tuple(options),
    )


@dataclass(frozen=True)
class _Mistakes:
    """What is wrong with a study file, each with its place."""

    path: Path
    leaves: Leaves
    found: list[str] = field(default_factory=list)

    def where(self, *key: str) -> str:
        return origin(self.leaves, [key], str(self.path))

    def unknown(self, place: str, names: Iterable[Any], known: Sequence[str]) -> None:
        """Note the ``names`` that are not ``known``."""
        for name in names:
            if name not in known:
                hint = f"{nearest(str(name), known)}; one of {', '.join(known)}"
                self.found.append(f"{place}: unknown {name!r}{hint}")

    def stop(self) -> None:
        """Raise ``ConfigError`` if there are any."""
        if self.found:
            raise ConfigError(dict.fromkeys(self.found))


def _not_for_studies(mistakes: _Mistakes, overrides: Sequence[tuple[str, str]]) -> None:
    """Note the settings that a study decides itself."""
    instead = {"seed": "its runs have first_seed and the seeds that follow", "comparison": "it has variants"}
    depths = {"settings": 1, "families": 2, "variants": 2}
    said = [(key.split("."), f"--{key}") for key, _ in overrides]
    for path, (_, where) in mistakes.leaves.items():
        depth = 4 if path[0] == "variants" and path[2:3] == ("in",) else depths.get(path[0], len(path))
        said.append((list(path[depth:]), where))
    for key, where in said:
        if key and key[0] in instead:
            mistakes.found.append(f"{where}: {key[0]} is no setting of a study: {instead[key[0]]}")


def _plays(file: StudyFile, mistakes: _Mistakes) -> dict[str, str]:
    """The variants that play the weights of another: which."""
    found = {name: str(of["weights"]) for name, of in file.variants.items() if of and "weights" in of}
    for name, other in found.items():
        place = mistakes.where("variants", name, "weights")
        mistakes.unknown(f"{place}: variants", [other], list(file.variants))
        strange = [p[0] for p in _settings(mistakes.leaves, "variants", name) if p[0] != "evaluation"]
        if strange:
            only = f"so it can only set evaluation, not {strange[0]}"
            mistakes.found.append(f"{place}: {name} plays the weights of {other}, {only}")
        if other in found:
            mistakes.found.append(f"{place}: {other} has no weights of its own")
    return found


def _planned(file: StudyFile, plays: Mapping[str, str], mistakes: _Mistakes) -> dict[str, dict[str, int]]:
    """How many runs, by family and variant that it has.

    A variant has its own, those of the variant whose weights it plays, or the study's.
    """
    families = list(file.families)
    place = f"{mistakes.where('runs')}: runs"
    counts = file.runs if isinstance(file.runs, dict) else dict.fromkeys(families, file.runs)
    mistakes.unknown(place, counts, families)
    for family in [family for family in families if family not in counts]:
        mistakes.found.append(f"{place} does not say how many for {family}")
    own: dict[str, dict[str, int]] = {}
    for name in [name for name, of in file.variants.items() if of and "runs" in of]:
        asked = (file.variants[name] or {})["runs"]
        own[name] = asked if isinstance(asked, dict) else dict.fromkeys(families, asked)
        place = f"{mistakes.where('variants', name, 'runs')}: runs of {name}"
        if not own[name]:
            mistakes.found.append(f"{place} must name at least one family")
        mistakes.unknown(place, own[name], families)
        for n in [n for n in own[name].values() if type(n) is not int or not 1 <= n <= MAX_RUNS]:
            mistakes.found.append(
                f"{place} must be a whole number between 1 and {MAX_RUNS}, or one for each family; got {n!r}"
            )
    of_variant = {name: own.get(name, own.get(plays.get(name, name), counts)) for name in file.variants}
    for name, settings in file.variants.items():
        inside = (settings or {}).get("in")
        place = f"{mistakes.where('variants', name, 'in')}: in of {name}"
        if not isinstance(inside, dict | None):
            mistakes.found.append(f"{place} must name families, with their settings; got {inside!r}")
        for family, of in inside.items() if isinstance(inside, dict) else ():
            if not isinstance(of, dict | None):
                mistakes.found.append(f"{place}: {family} must have settings; got {of!r}")
            if family not in families:
                mistakes.unknown(place, [family], families)
            elif family not in of_variant[name]:
                mistakes.found.append(f"{place}: it has no runs on {family}")
    planned = {
        family: {name: runs[family] for name, runs in of_variant.items() if family in runs}
        for family in families
    }
    # After another mistake it may be that one's consequence.
    for family in [family for family, of in planned.items() if not of and not mistakes.found]:
        mistakes.found.append(f"{mistakes.where('families', family)}: no variant has runs on {family}")
    return planned


def _settings(leaves: Leaves, *key: str) -> Leaves:
    """The settings under ``key``, without what else a variant says."""
    own = {p[len(key) :]: leaf for p, leaf in leaves.items() if p[: len(key)] == key}
    others = ("weights", "in", "runs") if key[0] == "variants" and len(key) == 2 else ()
    return {p: leaf for p, leaf in own.items() if p and p[0] not in others}


def _configs(
    counted: Mapping[str, Mapping[str, int]],
    plays: Mapping[str, str],
    mistakes: _Mistakes,
    preset: str,
    overrides: Sequence[tuple[str, str]],
    *,
    small: bool,
    own: bool,
) -> dict[tuple[str, str], Config]:
    """The settings of each family and variant in ``counted``, and of variants whose weights are played."""
    bottom = layers.request_leaves(layers.Request(preset))
    top = layers.override_leaves(overrides)
    if small:
        layers.merge(bottom, layers.read_file(layers.config_folder() / "study_small.yaml"))
    configs: dict[tuple[str, str], Config] = {}
    for family, of in counted.items():
        for variant in dict.fromkeys([*of, *(plays.get(name, name) for name in of)]):
            with layers.gathering(mistakes.found):
                layered = _layered(mistakes.leaves, bottom, family, variant, small)
                layers.merge(layered, top)
                configs[family, variant] = validated_config(layered, own=own, compares=False)
    mistakes.stop()
    return configs


def _layered(study: Leaves, bottom: Leaves, family: str, variant: str, small: bool) -> Leaves:
    """The settings of a cell, all layers of ``study`` over ``bottom``."""
    leaves, own = dict(bottom), ("variants", variant)
    for key in (("settings",), ("families", family), own, (*own, "in", family)):
        layer = _settings(study, *key)
        if named := layer.pop(("config",), None):
            layers.merge_config(leaves, Path(str(named[0])), f"{named[1]}: config")
        if small:  # what makes a study small goes over what makes it big
            layer = {p: leaf for p, leaf in layer.items() if p not in _SIZES}
        layers.merge(leaves, layers.resolve_sections(leaves, layer))
        if small:
            layers.merge(leaves, {p: leaf for p, leaf in bottom.items() if p in _SIZES})
    episodes, place = leaves.get(_EPISODES, (None, ""))
    if small and isinstance(episodes, int):  # a schedule must not be longer than the history
        leaves[_EPISODES] = (min(episodes, SMALL_EPISODES), place)
    return leaves


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
_EPISODES = ("algorithm", "learner_kwargs", "episodes")


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
