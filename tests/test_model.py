"""The GPT: published numbers, fused against spelled-out attention, generation, checkpoints."""

import dataclasses
import math
import os
import pickle
import shutil

import pytest
import torch

from model import GPT, GPTConfig, KVCache, draw, load_checkpoint, next_token_probs, rope_angles, rotate

SMALL = dict(block_size=16, vocab_size=65, n_layer=3, n_head=2, n_embd=32)


def small(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**(SMALL | changes))).eval()


def tokens(*shape, seed=0, vocab_size=65):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# -- published numbers ---------------------------------------------------------------------------------------


def test_gpt_124m_as_published(reference):
    published = reference["gpt_124m"]
    torch.manual_seed(published["seed"])
    model = GPT(GPTConfig(**published["config"]))
    assert model.num_params() == published["parameters"]
    assert model.num_params() - model.lm_head.weight.numel() == published["parameters_without_output_layer"]
    assert round(4 * model.num_params() / 2**20, 2) == published["megabytes_float32"]
    attention, mlp = model.transformer.h[0].attn, model.transformer.h[0].mlp
    assert sum(p.numel() for p in attention.parameters()) == published["parameters_one_attention"]
    assert sum(p.numel() for p in mlp.parameters()) == published["parameters_one_mlp"]
    logits, loss = model(torch.tensor(published["batch"]), all_logits=True)
    assert logits.shape == (2, 4, 50257) and loss is None
    first, last = logits[0, :, :3], logits[0, :, -3:]
    torch.testing.assert_close(
        first, torch.tensor(published["logits_first_text_first_three_columns"]), atol=6e-5, rtol=0
    )
    torch.testing.assert_close(
        last, torch.tensor(published["logits_first_text_last_three_columns"]), atol=6e-5, rtol=0
    )
    model.eval()
    generated = model.generate(torch.tensor([[15496, 11, 314, 716]]), 6, temperature=0)
    assert generated[0, 4:].tolist() == published["greedy_after_15496_11_314_716"]


def test_loss_before_training_as_published(reference):
    published = reference["loss_before_training"]
    torch.manual_seed(123)
    model = GPT(GPTConfig(**(reference["gpt_124m"]["config"] | {"block_size": 256}))).eval()
    inputs, targets = torch.tensor(published["inputs"]), torch.tensor(published["targets"])
    with torch.no_grad():
        logits, loss = model(inputs, targets, all_logits=True)
    assert loss.item() == pytest.approx(published["cross_entropy"], abs=5e-5)
    probs = logits.softmax(-1).gather(-1, targets[..., None])[0, :, 0]
    torch.testing.assert_close(
        probs, torch.tensor(published["target_probabilities_first_text"]), atol=0, rtol=1e-4
    )


def test_sampling_as_published(reference):
    published = reference["sampling"]
    logits = torch.tensor([published["logits"]])
    torch.manual_seed(123)
    draws = [torch.multinomial(next_token_probs(logits), 1).item() for _ in range(1000)]
    counts = torch.bincount(torch.tensor(draws), minlength=9).tolist()
    assert counts == published["counts_of_1000_multinomial_draws_seed_123_temperature_1"]
    top_3 = next_token_probs(logits, top_k=3)[0]
    torch.testing.assert_close(top_3, torch.tensor(published["top_3_probabilities"]), atol=6e-5, rtol=0)
    warm = next_token_probs(logits, temperature=5)[0, 6].item()
    assert warm == pytest.approx(published["temperature_5_probability_of_index_6"], abs=5e-4)


# -- forward -------------------------------------------------------------------------------------------------


MODERN = dict(activation="relu2", position="rope", qk_norm=True, bias=False)


