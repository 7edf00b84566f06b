"""Our GPT against Hugging Face's GPT-2, from small random configurations: logits, loss, every gradient."""

import pytest
import torch

from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

SIZES = {  # n_layer, n_head, n_embd, parameters with the output layer tied (Hugging Face counts the same)
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def to_ours(tensors):
    """Hugging Face's Conv1D holds its matrices input-major: those are transposed."""
    return {name: t.T if name.endswith(TRANSPOSED) else t for name, t in tensors.items()}


def pair(n_layer, n_head, n_embd, block_size, vocab_size, flash):
    """The same random weights in both; biases and LayerNorms are random too, so that each of them counts."""
    torch.manual_seed(n_layer)
    outside = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab_size,
            n_positions=block_size,
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    for name, p in outside.named_parameters():
        torch.nn.init.normal_(p, mean=float("ln_" in name and name.endswith("weight")), std=0.1)
    args = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size)
    ours = GPT(GPTConfig(**args, flash=flash))
    ours.load_state_dict(to_ours(outside.state_dict()))
    return ours.eval(), outside.eval()


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 8, 8, 11), (2, 4, 32, 16, 50), (4, 3, 48, 12, 97)])
def test_logits_loss_and_gradients_equal_hugging_faces(sizes, flash):
    ours, outside = pair(*sizes, flash=flash)
    *_, block_size, vocab_size = sizes
    for T in range(1, block_size + 1):
        idx = torch.randint(vocab_size, (3, T + 1), generator=torch.Generator().manual_seed(T))
        x, y = idx[:, :-1], idx[:, 1:]
        ours.zero_grad(), outside.zero_grad()
        logits, loss = ours(x, y, all_logits=True)
        expected = outside(x).logits
        expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), y.flatten())
        loss.backward(), expected_loss.backward()
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
        gradients = {name: p.grad for name, p in ours.named_parameters()}
        theirs = to_ours({name: p.grad for name, p in outside.named_parameters()})
        torch.testing.assert_close(gradients, theirs, atol=1e-5, rtol=1e-5)


def test_greedy_generation_equals_hugging_faces():
    ours, outside = pair(2, 4, 32, 16, 50, flash=True)
    idx = torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(0))
    theirs = outside.generate(idx, max_new_tokens=11, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(idx, 11, temperature=0), theirs)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.9}]
)
def test_sampling_distribution_equals_hugging_faces(options):
    from model import next_token_probs

    logits = 3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    scores = logits / options.get("temperature", 1.0)
    if "top_k" in options:
        scores = transformers.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = transformers.TopPLogitsWarper(options["top_p"])(None, scores)
    probs = next_token_probs(logits, **options)
    torch.testing.assert_close(probs, scores.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_counts(name, tied):
    """Counted without allocating, by a formula written out, and as published."""
    n_layer, n_head, C, published = SIZES[name]
    config = GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=C, tie_weights=tied)
    with torch.device("meta"):
        model = GPT(config)
    block = (C * 3 * C + 3 * C) + (C * C + C) + (C * 4 * C + 4 * C) + (4 * C * C + C) + 2 * 2 * C
    formula = 50257 * C + 1024 * C + n_layer * block + 2 * C
    assert model.num_params() == formula + (0 if tied else 50257 * C)
    assert formula == published
    assert model.num_params(non_embedding=True) == formula - 1024 * C


def test_decay_is_gpt2s():
    """Matrices and embeddings decay; biases and LayerNorms do not."""
    ours, _ = pair(2, 4, 32, 16, 50, flash=True)
    (optimizer,) = ours.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
    decayed, kept = optimizer.param_groups
    names = {p: name for name, p in ours.named_parameters()}
    assert {names[p] for p in kept["params"]} == {
        name for name in names.values() if name.endswith("bias") or ".ln_" in name
    }
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
