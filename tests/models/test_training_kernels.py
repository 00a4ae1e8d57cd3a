"""Compiled attention and gelu: the functions that PyTorch computes, repeatable bit for bit."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F

from compressed_ad.models import MODEL, fused, vector_code
from compressed_ad.models.transformer import Rotation, rotate, visible
from compressed_ad.training.loop import gradient
from tests.models.test_models import batch, config

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 40))


def drawn(shape: tuple[int, int, int, int], seed: int) -> tuple[Tensor, Rotation, Tensor]:
    """Queries, keys and values (B, L, 3, H, D), a rotation, and a gradient of the result."""
    n_batch, length, n_head, width = shape
    random = torch.Generator().manual_seed(seed)
    angle = torch.arange(length)[:, None] / 10.0 ** torch.arange(width // 2)
    qkv = 2 * torch.randn((n_batch, length, 3, n_head, width), generator=random)
    return qkv, (angle.cos(), angle.sin()), torch.randn((n_batch, length, n_head, width), generator=random)


def plain(qkv: Tensor, rotation: Rotation | None, until: Tensor | None = None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if rotation is not None:
        q, k = rotate(q, *rotation), rotate(k, *rotation)
    mask = None if until is None else visible(until)[:, None]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2)


def drawn_until(shape: tuple[int, ...], seed: int) -> Tensor:
    """The last query that may see each token: soon, or never again after a border, or all."""
    n_batch, length = shape[:2]
    random = torch.Generator().manual_seed(seed)
    place = torch.arange(length).expand(n_batch, length)
    stays = torch.rand((n_batch, length), generator=random) < 0.1
    return torch.where(stays, length, place + torch.randint(0, 20, place.shape, generator=random))


def with_gradient(
    function: Callable[..., Tensor], x: Tensor, dy: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x, *rest)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


@given(SHAPES, st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=80, deadline=None)  # the first example may compile
def test_attention_is_that_of_float64(
    shape: tuple[int, int, int, int], rotary: bool, forgets: bool, seed: int
) -> None:
    qkv, rotation, dy = drawn(shape, seed)
    wide = [x.double() for x in rotation]
    rotary = rotary and shape[-1] % 2 == 0  # an odd number has no other to turn with
    until = drawn_until(shape, seed) if forgets else None
    exact = with_gradient(plain, qkv.double(), dy.double(), (wide[0], wide[1]) if rotary else None, until)
    found = with_gradient(fused.attention, qkv, dy, rotation if rotary else None, until)
    # Rounding errors (6e-8) are in proportion to what is added up, which may cancel. These are its bounds:
    longest = qkv.norm(dim=-1).max()
    bound = 3e-7 * (1 + longest**2 / qkv.shape[-1] ** 0.5)
    for own, expected, size in zip(found, exact, (longest, dy.norm(dim=-1).max()), strict=True):
        assert bool((own - expected).abs().max() <= bound * size)


@pytest.mark.parametrize("shape", [(2, 400, 2, 16), (1, 257, 1, 24)])
def test_long_contexts_are_as_near_to_float64_as_those_of_pytorch(shape: tuple[int, int, int, int]) -> None:
    qkv, rotation, dy = drawn(shape, 0)
    exact = with_gradient(plain, qkv.double(), dy.double(), tuple(x.double() for x in rotation))
    own, theirs = (with_gradient(f, qkv, dy, rotation) for f in (fused.attention, plain))
    for a, b, e in zip(own, theirs, exact, strict=True):
        assert (a - e).abs().max() < 4 * (b - e).abs().max()


@given(st.integers(1, 200), st.floats(0.1, 100), st.integers(0, 99))
@settings(deadline=None)
def test_gelu_is_that_of_float64(n: int, scale: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x, dy = scale * torch.randn(n, generator=random), torch.randn(n, generator=random)
    exact = with_gradient(lambda x: F.gelu(x, approximate="tanh"), x.double(), dy.double())
    square = torch.stack([x, -x])
    torch.testing.assert_close(fused.gelu(square.T), fused.gelu(square).T, rtol=0, atol=0)
    for own, expected in zip(with_gradient(fused.gelu, x, dy), exact, strict=True):
        torch.testing.assert_close(own.double(), expected, rtol=2e-6, atol=1e-6)


def test_extreme_inputs() -> None:
    big = torch.tensor([-1e9, -1e4, -90.0, 0.0, 90.0, 1e4])
    y, slope = with_gradient(fused.gelu, big, torch.ones(6))
    torch.testing.assert_close(y, torch.relu(big))
    torch.testing.assert_close(slope, torch.tensor([0.0, 0, 0, 0.5, 1, 1]))
    # Scores of 1e4 apart: each query sees the one key that is its own.
    qkv = torch.zeros(1, 40, 3, 1, 64)
    qkv[0, range(40), 0, 0, range(40)] = qkv[0, range(40), 1, 0, range(40)] = 300.0
    qkv[0, :, 2, 0, 0] = torch.arange(40.0)
    torch.testing.assert_close(fused.attention(qkv, None)[0, :, 0, 0], torch.arange(40.0))
    # What comes later may be as large as it likes.
    qkv, rotation, dy = drawn((1, 50, 1, 8), 0)
    qkv[0, 20:, 1] *= 1e4
    for own, expected in zip(
        with_gradient(fused.attention, qkv, dy, rotation),
        with_gradient(plain, qkv, dy, rotation),
        strict=True,
    ):
        torch.testing.assert_close(own[:, :20], expected[:, :20], rtol=1e-4, atol=1e-4)
    nothing = torch.zeros(0, 40, 3, 1, 64, requires_grad=True)
    fused.gelu(fused.attention(nothing, None)).sum().backward()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_nan_is_not_hidden(which: int) -> None:
    qkv, rotation, _ = drawn((1, 50, 2, 8), 0)
    qkv[0, 20, which, 1, 3] = torch.nan
    y = fused.attention(qkv, rotation)
    assert torch.isfinite(y[:, :, 0]).all() and y[0, 20, 1].isnan().any()
    assert fused.gelu(torch.tensor([1.0, torch.nan]))[1].isnan()


def moved(x: Tensor, random: np.random.Generator) -> Tensor:
    """``x`` elsewhere in memory, at any distance from a cache line."""
    room = torch.empty(x.numel() + 64)
    at = int(random.integers(64))
    room[at : at + x.numel()] = x.flatten()
    return room[at : at + x.numel()].view(x.shape)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (2, 37, 3, 6), (2, 70, 2, 16), (1, 129, 1, 24), (3, 8, 20, 32)]
)
def test_the_same_inputs_give_the_same_bits_wherever_they_lie(shape: tuple[int, int, int, int]) -> None:
    random = np.random.default_rng(0)
    qkv, (cos, sin), dy = drawn(shape, 0)
    first = with_gradient(fused.attention, qkv, dy, (cos, sin))
    gelus = with_gradient(fused.gelu, dy, dy)
    keep = []
    for _ in range(25):
        keep.append(torch.empty(int(random.integers(1, 5000))))  # so that results lie elsewhere, too
        again = with_gradient(
            fused.attention, moved(qkv, random), moved(dy, random), (moved(cos, random), moved(sin, random))
        )
        assert all(map(torch.equal, first, again))
        assert all(map(torch.equal, gelus, with_gradient(fused.gelu, moved(dy, random), moved(dy, random))))


def test_threads_change_nothing() -> None:
    qkv, rotation, dy = drawn((2, 50, 3, 16), 0)
    n_thread = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = with_gradient(fused.attention, qkv, dy, rotation)
        torch.set_num_threads(4)
        assert all(map(torch.equal, one, with_gradient(fused.attention, qkv, dy, rotation)))
    finally:
        torch.set_num_threads(n_thread)


NARROW = """
import llvmlite.binding as llvm
true = llvm.get_host_cpu_features
llvm.get_host_cpu_features = lambda: {features}
import compressed_ad.models.vector_code
llvm.get_host_cpu_features = true
import torch
from compressed_ad.models import fused, vector_code
from tests.models import test_training_kernels as t
assert vector_code.WIDTH == {width}
for shape in [(1, 5, 1, 2), (2, 70, 2, 24), (1, 33, 3, 16)]:
    qkv, rotation, dy = t.drawn(shape, 0)
    exact = t.with_gradient(t.plain, qkv.double(), dy.double(), tuple(x.double() for x in rotation))
    for own, expected in zip(t.with_gradient(fused.attention, qkv, dy, rotation), exact):
        torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-5)
