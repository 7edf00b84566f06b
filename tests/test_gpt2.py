"""Our GPT against Hugging Face's GPT-2, from small random configurations: logits, loss, every gradient.

What GPT-2 has not, against those models of theirs that have it.
"""

import pytest
import torch

from model import GPT, CausalSelfAttention, GPTConfig, rope_angles

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


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("ours, theirs", [("gelu", "gelu_new"), ("relu2", "relu2"), ("gelu_erf", "gelu")])
def test_rotated_queries_and_keys_equal_those_of_gpt_neox(ours, theirs, flash):
    """The whole model, where only positions and activation differ from GPT-2's."""
    torch.manual_seed(0)
    outside = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            hidden_act=theirs,
            max_position_embeddings=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            use_parallel_residual=False,
        )
    ).eval()
    for p in outside.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model = GPT(GPTConfig(16, 50, 2, 4, 32, position="rope", activation=ours, tie_weights=False, flash=flash))
    renames = {
        "gpt_neox.layers": "transformer.h",
        "gpt_neox.embed_in": "transformer.wte",
        "gpt_neox.final_layer_norm": "transformer.ln_f",
        "embed_out": "lm_head",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "attention.query_key_value": "attn.c_attn",
        "attention.dense": "attn.c_proj",
        "mlp.dense_h_to_4h": "mlp.c_fc",
        "mlp.dense_4h_to_h": "mlp.c_proj",
    }

    def renamed(tensors):
        found = {}
        for name, tensor in tensors:
            for one, other in renames.items():
                name = name.replace(one, other)
            if "c_attn" in name:  # theirs has query, key and value of each head side by side
                tensor = tensor.unflatten(0, (4, 3, 8)).transpose(0, 1).flatten(0, 2)
            found[name] = tensor
        return found

    model.load_state_dict(renamed(outside.named_parameters()))
    idx = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(0))
    logits, loss = model(idx[:, :-1], idx[:, 1:], all_logits=True)
    expected = outside(idx[:, :-1]).logits
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), idx[:, 1:].flatten())
    loss.backward(), expected_loss.backward()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected = renamed((name, p.grad) for name, p in outside.named_parameters())
    torch.testing.assert_close(gradients, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flash", [True, False])
def test_normalized_queries_and_keys_equal_those_of_qwen3(flash):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8, attention_bias=False
    )
    config._attn_implementation = "eager"
    outside = Qwen3Attention(config, layer_idx=0).eval()
    ours = CausalSelfAttention(
        GPTConfig(16, 50, 1, 4, 32, position="rope", qk_norm=True, bias=False, flash=flash)
    )
    parts = (outside.q_proj, outside.k_proj, outside.v_proj)
    ours.c_attn.weight.data = torch.cat([part.weight.data for part in parts])
    ours.c_proj.weight.data = outside.o_proj.weight.data
    x = 3 * torch.randn(2, 16, 32)
    cos, sin = rope_angles(torch.arange(16), 8)
    mask = torch.full((16, 16), -torch.inf).triu(1)
    expected = outside(x, (cos.repeat(1, 2)[None], sin.repeat(1, 2)[None]), mask)[0]
    torch.testing.assert_close(ours(x, (cos, sin)), expected, atol=1e-5, rtol=1e-5)
    ours.config.qk_norm = False  # which changes much
    assert (ours(x, (cos, sin)) - expected).abs().max() > 0.1


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