@pytest.mark.parametrize(
    "changes",
    [{"activation": activation} for activation in ("gelu", "gelu_erf", "relu", "relu2")]
    + [{"bias": False}, {"qkv_bias": False}, {"position": "rope"}, {"qk_norm": True}, MODERN],
)
def test_fused_attention_equals_the_spelled_out(changes):
    changes = {"tie_weights": False} | changes
    fused, plain = small(**changes), small(**changes, flash=False)
    idx = tokens(4, 17)
    for T in (1, 2, 15, 16):
        results = []
        for model in (fused, plain):
            model.zero_grad()
            logits, loss = model(idx[:, :T], idx[:, 1 : T + 1], all_logits=True)
            loss.backward()
            results.append((logits, loss, [p.grad for p in model.parameters()]))
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_training_keeps_double_precision():
    """Fused or spelled out, attention computes in the precision that it is given."""
    idx, logits = tokens(2, 16), []
    for flash in (True, False):
        logits.append(small(flash=flash).double().train()(idx, all_logits=True)[0])
    torch.testing.assert_close(*logits, atol=1e-12, rtol=0)


def test_fused_attention_equals_the_spelled_out_in_bfloat16():
    idx = tokens(4, 16)
    fused, plain = (
        small(n_embd=64, flash=flash).bfloat16()(idx, all_logits=True)[0] for flash in (True, False)
    )
    torch.testing.assert_close(fused, plain, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_equals_eager():
    model, idx = small(), tokens(4, 17)
    results = []
    for forward in (model, torch.compile(model)):
        model.zero_grad()
        logits, loss = forward(idx[:, :-1], idx[:, 1:], all_logits=True)
        loss.backward()
        results.append((logits, loss, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flash", [True, False])
def test_the_future_never_changes_the_past(flash):
    model = small(flash=flash)
    idx = tokens(2, 16)
    for t in range(1, 16):
        changed = torch.cat((idx[:, :t], tokens(2, 16 - t, seed=1)), dim=1)
        before, after = (model(x, all_logits=True)[0] for x in (idx, changed))
        torch.testing.assert_close(before[:, :t], after[:, :t], atol=1e-6, rtol=0)
        assert not torch.allclose(before[:, t:], after[:, t:])


def test_logits_shapes_and_ignored_targets():
    model, idx = small(), tokens(2, 9)
    everything, none = model(idx, all_logits=True)
    assert everything.shape == (2, 9, 65) and none is None
    torch.testing.assert_close(model(idx)[0], everything[:, [-1]])
    targets = tokens(2, 9, seed=1)
    targets[:, 4:] = -1
    expected = torch.nn.functional.cross_entropy(everything[:, :4].flatten(0, 1), targets[:, :4].flatten())
    logits, loss = model(idx, targets)
    assert logits is None  # beside a loss they are kept where asked for alone
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(idx, targets, all_logits=True), (everything, expected))
    with pytest.raises(ValueError, match="17 tokens are more than block_size=16"):
        model(tokens(1, 17))


def test_bigram_model_sees_the_last_token_and_its_place_alone():
    model = small(n_layer=0)
    a, b = tokens(1, 5, seed=1), tokens(1, 5, seed=2)
    b[0, -1] = a[0, -1]
    torch.testing.assert_close(model(a)[0], model(b)[0])


def test_dropouts_are_separate_and_off_in_eval():
    idx = tokens(4, 16)
    for which in ("embd_dropout", "attn_dropout", "resid_dropout", "dropout"):
        for flash in (True, False):
            model, plain = small(**{which: 0.5}, flash=flash), small(flash=flash)
            torch.testing.assert_close(model(idx)[0], plain(idx)[0])
            model.train()
            assert not torch.allclose(model(idx)[0], plain(idx)[0], atol=1e-3)
    model = small(dropout=0.5, embd_dropout=0.0, attn_dropout=0.0, resid_dropout=0.0).train()
    torch.testing.assert_close(model(idx)[0], plain(idx)[0])


def test_init_is_gpt2s():
    model = small(n_embd=256, n_layer=8)
    block = model.transformer.h[3]
    for weight, std in (
        (model.transformer.wte.weight, 0.02),
        (block.attn.c_attn.weight, 0.02),
        (block.attn.c_proj.weight, 0.02 / 4),
        (block.mlp.c_proj.weight, 0.02 / 4),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    zero = small(init="zero").transformer.h[1]
    assert (
        not zero.attn.c_proj.weight.any() and not zero.mlp.c_proj.weight.any() and zero.mlp.c_fc.weight.any()
    )
    assert block.mlp.c_fc.bias.abs().max() == 0 and (block.ln_1.weight == 1).all()
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_head": 5}, "n_head=5 does not divide n_embd=32"),
        ({"n_layer": -1}, "n_layer"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"dropout": 1.5}, "dropout"),
        ({"attn_dropout": -0.1}, "attn_dropout"),
        ({"activation": "swish"}, "activation='swish' is none of gelu"),
        ({"init": "xavier"}, "init"),
        ({"position": "rope", "n_head": 32}, "even n_embd / n_head"),
    ],
)
def test_impossible_architectures_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**(SMALL | change))