from tests.models import test_playing_kernels as p
with torch.no_grad():
    made, x, lengths = p.transformer_of(2, 14, 1, 33), torch.randn(9, 33, 28), torch.arange(9)
    found, cache = p.played(made, x, lengths, 20)
    exact = made.double()(x.double())[torch.arange(9)[:, None], lengths[:, None] + torch.arange(13)]
assert cache.weights is not None
torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize(("features", "width"), [({"avx2": True}, 8), ({}, 4)])
def test_processors_with_narrower_vectors(features: dict[str, bool], width: int) -> None:
    code = NARROW.format(features=features, width=width)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def trained(name: str, **changes: Any) -> tuple[list[float], list[Tensor]]:
    """Losses and weights of three gradient steps."""
    torch.manual_seed(0)
    asked = config(model=name, batch_size=4, **changes)
    model = MODEL[name](asked).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(float(gradient(model, model.loss, batch(4, 20), asked)[0]))
        optimiser.step()
        optimiser.zero_grad()
    return losses, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["AD", "CompressedAD"])
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_training_is_the_same_with_pytorch_alone(
    name: str, position: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = trained(name, position=position)
    monkeypatch.setattr(fused, "_Attention", None)
    monkeypatch.setattr(fused, "_Gelu", None)
    with pytest.raises(AttributeError):
        trained(name, position=position)
    theirs = trained(name, position=position, kernels=False)
    assert own[0] == pytest.approx(theirs[0], rel=1e-5)
    for a, b in zip(own[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "gelu"),
    [
        ("MarkedAttentionAD", {}, True),
        ("AD", {"attention_dropout": 0.1}, True),
        ("AD", {"precision": "bfloat16"}, False),
    ],
)
def test_what_the_kernels_cannot_do_is_left_to_pytorch(
    name: str, changes: dict[str, Any], gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_Attention", None)
    if not gelu:
        monkeypatch.setattr(fused, "_Gelu", None)
    assert np.isfinite(trained(name, **changes)[0]).all()


def test_kernels_are_for_float32_on_a_cpu_outside_of_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.usable(torch.empty(2))
    assert not fused.usable(torch.empty(2, device="meta")) and not fused.usable(torch.empty(2).double())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fused.usable(torch.empty(2))


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, requires_grad=True)
    (slope,) = torch.autograd.grad((fused.gelu(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_windows_without_gradients_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODEL["AD"](config(model="AD")).eval()
    monkeypatch.setattr(fused, "_Attention", None)
    monkeypatch.setattr(fused, "_Gelu", None)
    with torch.no_grad():
        model(batch(2, 10).tokens)


def test_cached_code_does_not_outlive_files_that_make_vector_code_for_it(tmp_path: Path) -> None:
    file, names = tmp_path / "vectors.py", set()
    for text in ("a", "b"):
        file.write_text(text)

        def kernel() -> int:
            return 1

        vector_code.compiled(str(file))(kernel)
        names.add(kernel.__qualname__)
    assert len(names) == 2
