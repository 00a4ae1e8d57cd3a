"""Cost of a model in floating-point operations, to compare context lengths at equal cost.

It counts the matrix products (2 operations per multiply-add) of the transformer's layers, 12 D^2 weights
each, and of attention, 4 D for the score and weighted value of one query and token. Embeddings, norms and
heads are left out: at width 64 and two layers they are less than 5 %, all ``token_inputs`` included. The
backward pass counts twice the forward one (Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence

from compressed_ad.models.settings import Architecture, ModelConfig


def _products(model: Architecture, tokens: float, pairs: float) -> float:
    """FLOPs of all layers for so many ``tokens``, whose queries see so many keys, ``pairs``, in all."""
    return 4 * model.tf_n_embd * model.tf_n_layer * (6 * model.tf_n_embd * tokens + pairs)


def _anew(model: Architecture, tokens: float, pairs: float) -> float:
    """FLOPs of computing keys and values anew: of the last layer only queries, keys and values."""
    width, before = model.tf_n_embd, model.tf_n_layer - 1
    return 4 * width * before * (6 * width * tokens + pairs) + 6 * width**2 * tokens


def _update(model: Architecture) -> float:
    """FLOPs of the gate of a recurrent memory, and of what it lets in."""
    return 6 * model.tf_n_embd**2 * model.memory_tokens


def _passes(lengths: Sequence[int]) -> tuple[float, float]:
    """Tokens and pairs of causal passes of these lengths."""
    return sum(lengths), sum(length**2 / 2 for length in lengths)


def cache_bytes(model: Architecture, visible: float | None = None) -> float:
    """Bytes of one context's keys and values: of all that it has room for, or of ``visible`` tokens."""
    room = model.memory_tokens + model.memory_steps if model.recurrent else model.n_transit
    return 8 * model.tf_n_embd * model.tf_n_layer * (room if visible is None else visible)


def training_flops(config: ModelConfig, visible: float | None = None) -> float:
    """FLOPs of all gradient steps: every token forward and backward, causal attention at its mean length.

    ``visible`` is how many tokens a query sees on average, where steps leave the context. A recurrent memory
    is read with each chunk of steps, and written with all but the last.
    """
    context, chunk, memory = config.n_transit, config.memory_steps, config.memory_tokens
    if config.recurrent:
        whole, rest = divmod(context - 1, chunk)
        passes = _passes([2 * memory + chunk] * whole + [memory + rest + 1])
        forward = _products(config, *passes) + whole * _update(config)
    else:
        forward = _products(config, context, context * (context / 2 if visible is None else visible))
    return 3 * forward * config.steps * config.batch_size


def action_flops(model: Architecture, visible: float | None = None) -> float:
    """FLOPs of one in-context step with a cache, on average over a long evaluation.

    Where steps leave the context, a step attends to ``visible`` tokens, and nothing is computed again.

    When a context of ``n_transit`` steps is full, its older half is dropped and the rest computed anew: for
    each step a second pass of the weights. Attention is over 3/4 of ``n_transit`` for the step itself and 1/4
    for its share of what is computed anew.

    A recurrent memory is read with each step, and once in ``memory_steps`` written and computed anew.
    """
    context = model.n_transit
    if model.recurrent:
        chunk, memory = model.memory_steps, model.memory_tokens
        written = _products(model, *_passes([2 * memory + chunk])) + _update(model)
        written += _anew(model, *_passes([memory]))
        return _products(model, 1, memory + (chunk + 1) / 2) + written / chunk
    if visible is not None:
        return _products(model, 1, visible)
    return _products(model, 1, 3 / 4 * context) + _anew(model, 1, context / 4)
