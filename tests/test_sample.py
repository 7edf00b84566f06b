"""Text out of a checkpoint: what goes to standard output, and what never does."""

import base64
import json
import pickle
import re
import shlex
import subprocess
import sys
import zlib
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import REPO, refused, run
from hypothesis import given
from hypothesis import strategies as st

import sample
from model import GPT, GPTConfig, load_checkpoint, rope_angles, rotate
from prepare import BPETokenizer, CharTokenizer, WordTokenizer, load_tokenizer
from sample import Sample

ARGS = ["--out_dir=out/trained", "--max_new_tokens=60", "--device=cpu"]


def text_stream(tokenizer, ids, prompt, stop):
    """The pieces of text that come out, token by token."""
    with patch.object(sample, "stop", stop), patch.object(sample, "max_new_tokens", len(ids)):
        stream = Sample(tokenizer, prompt, 0)
        return [stream.push(token) for token in ids]


def sampled(workdir, *args):
    return run("sample.py", *ARGS, *args, cwd=workdir).stdout


def test_standard_output_is_the_generated_text_alone(trained, workdir):
    checkpoint = load_checkpoint(trained / "best.pt")
    model, tokenizer = GPT.from_checkpoint(checkpoint), load_tokenizer(checkpoint["meta"])
    prompt = tokenizer.encode("The for statement")
    expected = model.generate(torch.tensor([prompt]), 60, temperature=0)[0, len(prompt) :].tolist()
    done = run("sample.py", *ARGS, "--start=The for statement", "--temperature=0", cwd=workdir)
    assert done.stdout == tokenizer.decode(expected) + "\n"
    first, rest = done.stderr.split("\n", 1)
    assert re.fullmatch(r"out/trained/best.pt: step 60, best validation loss \d\.\d{4}", first)
    assert rest.startswith("The for statement")  # on a terminal, prompt and text are read as one
    assert done.stderr.splitlines()[-1].endswith("tokens/s")


def test_the_likeliest_next_tokens(trained, workdir):
    """Ten lines of probabilities that fall, and less so the warmer it is."""
    checkpoint = load_checkpoint(trained / "best.pt")
    model, tokenizer = GPT.from_checkpoint(checkpoint), load_tokenizer(checkpoint["meta"])
    logits = model(torch.tensor([tokenizer.encode("The for statement")]))[0][0, -1]
    head, *lines = sampled(workdir, "--start=The for statement", "--show_probs=True").splitlines()
    assert head.split()[::2] == ["temperature"] * 3 + ["next"] and len(lines) == 10
    rows = [re.findall(r"([\d.]+)%", line) for line in lines]
    for t, column in zip((0.5, 1.0, 1.5), zip(*rows, strict=True), strict=True):
        expected = 100 * (logits / t).softmax(-1).topk(10).values
        torch.testing.assert_close(torch.tensor([float(p) for p in column]), expected, atol=0.051, rtol=0)
    assert lines[0][-3:] == repr(tokenizer.decode([logits.argmax().item()]))


def test_seeds_files_and_several_samples(trained, workdir):
    (workdir / "prompt.txt").write_text("The for statement")
    assert len(sampled(workdir, "--start=")) == 61  # no prompt at all
    one = sampled(workdir, "--start=The for statement")
    assert (
        one
        == sampled(workdir, "--start=FILE:prompt.txt")
        != sampled(workdir, "--start=FILE:prompt.txt", "--seed=2")
    )
    two = sampled(workdir, "--num_samples=2")
    one, other = two.split("---\n")  # in a file they do not run together
    assert len(one) == len(other) == 61 and one != other
    two = sampled(workdir, "--start=The for statement", "--num_samples=2", "--temperature=0")
    one = sampled(workdir, "--start=The for statement", "--temperature=0")
    assert two == f"{one}---\n{one}"
    assert sampled(workdir, "--init_from=out/trained/ckpt.pt") == sampled(workdir)  # best is the latest here


