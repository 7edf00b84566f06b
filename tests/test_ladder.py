"""The ladder to GPT: attention from a plain average to model.py, each rung checked against the one below it.

Read it top to bottom. A rung is a function of a few lines; its test says that it equals the rung below, an
outside implementation, or numbers that others have printed (reference.json). x is (T, C) until batches come.
"""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ACTIVATIONS, GPT, Block, CausalSelfAttention, GPTConfig


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, torch.as_tensor(b), atol=atol, rtol=0)


def printed(a, b, digits=4):
    """a equals b, which was printed with so many digits."""
    close(a, b, atol=0.51 * 10**-digits)


@pytest.fixture
def x():
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def inputs(reference):
    return torch.tensor(reference["attention_ladder"]["inputs"])  # six words of three numbers


# -- rung 1: a position knows the past as the mean of it ---------------------------------------------------


def mean_by_loop(x):
    return torch.stack([x[: t + 1].mean(0) for t in range(len(x))])  # (T, C)


# -- rung 2: the same, as one product with a triangular matrix ---------------------------------------------


def mean_by_matrix(x):
    ones = torch.ones(len(x), len(x)).tril()  # (T, T): row t has t + 1 ones
    return ones / ones.sum(1, keepdim=True) @ x  # (T, T) @ (T, C) -> (T, C)


def test_mean_by_matrix(x):
    close(mean_by_matrix(x), mean_by_loop(x))


# -- rung 3: the same, as a softmax: equal scores, and -inf for the future ---------------------------------


def mean_by_softmax(x):
    scores = torch.zeros(len(x), len(x)).masked_fill(torch.ones(len(x), len(x)).triu(1) == 1, -math.inf)
    return scores.softmax(-1) @ x


def test_mean_by_softmax(x):
    close(mean_by_softmax(x), mean_by_matrix(x))


# -- rung 4: scores from the words themselves: who is like me? ---------------------------------------------


def attention_without_weights(x):
    weights = (x @ x.T).softmax(-1)  # (T, T)
    return weights, weights @ x


def test_attention_without_weights(inputs, reference):
    published = reference["attention_ladder"]["plain_softmax_of_dot_products"]
    weights, context = attention_without_weights(inputs)
    printed(weights[1], published["weights_row_2"])
    printed(context[1], published["context_row_2"])
    by_loop = torch.stack([sum(w * v for w, v in zip(row, inputs, strict=True)) for row in weights])
    close(context, by_loop)


# -- rung 5: what I look for, what I offer, what I say: query, key, value ----------------------------------


