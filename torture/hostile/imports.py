"""Files of other programs with foreign or absurd content."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np

from compressed_ad.tasks.gridworld import Darkroom
from compressed_ad.tasks.replay import play
from torture.hostile.case import CANARY, CASES, Case, Evil
from torture.hostile.histories import Edit, dataset, link, put
from torture.stages import Words

THREE = {"0": 0, "1": 1, "2": 2}


def recorded(
    plays: Mapping[str, int] = THREE, t: int = 40, s: int = 2, optimal: bool = False
) -> Callable[[h5py.File], None]:
    """Fills a file with groups by name, each with a task played at random, or by an optimal policy."""

    def fill(file: h5py.File) -> None:
        family, draw = Darkroom(9, 20), np.random.default_rng(0)
        for name, task in plays.items():
            tasks = np.repeat(family.tasks()[task][None], s, 0)
            actions = draw.integers(0, 5, (s, t))
            if optimal:
                env = family.make(tasks, np.zeros(s, int))
                obs = env.reset()
                for k in range(t):
                    actions[:, k] = family.optimal_action(tasks, obs, np.zeros(s))
                    obs = env.step(actions[:, k]).obs
            played = play(family, tasks, actions, 0)
            group = file.create_group(name)
            arrays = {key: getattr(played, key) for key in ("states", "rewards", "next_states")}
            for key, array in {**arrays, "actions": actions, "dones": played.episode_end}.items():
                group[key] = np.asarray(array).swapaxes(0, 1)

    return fill


def importing(file: str, layout: str) -> Words:
    split = ["--heldout", "2", "--validation", "1"]
    return ["import", file, "--layout", layout, "--family", "darkroom", *split]


def imported(
    name: str, *edits: Edit, names: tuple[str, ...] = ("0", "1", "2"), words: Words = (), fine: str = ""
) -> None:
    def make(d: Path) -> None:
        with h5py.File(d / "foreign.h5", "w") as file:
            recorded({name: k for k, name in enumerate(names)})(file)
            for edit in edits:
                edit(file, d)

    room = ["--env.kwargs", "{size: 9, horizon: 20}", "--source", "X", "--out", "imported"]
    command = [*importing("foreign.h5", "ancestor"), *room, *map(str, words)]
    CASES.append(Case("import", name, make, commands=lambda d: [command], fine=fine))


imported("a good file", fine="it is sound")
for other in ("00", "٣", "-1", "99999999999999999999", "1e0", " 1"):
    imported(f"a fourth group {other!r}", names=("0", "1", "2", other))
imported("hard link: a held-out task is a training task", link("2", "0"))
imported("soft link in a circle", link("0/rewards", h5py.SoftLink("/0/rewards")))
imported("external link", link("0", h5py.ExternalLink("/etc/passwd", "/")))
imported("absurd shape", dataset("0/rewards", shape=(1 << 30, 1 << 20), chunks=(1 << 12, 1), dtype="f4"))
imported(
    "references",
    lambda f, d: put("0/rewards", np.array([f.ref] * 4, dtype=h5py.ref_dtype), dtype=h5py.ref_dtype)(f, d),
)
imported("actions of 2^63", put("0/actions", np.full((40, 2), 2**63 + 5, "u8")))
imported("actions 7 of 5", put("0/actions", np.full((40, 2), 7)))
imported("actions are fractions", put("0/actions", np.full((40, 2), 1.5)))
imported("states 300", put("0/states", np.full((40, 2, 2), 300)))
imported("rewards NaN", put("0/rewards", np.full((40, 2), np.nan)))
imported("rewards 1e39", put("0/rewards", np.full((40, 2), 1e39)))
imported("rewards one number", put("0/rewards", 1.0))
for value in (3.0, -np.inf, -0.5):
    imported(
        f"probabilities {value}",
        lambda f, d, v=value: f["0"].__setitem__("action_probs", np.full((40, 2), v)),
    )
imported(
    "nothing in it",
    *(put(f"0/{n}", np.zeros((0, 2))) for n in ("states", "next_states", "actions", "rewards", "dones")),
)
imported("arrays of two lengths", put("0/rewards", np.zeros((39, 2))))
imported("no rewards", lambda f, d: f["0"].__delitem__("rewards"))
for words in (
    ("--source", "../../../escape"),
    ("--heldout", "1,2"),
    ("--heldout", "7"),
    ("--task-ids", "0,0,2"),
    ("--task-ids", "-1,0,2"),
):
    imported(" ".join(words), words=words)


def npz(name: str, make: Callable[[Path], object]) -> None:
    commands: list[Words] = [[*importing("x.npz", "npz"), "--source", "X", "--out", "imported"]]
    CASES.append(Case("import", f"npz: {name}", lambda d: make(d / "x.npz"), commands=lambda d: commands))


COLUMNS = [f"{k}/{name}" for k in range(3) for name in ("states", "actions", "rewards", "next_states")]


def four_tebibytes(path: Path) -> None:
    shape = {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 20)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in COLUMNS:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, shape)
                member.write(b"\0" * 1000)


npz(
    "pickled objects",
    lambda p: np.savez(p, **{c: np.array([Evil(p.parent / CANARY)], dtype=object) for c in COLUMNS}),
)
npz("arrays of 4 TiB", four_tebibytes)
npz("no archive", lambda p: p.write_bytes(b"PK\x03\x04nonsense"))