def test_prompts_by_line(trained, workdir):
    """A line that the model cannot read is said, and the next one is answered."""
    done = subprocess.run(
        [sys.executable, REPO / "sample.py", *ARGS, "--start=-", "--temperature=0"],
        cwd=workdir,
        input="The for statement\n10 €\nThe for statement\n",
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0 and "'€'" in done.stderr
    assert done.stdout == 2 * sampled(workdir, "--temperature=0", "--start=The for statement")


@pytest.mark.parametrize("args, status", [([], 0), (["--page=lost.html"], 1)])
def test_a_reader_that_has_had_enough(trained, workdir, args, status):
    """It ends the text, which is no mistake; but then there is no page, which is one."""
    command = [sys.executable, REPO / "sample.py", *ARGS, "--max_new_tokens=3000", *args]
    script = f"{shlex.join(map(str, command))} | head -c 5; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=workdir, capture_output=True, encoding="utf-8")
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert not (workdir / "lost.html").exists()


def test_a_file_of_prompts_is_as_one_at_a_time(trained, workdir):
    """Of several lengths, some the same; greedy and drawn, one sample and two; end-of-line kinds alike."""
    lines = ["The for statement", "A class", "The def statement", ""]
    (workdir / "lines.txt").write_bytes("\r\n".join(lines).encode() + b"\r\n")
    for args in (["--temperature=0", "--stop=e"], ["--num_samples=2", "--seed=5"]):
        alone = [sampled(workdir, f"--start={line}", *args) for line in lines]
        assert sampled(workdir, "--start=LINES:lines.txt", *args) == "---\n".join(alone)
    line = refused("sample.py", *ARGS, "--start=LINES:gone.txt", cwd=workdir)
    assert "gone.txt" in line
    assert sampled(workdir, "--start=LINES") != ""  # a text like any other
    (workdir / "empty.txt").write_text("")
    assert sampled(workdir, "--start=LINES:empty.txt") == sampled(workdir, "--start=")


def test_batches_are_as_large_as_memory_allows(monkeypatch):
    config = GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=4)
    rows = [Sample(CharTokenizer(["a"]), [0] * n, 0) for n in (3, 5, 3, 3, 5, 3)]

    def batches():
        return [[rows.index(row) for row in batch] for batch in sample.batches(rows, config)]

    assert batches() == [[0, 2, 3, 5], [1, 4]]
    monkeypatch.setattr(sample, "BATCH_NUMBERS", 2 * (2 * 4 * 8 + 80))
    assert batches() == [[0, 2], [3, 5], [1, 4]]
    monkeypatch.setattr(sample, "BATCH_NUMBERS", 1)
    assert len(batches()) == 6


def test_past_the_context_it_slides_by_a_quarter(trained, workdir):
    """--slide=1 recomputes the window for each token; the default is the model's own slide of a quarter."""
    checkpoint = load_checkpoint(trained / "best.pt")
    model, tokenizer = GPT.from_checkpoint(checkpoint), load_tokenizer(checkpoint["meta"])
    prompt = torch.tensor([tokenizer.encode("The for statement")])
    for args, slide in (([], 8), (["--slide=1"], 1), (["--slide=5"], 5)):
        expected = model.generate(prompt, 60, temperature=0, slide=slide)[0, prompt.size(1) :].tolist()
        text = sampled(workdir, "--start=The for statement", "--temperature=0", *args)
        assert text == tokenizer.decode(expected) + "\n"
    for slide in (0, 33):
        assert f"--slide={slide}" in refused("sample.py", *ARGS, f"--slide={slide}", cwd=workdir)


@torch.no_grad()
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_what_the_page_shows_is_what_the_model_computes(position):
    """Against one head at a time written out by hand, and against the fused forward pass."""
    torch.manual_seed(0)
    config = GPTConfig(16, 12, n_layer=3, n_head=2, n_embd=8, position=position, qk_norm=position == "rope")
    model = GPT(config).eval()
    for p in model.parameters():
        p.mul_(10)  # so that attention and predictions differ from place to place
    ids = torch.randint(10, (13,)).tolist()
    idx = torch.tensor([ids])
    fused = model(idx, all_logits=True)[0][0, :, :10].log_softmax(-1)
    kept = []
    hook = model.transformer.h[1].attn.c_attn.register_forward_hook(lambda _m, _x, y: kept.append(y[0]))
    tokenizer = CharTokenizer(list("abcdefghij"))
    data = sample.look_inside(model, tokenizer, ids)
    hook.remove()

    assert data["ids"] == ids and data["heads"] == 2 and len(data["layers"]) == 4
    assert all(data["texts"][i] == "abcdefghij"[i] for i in ids)
    for t in range(12):
        assert data["logprobs"][t] == pytest.approx(fused[t, ids[t + 1]].item(), abs=1e-3)
        assert data["ranks"][t] == 1 + (fused[t] > fused[t, ids[t + 1]]).sum()
    for t in range(13):
        last = dict(zip(data["layers"][-1]["ids"][t], data["layers"][-1]["logprobs"][t], strict=True))
        assert last == pytest.approx(dict(enumerate(fused[t].tolist())), abs=1e-3)
        for temperature, scales in data["scales"].items():
            expected = (fused[t] / temperature).softmax(-1)
            found = (fused[t] / temperature - scales[t]).exp()
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    early = model.lm_head(model.transformer.ln_f(model.transformer.wte(idx)))[0, :, :10]
    if position == "learned":
        early = (
            early * 0
            + model.lm_head(
                model.transformer.ln_f(model.transformer.wte(idx) + model.transformer.wpe.weight[:13])
            )[0, :, :10]
        )
    best = early.log_softmax(-1).max(-1)
    assert [row[0] for row in data["layers"][0]["ids"]] == best.indices.tolist()
    assert [row[0] for row in data["layers"][0]["logprobs"]] == pytest.approx(best.values.tolist(), abs=1e-3)

    weights = np.frombuffer(zlib.decompress(base64.b64decode(data["attention"])), "u1").reshape(3, 2, 91)
    weights = (weights / 255.0) ** 2
    q, k, _ = kept[0].view(13, 3, 2, 4).permute(1, 2, 0, 3)  # each (2, 13, 4)
    if position == "rope":
        q, k = (torch.nn.functional.rms_norm(x, (4,), eps=1e-6) for x in (q, k))
        q, k = (rotate(x[None], *rope_angles(torch.arange(13), 4))[0] for x in (q, k))
    place = 0
    for i in range(13):
        expected = (q[:, i : i + 1] @ k[:, : i + 1].mT / 2).softmax(-1)[:, 0]
        found = torch.from_numpy(weights[1, :, place : place + i + 1]).float()
        torch.testing.assert_close(found, expected, atol=0.005, rtol=0)
        place += i + 1