def attention(q, k, v, causal=False, dropout=0.0):
    """q, k, v (..., T, D) -> (..., T, D). Vaswani et al. 2017, equation 1."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (..., T, T)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return F.dropout(scores.softmax(-1), dropout) @ v


def test_attention_with_random_matrices(inputs, reference):
    published = reference["attention_ladder"]["trainable_rand"]
    torch.manual_seed(published["seed"])
    w_query, w_key, w_value = (torch.rand(3, 2) for _ in range(3))
    printed(attention(inputs @ w_query, inputs @ w_key, inputs @ w_value), published["context"])


def test_equal_words_get_the_mean(x):
    """With no query to tell them apart, attention is rung 3."""
    close(attention(torch.zeros_like(x), x, x, causal=True), mean_by_softmax(x))


@pytest.mark.parametrize("head_size", [4, 64, 1024])
def test_scaling_keeps_the_variance_of_scores(head_size):
    q, k = torch.randn(2, 500, head_size, generator=torch.Generator().manual_seed(2))
    assert (q @ k.T).var().item() == pytest.approx(head_size, rel=0.1)
    assert (q @ k.T / math.sqrt(head_size)).var().item() == pytest.approx(1, rel=0.1)


# -- rung 6: the matrices as Linear layers, which hold them transposed -------------------------------------


def test_linear_layers_are_matrices_transposed(inputs):
    torch.manual_seed(789)
    query, key, value = (nn.Linear(3, 2, bias=False) for _ in range(3))
    by_matrix = attention(*(inputs @ layer.weight.T for layer in (query, key, value)))
    close(attention(query(inputs), key(inputs), value(inputs)), by_matrix)


# -- rung 7: no look at the future, in two ways ------------------------------------------------------------


def causal_weights_by_renormalizing(q, k):
    weights = (q @ k.T / math.sqrt(q.size(-1))).softmax(-1).tril()
    return weights / weights.sum(-1, keepdim=True)


def causal_weights(q, k):
    return attention(q, k, torch.eye(len(q)), causal=True)  # the weights are what they make of the identity


def test_causal_mask_as_published_and_both_ways(inputs, reference):
    published = reference["attention_ladder"]["trainable_linear"]
    torch.manual_seed(published["seed"])
    query, key = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    weights = causal_weights(query(inputs), key(inputs))
    printed(weights[2], published["causal_weights_row_3"])
    close(weights, causal_weights_by_renormalizing(query(inputs), key(inputs)))
    assert (weights.triu(1) == 0).all()
    close(weights.sum(-1), torch.ones(6))


# -- rung 8: dropout on the weights: some are 0, the rest larger, the mean the same ------------------------


def test_dropout_on_the_weights(x):
    torch.manual_seed(3)
    kept = causal_weights(x, x)
    dropped = torch.stack([attention(x, x, torch.eye(6), causal=True, dropout=0.5) for _ in range(4000)])
    is_zero = (dropped == 0) & (kept > 0)
    close(
        torch.where(is_zero, 0.0, dropped), torch.where(is_zero, 0.0, 2 * kept).expand_as(dropped), atol=1e-5
    )
    assert is_zero.float().mean((1, 2)).mean().item() == pytest.approx(21 / 36 / 2, rel=0.05)
    close(dropped.mean(0), kept, atol=0.08)


# -- rungs 9 and 10: one head, and several whose outputs stand side by side --------------------------------


def one_head(x, w_query, w_key, w_value):
    return attention(x @ w_query.T, x @ w_key.T, x @ w_value.T, causal=True)  # (T, D)


def stacked_heads(x, heads):
    return torch.cat([one_head(x, *head) for head in heads], dim=-1)  # (T, H D)


# -- rung 11: all heads from one projection, split, and mixed by an output projection ----------------------


def split_heads(x, w_query, w_key, w_value, n_head):
    """x (B, T, C), matrices (C, C) of all heads -> (B, T, C)."""
    B, T, _ = x.shape
    q, k, v = (
        (x @ w.T).view(B, T, n_head, -1).transpose(1, 2) for w in (w_query, w_key, w_value)
    )  # (B, H, T, D)
    return attention(q, k, v, causal=True).transpose(1, 2).reshape(B, T, -1)


def test_splitting_a_projection_is_stacking_heads(x):
    weights = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(4))
    heads = [[w[2 * h : 2 * h + 2] for w in weights] for h in range(4)]  # head h has rows 2h and 2h + 1
    batch = torch.stack((x, -x))
    expected = torch.stack([stacked_heads(item, heads) for item in batch])
    close(split_heads(batch, *weights, n_head=4), expected, atol=1e-5)


def test_multi_head_attention_as_published(inputs, reference):
    published = reference["attention_ladder"]["multi_head_split"]
    torch.manual_seed(published["seed"])
    query, key, value = (nn.Linear(3, 2, bias=False) for _ in range(3))
    projection = nn.Linear(2, 2)
    batch = torch.stack((inputs, inputs))
    context = projection(split_heads(batch, query.weight, key.weight, value.weight, n_head=2))
    printed(context[0], published["context_first_item"])
    printed(context[1], published["context_first_item"])


# -- rung 12: the fused kernel, and model.py ---------------------------------------------------------------


def test_fused_attention(x):
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(5))
    close(F.scaled_dot_product_attention(q, k, v, is_causal=True), attention(q, k, v, causal=True))


@pytest.mark.parametrize("flash", [True, False])
def test_the_models_attention(x, flash):
    torch.manual_seed(6)
    module = CausalSelfAttention(GPTConfig(n_embd=8, n_head=4, bias=False, flash=flash))
    batch = torch.stack((x, -x))
    expected = module.c_proj(split_heads(batch, *module.c_attn.weight.view(3, 8, 8), n_head=4))
    close(module(batch), expected)


@pytest.mark.parametrize("flash", [True, False])
def test_the_models_attention_is_pytorchs(x, flash):
    torch.manual_seed(7)
    module = CausalSelfAttention(GPTConfig(n_embd=8, n_head=2, flash=flash))
    outside = nn.MultiheadAttention(8, 2, batch_first=True)
    outside.load_state_dict(
        {
            "in_proj_weight": module.c_attn.weight,
            "in_proj_bias": module.c_attn.bias,
            "out_proj.weight": module.c_proj.weight,
            "out_proj.bias": module.c_proj.bias,
        }
    )
    batch = torch.stack((x, -x))
    future = nn.Transformer.generate_square_subsequent_mask(6)
    close(module(batch), outside(batch, batch, batch, attn_mask=future, is_causal=True)[0])


# -- the rest of a block -----------------------------------------------------------------------------------


def layer_norm(x, weight, bias, eps=1e-5):
    """Ba et al. 2016: mean 0, variance 1 (the biased one), then a scale and a shift of each channel."""
    variance = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + eps) * weight + bias


def gelu(x):
    """Hendrycks and Gimpel 2016, section 2: the tanh form, which is GPT-2's."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_layer_norm_by_hand(x):
    weight, bias = torch.randn(2, 8, generator=torch.Generator().manual_seed(8))
    module = Block(GPTConfig(n_embd=8, n_head=2)).ln_1
    module.load_state_dict({"weight": weight, "bias": bias})
    close(layer_norm(x, weight, bias), module(x))
    close(F.layer_norm(x, (8,), weight, bias), module(x))
    assert not torch.allclose(
        (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * weight + bias, module(x)
    )


def test_gelu_by_hand():
    x = torch.linspace(-6, 6, 1001)
    close(ACTIVATIONS["gelu"](x), gelu(x))
    close(F.gelu(x, approximate="tanh"), gelu(x))
    assert 1e-4 < (ACTIVATIONS["gelu_erf"](x) - gelu(x)).abs().max() < 1e-3  # near, and not the same


def test_shortcuts_keep_the_gradient_of_early_layers_alive():
    """Five small layers: the first one's mean absolute gradient, with a shortcut around each and without."""
    gradient = {}
    for shortcut in (True, False):
        torch.manual_seed(123)
        layers = [nn.Linear(3, 3) for _ in range(4)] + [nn.Linear(3, 1)]
        x = torch.tensor([[1.0, 0.0, -1.0]])
        for layer in layers:
            y = gelu(layer(x))
            x = x + y if shortcut and x.shape == y.shape else y
        (x**2).mean().backward()
        gradient[shortcut] = layers[0].weight.grad.abs().mean().item()
    assert gradient[True] > 100 * gradient[False] > 0


def test_a_block_by_hand(x):
    torch.manual_seed(9)
    block = Block(GPTConfig(n_embd=8, n_head=2))
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    batch = torch.stack((x, -x))
    after_attention = batch + block.attn(layer_norm(batch, block.ln_1.weight, block.ln_1.bias))
    hidden = gelu(
        layer_norm(after_attention, block.ln_2.weight, block.ln_2.bias) @ block.mlp.c_fc.weight.T
        + block.mlp.c_fc.bias
    )
    expected = after_attention + hidden @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
    close(block(batch), expected, atol=1e-5)


def test_a_gpt_by_hand():
    """Embeddings of tokens and places, the blocks, a last norm, the token embedding again as output layer."""
    torch.manual_seed(10)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    w = dict(model.named_parameters())
    idx = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    x = F.one_hot(idx, 20).float() @ w["transformer.wte.weight"] + w["transformer.wpe.weight"][:5]
    for block in model.transformer.h:
        x = block(x)
    x = layer_norm(x, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"])
    logits, _ = model(idx, all_logits=True)
    close(logits, x @ w["transformer.wte.weight"].T, atol=1e-5)
    targets = torch.tensor([[1, 4, 1, 5, 9], [2, 6, -1, 3, -1]])
    probs = logits.softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    close(model(idx, targets)[1], -probs[targets >= 0].log().mean(), atol=1e-5)
