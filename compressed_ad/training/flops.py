"""Cost of a model in floating-point operations, to compare context lengths at equal cost.

It counts the matrix products (2 operations per multiply-add) of the transformer's layers, 12 D^2 weights
each, and of attention, 4 D for the score and weighted value of one query and token. Embeddings, norms and
heads are left out: at width 64 and two layers they are less than 5 %, all ``token_inputs`` included. The
backward pass counts twice the forward one (Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

from compressed_ad.models.settings import Architecture, ModelConfig


def cache_bytes(model: Architecture, visible: float | None = None) -> float:
    """Bytes of one context's keys and values: of ``n_transit`` tokens, or of the ``visible`` ones."""
    return 8 * model.tf_n_embd * model.tf_n_layer * (model.n_transit if visible is None else visible)


def training_flops(config: ModelConfig, visible: float | None = None) -> float:
    """FLOPs of all gradient steps: every token forward and backward, causal attention at its mean length.

    ``visible`` is how many tokens a query sees on average, where steps leave the context.
    """
    width, layers, context = config.tf_n_embd, config.tf_n_layer, config.n_transit
    token = 24 * width**2 * layers + 4 * width * layers * (context / 2 if visible is None else visible)
    return 3 * token * config.steps * config.batch_size * context


def action_flops(model: Architecture, visible: float | None = None) -> float:
    """FLOPs of one in-context step with a cache, on average over a long evaluation.

    Where steps leave the context, a step attends to ``visible`` tokens, and nothing is computed again.

    When a context of ``n_transit`` steps is full, its older half is dropped and the rest recomputed, of the
    last layer only queries, keys and values: for each step a second pass of the other layers' weights.
    Attention is over 3/4 of ``n_transit`` for the step itself and 1/4 for its share of the recomputation.
    """
    width, layers, context = model.tf_n_embd, model.tf_n_layer, model.n_transit
    if visible is not None:
        return 24 * width**2 * layers + 4 * width * layers * visible
    step = 24 * width**2 * layers + 4 * width * layers * 3 / 4 * context
    again = 24 * width**2 * (layers - 1) + 6 * width**2 + 4 * width * (layers - 1) * context / 4
    return step + again