def test_a_page_of_any_text_is_one_script_element(trained, workdir):
    """Nothing in it ends the script that holds the data, and the template has one place for it."""
    template = (REPO / "assets" / "look.html").read_text(encoding="utf-8")
    assert template.count("PAGE_DATA") == 1
    run("sample.py", *ARGS, "--start=</script><b>", "--page=out/page.html", cwd=workdir)
    html = (workdir / "out" / "page.html").read_text(encoding="utf-8")
    assert html.count("</script>") == template.count("</script>")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    data = json.loads(found[1])
    assert len(data["ids"]) == 32 and data["source"] == "out/trained/best.pt" and data["prompt_tokens"] == 0
    before = (trained / "ckpt.pt").read_bytes()
    (workdir / "folder.html").mkdir()
    for args in (["--page=out/trained/ckpt.pt"], ["--page=folder.html"], ["--page=a.html", "--start=-"]):
        assert "--page=" in refused("sample.py", *ARGS, *args, cwd=workdir)
    assert (trained / "ckpt.pt").read_bytes() == before


def test_a_long_prompt_is_cropped_and_said(trained, workdir):
    done = run(
        "sample.py",
        *ARGS,
        "--temperature=0",
        f"--start={'x' * 50}The for statement of Python is",
        cwd=workdir,
    )
    first, second = done.stderr.splitlines()[:2]
    assert "best.pt: step" in first and "cropped to its last 32 of 80 tokens" in second
    assert done.stdout == sampled(workdir, "--temperature=0", "--start=xxThe for statement of Python is")


def test_stop_ends_the_text_before_it(trained, workdir):
    text = sampled(workdir)
    assert sampled(workdir, f"--stop={text[20:25]}") == text[: text.index(text[20:25])] + "\n"
    several = ["--stop= ", "--num_samples=3", "--max_new_tokens=1000000"]
    assert " " not in run("sample.py", *ARGS, *several, cwd=workdir).stdout  # and all three have ended


def test_text_comes_as_it_is_generated(trained, workdir):
    """The first characters are there while the process still generates; closing the pipe ends it quietly."""
    command = [sys.executable, REPO / "sample.py", "--out_dir=out/trained", "--max_new_tokens=1000000"]
    with subprocess.Popen(command, cwd=workdir, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert len(process.stdout.read(100)) == 100 and process.poll() is None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 0


def test_a_checkpoint_loads_without_the_compiler(trained, workdir):
    """Which takes a second to import."""
    code = "import sys; from model import GPT; GPT.from_checkpoint('out/trained/best.pt');"
    run("-c", code + "assert 'torch._dynamo' not in sys.modules", cwd=workdir, env={"PYTHONPATH": str(REPO)})


def test_no_id_outside_the_tokenizer(trained, workdir):
    """A padded output layer: its extra rows are made the likeliest, and never sampled."""
    checkpoint = load_checkpoint(trained / "best.pt")
    wte = checkpoint["model"]["transformer.wte.weight"]
    wider = torch.cat((wte, 50 * wte[:25]))
    checkpoint["model"]["transformer.wte.weight"] = checkpoint["model"]["lm_head.weight"] = wider
    checkpoint["model_args"]["vocab_size"] += 25
    torch.save(checkpoint, workdir / "padded.pt")
    for temperature in ("0", "1.5"):
        text = sampled(workdir, "--init_from=padded.pt", f"--temperature={temperature}")
        assert len(text) == 61 and set(text) <= set(checkpoint["meta"]["tokenizer"]["chars"])


@pytest.mark.parametrize(
    "args, words",
    [
        (["--out_dir=out/none"], ["out/none/best.pt"]),
        (["--init_from=prompt.txt"], ["prompt.txt", "damaged"]),
        (["--init_from=out/trained"], ["out/trained/best.pt"]),
        (["--device=meta"], ["device=meta"]),
        (["--seed=99999999999999999999"], ["seed"]),
        (["--start=10 €"], ["'€'", "--start"]),
        (["--start=FILE:gone.txt"], ["gone.txt"]),
        (["--temperature=-1"], ["temperature"]),
        (["--num_samples=0"], ["num_samples"]),
        (["--top_k=0"], ["top_k"]),
        (["--top_p=1.5"], ["top_p"]),
        (["--temprature=1"], ["did you mean temperature"]),
    ],
)
def test_mistakes_end_in_one_line(trained, workdir, args, words):
    (workdir / "prompt.txt").write_text("The for statement")
    line = refused("sample.py", "--out_dir=out/trained", *args, cwd=workdir)
    assert all(word in line for word in words), line


def test_numbers_that_overflow_are_said():
    """NaN as a probability: no token is drawn, and none is made up."""
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=1, n_embd=8)).eval()
    model.transformer.wte.weight.data.fill_(float("nan"))
    tokenizer = CharTokenizer(list("abc"))
    with pytest.raises(sample.UserError, match="float32"):
        sample.generate(model, tokenizer, [Sample(tokenizer, [0], 0)], shows=False)