def test_flops_are_counted_as_palm_counts_them():
    """GPT-2 124M, context 1024: 6 * 123.6M + 12 * 12 * 768 * 1024 = 855 MFLOP a token."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.num_params() == 124_439_808 and model.num_params(non_embedding=True) == 123_653_376
    assert model.flops_per_token() == pytest.approx(855.17e6, rel=1e-4)


# -- generation ----------------------------------------------------------------------------------------------


def test_greedy_takes_the_likeliest_and_the_last_block_size_tokens():
    model = small()
    idx = tokens(3, 10)
    expected = idx
    for _ in range(20):
        expected = torch.cat((expected, model(expected[:, -16:])[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(idx, 20, temperature=0), expected)
    assert torch.equal(torch.cat(list(model.generate_stream(idx, 20, 0)), dim=1), expected[:, 10:])


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("changes", [{}, {"n_layer": 0}, {"position": "rope"}, MODERN])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("spare", [0, 5])
@torch.no_grad()
def test_cached_logits_equal_uncached_at_every_position(flash, changes, batch_size, spare):
    """A prompt of every length at once, then token by token, and, once, three at a time."""
    model, idx = small(flash=flash, **changes), tokens(batch_size, 16)
    expected = model(idx, all_logits=True)[0]
    for prompt, step in [(length, 1) for length in range(1, 17)] + [(4, 3)]:
        cache = KVCache(model.config, batch_size, 16 + spare, model.lm_head.weight)
        for start, end in [(0, prompt)] + [(t, t + step) for t in range(prompt, 16, step)]:
            cache.extend(torch.arange(start, end))
            cached = model.next_logits(idx[:, start:end], cache)
            torch.testing.assert_close(cached, expected[:, end - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("changes", [{}, MODERN])
@torch.no_grad()
def test_cached_logits_equal_uncached_under_autocast(flash, changes):
    model, idx = small(flash=flash, **changes), tokens(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(idx, all_logits=True)[0]
        cache = KVCache(model.config, 2, 16, model.lm_head.weight)
        for t in range(16):
            cache.extend(torch.tensor([t]))
            cached = model.next_logits(idx[:, t : t + 1], cache)
            torch.testing.assert_close(cached, expected[:, t], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("changes", [{}, MODERN])
@pytest.mark.parametrize("batch_size, prompt", [(1, 1), (1, 15), (8, 7), (8, 16), (2, 20)])
def test_sampled_tokens_equal_those_without_a_cache(flash, changes, batch_size, prompt):
    """With the same generator, and past block_size, where the window slides."""
    model, idx = small(flash=flash, **changes), tokens(batch_size, prompt)
    generated = model.generate(idx, 30, 0.9, 20, generator=torch.Generator().manual_seed(3))
    expected, generator = idx, torch.Generator().manual_seed(3)
    for _ in range(30):
        probs = next_token_probs(model(expected[:, -16:])[0][:, -1], 0.9, 20)
        token = draw(probs, generator)
        expected = torch.cat((expected, token), dim=1)
    assert torch.equal(generated, expected)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("changes", [{}, MODERN])
def test_the_compiled_step_generates_the_same(changes):
    torch._dynamo.utils.counters.clear()
    model, compiled = small(**changes), small(**changes)
    compiled.compiled_step = torch.compile(compiled.next_logits, dynamic=False)
    for idx in (tokens(2, 5), tokens(2, 9, seed=1)):
        a, b = (m.generate(idx, 20, generator=torch.Generator().manual_seed(3)) for m in (model, compiled))
        assert torch.equal(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # a prompt, not a step


def test_rotary_positions_are_llamas():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    qk = torch.randn(2, 7, 2, 3, 8)  # (B, T, 2, H, D)
    q, k = qk.transpose(1, 3).unbind(2)
    angles = torch.outer(torch.arange(4.0, 11.0), 1 / 10000 ** (torch.arange(0, 8, 2) / 8)).repeat(1, 2)
    theirs = apply_rotary_pos_emb(q, k, angles.cos()[None], angles.sin()[None])
    cos_sin = rope_angles(torch.arange(4, 11), 8)
    ours = tuple(rotate(x, *cos_sin) for x in (q, k))
    torch.testing.assert_close(ours, theirs)


def test_same_generator_same_tokens():
    model = small()
    draw = [
        model.generate(tokens(2, 3), 30, 1.5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_top_k_top_p_and_padding_bound_what_is_sampled():
    model, idx = small(), tokens(64, 4)
    probs = next_token_probs(model(idx)[0][:, -1])
    assert probs.shape == (64, 65)
    allowed = {"top_k": probs >= probs.topk(5).values[:, -1:]}
    ordered, order = probs.sort(descending=True)
    for row in range(64):
        n = int((ordered[row].cumsum(0) < 0.2).sum()) + 1
        allowed.setdefault("top_p", torch.zeros_like(probs, dtype=torch.bool))[row, order[row, :n]] = True
    allowed["vocab_size"] = (torch.arange(65) < 30).expand(64, -1)
    for option, value in (("top_k", 5), ("top_p", 0.2), ("vocab_size", 30)):
        for seed in range(5):
            new = model.generate(idx, 1, generator=torch.Generator().manual_seed(seed), **{option: value})[
                :, -1:
            ]
            assert allowed[option].gather(1, new).all(), option
    assert next_token_probs(model(idx)[0][:, -1], top_k=1000).isfinite().all()


def test_draws_follow_the_probabilities():
    """As often as torch.multinomial draws them, and never one of probability 0, at either end."""
    probs = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    ours = draw(probs.expand(100_000, -1), torch.Generator().manual_seed(0))[:, 0].bincount(minlength=6)
    theirs = torch.multinomial(probs, 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours / 1e5, probs, atol=5e-3, rtol=0)
    torch.testing.assert_close(ours / 1e5, theirs.bincount(minlength=6) / 1e5, atol=7e-3, rtol=0)
    assert ours[probs == 0].sum() == 0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_draws_at_the_ends_of_the_random_numbers(monkeypatch, uniform):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, uniform))
    for seed in range(100):
        probs = torch.rand_like(torch.empty(8, 1000), dtype=torch.float32).sub(0.5).clamp(min=0)
        probs = probs / probs.sum(-1, keepdim=True)
        assert (probs.gather(-1, draw(probs, None)) > 0).all(), seed


def test_stop_ends_each_sequence_and_then_all():
    model, idx = small(), tokens(4, 4)
    free = model.generate(idx, 40, temperature=0)[:, 4:]
    stop = free[0, 6].item()
    stopped = model.generate(idx, 40, temperature=0, stop=stop)[:, 4:]
    ends = [row.index(stop) if stop in row else 40 for row in free.tolist()]
    assert stopped.shape[1] == min(40, max(ends) + 1)
    for row, end in enumerate(ends):
        assert torch.equal(stopped[row, : end + 1], free[row, : end + 1][: stopped.shape[1]])
        assert (stopped[row, end:] == stop).all()


@pytest.mark.parametrize(
    "prompt",
    [torch.empty(1, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3)],
    ids=["no token", "no batch", "floats"],
)
def test_what_is_no_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="prompt"):
        small().generate(prompt, 1)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"slide": 0},
        {"slide": 17},
    ],
    ids=str,
)
def test_sampling_that_makes_no_sense_is_refused(sampling):
    with pytest.raises(ValueError, match=next(iter(sampling))):
        small().generate(tokens(1, 3), 1, **sampling)


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-20, 1e-6])
def test_the_smallest_temperatures_are_greedy(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0, -1e30]])
    assert next_token_probs(logits, temperature).tolist() == [[0.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.6, 0.8, 0.9, 1.0])
@pytest.mark.parametrize(
    "probs", [[0.3, 0.1, 0.1, 0.5], [0.25] * 4, [0.5, 0.5, 0.0, 0.0], [0.6, 0.2, 0.15, 0.05]]
)
def test_top_p_keeps_as_many_as_hugging_face(probs, top_p):
    """Ties and sums that meet top_p exactly included."""
    transformers = pytest.importorskip("transformers")
    logits = torch.tensor([probs]).log()
    theirs = transformers.TopPLogitsWarper(top_p)(None, logits.clone()).softmax(-1)
    ours = next_token_probs(logits, top_p=top_p)
    torch.testing.assert_close(ours.sort().values, theirs.sort().values)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"position": "rope", "qk_norm": True}])
@pytest.mark.parametrize("slide", [1, 2, 5, 16])
def test_a_full_context_moves_on_by_slide_tokens(changes, slide):
    """The plain rule: the context grows to block_size, then loses its first slide tokens at once."""
    model, idx = small(**changes), tokens(2, 10)
    found = model.generate(idx, 40, 0.9, generator=torch.Generator().manual_seed(3), slide=slide)
    generator, context = torch.Generator().manual_seed(3), idx
    for t in range(10, 50):
        if context.size(1) > 16:
            context = context[:, slide - 17 :]
        token = draw(next_token_probs(model(context)[0][:, -1], 0.9), generator)
        assert torch.equal(token[:, 0], found[:, t])
        context = torch.cat((context, token), dim=1)


# -- checkpoints ---------------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_checkpoints_round_trip_and_crop(tmp_path):
    model = small(tie_weights=True)
    args = dataclasses.asdict(model.config)
    torch.save({"model": model.state_dict(), "model_args": args}, tmp_path / "ckpt.pt")
    again = GPT.from_checkpoint(tmp_path / "ckpt.pt").eval()
    assert again.config == model.config and again.lm_head.weight is again.transformer.wte.weight
    idx = tokens(2, 16)
    assert torch.equal(model(idx)[0], again(idx)[0])
    cropped = GPT.from_checkpoint(load_checkpoint(tmp_path / "ckpt.pt"), block_size=8, dropout=0.3).eval()
    assert cropped.config.block_size == 8 and cropped.config.dropout == 0.3
    assert torch.equal(model(idx[:, :8])[0], cropped(idx[:, :8])[0])
    with pytest.raises(ValueError, match="do not fit"):
        GPT.from_checkpoint(load_checkpoint(tmp_path / "ckpt.pt"), block_size=32)


@pytest.mark.parametrize(
    "damage", ["missing", "cut", "flipped", "empty", "text", "hostile", "pickle", "other"]
)
def test_bad_checkpoints_are_refused_in_one_line(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    good = {"model": small().state_dict(), "model_args": SMALL}
    torch.save(good, "ckpt.pt")
    data = (tmp_path / "ckpt.pt").read_bytes()
    if damage == "missing":
        os.remove("ckpt.pt")
    elif damage == "hostile":
        torch.save(good | {"config": Hostile()}, "ckpt.pt")
    elif damage == "other":
        torch.save({"weights": 3}, "ckpt.pt")
    else:
        middle = len(data) // 2
        content = {
            "cut": data[:middle],
            "flipped": b"\0" * 100 + data[100:],
            "empty": b"",
            "text": b"model",
            "pickle": pickle.dumps(Hostile()),
        }
        (tmp_path / "ckpt.pt").write_bytes(content[damage])
    with pytest.raises(ValueError) as error:
        load_checkpoint("ckpt.pt")
    assert "ckpt.pt" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()