def test_the_first_token_where_a_newline_is_nothing():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert sample.first_token(BPETokenizer(json.loads(words.to_str()))) == 0


@pytest.mark.parametrize("text, lost", [("jum", False), ("s over", False), ("j!", True)])
def test_a_part_of_a_word_may_be_the_stop(monkeypatch, text, lost):
    monkeypatch.setattr(sample, "stop", text)
    tokenizer = WordTokenizer.from_entries({"jumps", "over"})
    if lost:
        with pytest.raises(sample.UserError, match="never comes"):
            sample.check_settings(tokenizer, 16)
    else:
        sample.check_settings(tokenizer, 16)


def test_a_model_can_be_pickled():
    """For processes that are spawned, and torch.save(model) of those who copy model.py."""
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=1, n_embd=8)).eval()
    idx = torch.zeros(1, 4, dtype=torch.int64)
    assert torch.equal(pickle.loads(pickle.dumps(model))(idx)[0], model(idx)[0])


class ByteTokenizer:
    """Each byte a token: a character of several is whole only with its last."""

    end_of_text = None

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


@given(text=st.text(), stop=st.text(max_size=3))
def test_streams_never_break_a_character(text, stop):
    pieces = list(text_stream(ByteTokenizer(), text.encode("utf-8", "replace"), [32], stop))
    whole = text.encode("utf-8", "replace").decode()
    assert "".join(pieces) == (whole.split(stop)[0] if stop else whole)
    if "\N{REPLACEMENT CHARACTER}" not in whole:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_streamed_bytes_of_neighbouring_characters_are_decoded_together():
    """A vocabulary as Llama's, which writes as bytes what it lacks: those of two characters are one group."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdefghijklmnopqrstuvwxyz.,"]
    vocab = {token: i for i, token in enumerate(tokens)}
    described = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    described.normalizer = normalizers.Replace(" ", "\u2581")
    described.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = BPETokenizer(json.loads(described.to_str()))
    text = "so \u4e2d\u6587 \u662f\n\u597d, \U0001f642\U0001f642 a\u00e9\u597d"
    for place in range(1, len(text)):
        given, rest = tokenizer.encode(text[:place]), tokenizer.encode(text[place:])
        pieces = text_stream(tokenizer, rest, given, "")
        assert "".join(pieces) == text[place:]
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    stray = tokenizer.encode("\u6587")[:1]  # of a character's three bytes
    assert "".join(text_stream(tokenizer, stray, tokenizer.encode("a\u4e2d\u6587"), "")) == "\ufffd"


def test_streamed_words_are_joined_as_decoded():
    tokenizer = WordTokenizer(
        ["(", ")", ",", ".", "?", "It", "Yes", "is", "it", "so", "<|endoftext|>", "<|unk|>"]
    )
    ids = tokenizer.encode("It is so, is it? (Yes, it is.)")
    for n in (1, 3, 4):
        assert (
            "".join(text_stream(tokenizer, ids[n:], ids[:n], ""))
            == tokenizer.decode(ids)[len(tokenizer.decode(ids[:n])) :]
        )


def test_end_of_text_ends_the_stream():
    tokenizer = CharTokenizer(["a", "b", "c", "<|endoftext|>"])
    ids = [0, 1, tokenizer.end_of_text, 2]
    assert "".join(text_stream(tokenizer, ids, [2], "")) == "ab"
