"""Generate text from a checkpoint. The text alone goes to standard output, as it is generated.

python sample.py --out_dir=out/quickstart --start="The for statement"
python sample.py --init_from=out/quickstart/ckpt.pt --start=FILE:prompt.txt --num_samples=3 --temperature=0
python sample.py --init_from=gpt2 --start="The capital of France is" --show_probs=True
python sample.py --out_dir=out/quickstart --start="The for statement" --max_new_tokens=110 --page=look.html
python sample.py --out_dir=out/instructions --chat=True
"""

import signal
from typing import Literal

from configurator import UserError, configure

out_dir = "out"  # a run of train.py
init_from = "resume"  # resume (out_dir's best.pt, else ckpt.pt), gpt2 and its sizes, or a checkpoint
start = ""  # a prompt; FILE:path; LINES:path, a prompt per line; -: lines of input; empty: from the beginning
num_samples = 1  # how many texts for each prompt, generated together
max_new_tokens = 500  # tokens in each text
temperature = 0.8  # below 1: more of what is likely; above 1: more variety; 0: always the likeliest token
top_k: int | None = 200  # choose among this many likeliest tokens; None: all
top_p: float | None = None  # choose among the likeliest tokens that together have this probability; None: all
stop = ""  # end a text before this; end-of-text always ends it
slide: int | None = None  # oldest tokens that a full context drops; None: a quarter of it; 1: exact, slow
page = ""  # also write a .html file that shows what the model saw
chat = False  # answer each line of standard input; /new forgets what was said before
export = ""  # instead of a text: a new folder with model and tokenizer for transformers
show_probs = False  # instead of a text: a table of the likeliest next tokens at several temperatures
seed = 1337  # the same seed, the same text
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it
compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: no, it takes longer than a text

if __name__ == "__main__":
    # Ctrl-C ends it without a word; a script's background command ignores Ctrl-C
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    configure(globals())  # before the slow imports, so that --help and a mistyped key answer at once

import base64
import json
import sys
import tempfile
import time
import zlib
from contextlib import suppress
from os.path import expanduser
from pathlib import Path

import torch

from model import (
    GPT,
    ModelError,
    check_compiler,
    load_checkpoint,
    next_token_probs,
    pick_device,
    pick_dtype,
    value_or,
)
from prepare import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    as_hugging_face,
    clean,
    encode_text,
    give_up,
    interrupt,
    on_ctrl_c,
    render,
    say,
    speak_utf8,
    tokenizer_of,
    user_error,
    visible,
    weights_path,
    write_file,
)

# The largest batch, in numbers: keys, values and some logits of each text. In float32 it takes 8 GB.
BATCH_NUMBERS = 2_000_000_000
OVERFLOW = "the model's numbers overflow in this precision; try --dtype=float32"

# -- where text goes -----------------------------------------------------------------------------------------


def show(text):
    """Print generated text on standard output."""
    print(visible(text, sys.stdout), end="", flush=True)


def note(text, end="\n"):
    """Print anything else on standard error, so that standard output holds nothing but generated text."""
    say(str(text), sys.stderr, end)


# -- what is read --------------------------------------------------------------------------------------------


def find_checkpoint():
    """The path of the checkpoint that init_from and out_dir name. Raises UserError."""
    if init_from != "resume":
        return weights_path(init_from)
    for name in ("best.pt", "ckpt.pt"):  # ckpt.pt is the latest; without an evaluation there is no best
        path = Path(out_dir, name)
        if path.exists():
            return str(path)
    raise UserError(f"there is no {out_dir}/best.pt, and no ckpt.pt: train a run, or name one by --out_dir")


def read_prompts():
    """The texts to continue: start, or what the file holds that it names. Raises UserError."""
    if not start.startswith(("FILE:", "LINES:")):
        return [start]
    kind, name = start.split(":", 1)
    path = Path(expanduser(name))
    if not path.is_file():  # reading a pipe could wait for ever
        raise UserError(f"{path}: there is no such file")
    # encode_prompt refuses the bytes that are not UTF-8
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    if kind == "FILE":
        return [text]
    return text.removesuffix("\n").split("\n")


def crop(model, ids):
    """The last token IDs of a text, as many as the model's context holds."""
    longest = model.config.block_size
    if len(ids) > longest:
        note(f"the text is cropped to its last {longest} of {len(ids)} tokens")
    return ids[-longest:]


def encode_prompt(tokenizer, text):
    """The token IDs of a text to continue, at least one. Raises UserError."""
    return encode_text(tokenizer, text) or [first_token(tokenizer)]  # a model cannot continue nothing


def first_token(tokenizer):
    """The token to begin with: end-of-text, else a newline, else the vocabulary's first token."""
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    try:
        return (tokenizer.encode("\n") or [0])[0]
    except UserError:  # no newline in the vocabulary
        return 0


# -- what is written -----------------------------------------------------------------------------------------


class Sample:
    """A text that grows token by token, until stop, end-of-text or max_new_tokens ends it."""

    def __init__(self, tokenizer, prompt_ids, seed):
        self.tokenizer = tokenizer
        self.prompt_ids = prompt_ids
        self.seed = seed
        self.ids = []  # all new tokens, with end-of-text
        self.text = ""  # all text that push has returned
        self.waiting = ""  # the text after it, in which stop may begin
        # The tokens whose text was taken last, and those after them. A word tokenizer needs the former to see
        # whether a space comes next, and others decode all bytes of neighbouring characters together.
        self.taken = prompt_ids
        self.new = []
        self.ended = False

    def push(self, token):
        """Take the next token; return the text that is ready."""
        if self.ended:
            return ""
        self.ids.append(token)
        self.ended = len(self.ids) == max_new_tokens
        if token == self.tokenizer.end_of_text:
            self.ended = True
        else:
            self.new.append(token)
        # only these are decoded: decoding all tokens each time would take quadratic time
        text = self.tokenizer.decode(self.taken + self.new)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not self.ended:
            return ""  # half a UTF-8 character, whose other half is still to come
        known = self.tokenizer.decode(self.taken)
        if text.startswith(known):
            self.waiting += text[len(known) :]
        else:  # a stray byte spoils those beside it
            self.waiting += self.tokenizer.decode(self.new)
        self.taken, self.new = self.new, []
        if stop and stop in self.waiting:
            self.waiting = self.waiting.split(stop)[0]  # stop itself is not part of the text
            self.ended = True
        piece = self.waiting
        if len(stop) > 1 and not self.ended:
            piece = piece[: 1 - len(stop)]  # stop may begin in the rest
        self.waiting = self.waiting[len(piece) :]
        self.text += piece
        return piece


def log_probs(logits, tokenizer):
    """Logarithms (..., V) in float32 of the probabilities of the tokenizer's V IDs. Raises UserError."""
    logprobs = logits[..., : tokenizer.vocab_size].float().log_softmax(-1)
    if not logprobs.isfinite().all():
        raise UserError(OVERFLOW)
    return logprobs


@torch.no_grad()
def print_probs(model, tokenizer, prompts):
    """Print what may come after each prompt: the ten likeliest tokens, their probabilities, and bars."""
    for ids in prompts:
        idx = torch.tensor([crop(model, ids)], device=model.lm_head.weight.device)  # (1, T)
        logprobs = log_probs(model(idx)[0][0, -1], tokenizer)  # (V,)
        probs = [(logprobs / t).softmax(-1) for t in (0.5, 1.0, 1.5)]
        show("temperature 0.5           temperature 1.0           temperature 1.5           next token\n")
        for token in logprobs.argsort(descending=True)[:10].tolist():
            for p in probs:
                bar = "█" * round(16 * p[token].item())
                show(f"{p[token]:6.1%} {bar:18} ")
            show(repr(tokenizer.decode([token])) + "\n")


def generate(model, tokenizer, samples, shows):
    """Continue samples together, whose prompts have one length. shows: print the first as it grows."""
    prompts = [sample.prompt_ids for sample in samples]
    idx = torch.tensor(prompts, device=model.lm_head.weight.device)  # (B, T)
    # each sample has its own generator, so it gets the text that it would get alone
    generators = [torch.Generator(idx.device).manual_seed(sample.seed) for sample in samples]
    steps = model.generate_stream(
        idx,
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        generators,
        vocab_size=tokenizer.vocab_size,
        slide=value_or(slide, max(1, model.config.block_size // 4)),
    )
    for tokens in steps:  # each (B, 1)
        new = tokens.flatten().tolist()
        if max(new) >= tokenizer.vocab_size:  # what draw returns where probabilities are NaN
            raise UserError(OVERFLOW)
        pieces = [sample.push(token) for sample, token in zip(samples, new, strict=True)]
        if shows:
            show(pieces[0])
        if all(sample.ended for sample in samples):
            break
    if shows:
        show("\n")


def complete(model, tokenizer, prompts):
    """Print num_samples continuations of each prompt, a list of token IDs; returns the first Sample."""
    prompts = [crop(model, ids) for ids in prompts]
    samples = [Sample(tokenizer, ids, seed + i) for ids in prompts for i in range(num_samples)]
    first, *others = samples
    started = time.perf_counter()
    note(tokenizer.decode(first.prompt_ids), end="")
    for batch in batches(samples, model.config):  # the first sample is in the first batch
        generate(model, tokenizer, batch, shows=batch[0] is first)
    seconds = time.perf_counter() - started
    for sample in others:
        show("---\n")  # so that samples do not run together in a file
        note(tokenizer.decode(sample.prompt_ids), end="")
        show(sample.text + "\n")
    count = sum(len(sample.ids) for sample in samples)
    note(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s")
    return first


def batches(samples, config):
    """Lists of samples to generate together: prompts of one length, and no more than BATCH_NUMBERS allow.

    A step reads all weights of the model, whatever the number of texts, so several texts take little longer.
    """
    by_length = {}
    for sample in samples:
        by_length.setdefault(len(sample.prompt_ids), []).append(sample)
    # keys and values, and some copies of the logits
    sample_size = 2 * config.n_layer * config.n_embd * config.block_size + 8 * config.vocab_size
    most = max(1, BATCH_NUMBERS // sample_size)
    for same in by_length.values():
        for place in range(0, len(same), most):
            yield same[place : place + most]


def answer_lines(model, tokenizer, write):
    """Continue each line of standard input by write, or answer it in a chat, until the input ends."""
    sys.stdin.reconfigure(errors="surrogateescape")  # clean refuses the bytes that are not UTF-8
    messages = []  # what was said in the chat
    while True:
        if sys.stdin.isatty():
            note("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        try:
            if not chat:
                write(model, tokenizer, [encode_prompt(tokenizer, line.rstrip("\r\n"))])
            elif line.strip() == "/new":
                messages = []
            elif line.strip():
                encode_text(tokenizer, line.strip())  # which refuses what the vocabulary lacks
                messages = answer(model, tokenizer, [*messages, {"role": "user", "content": line}])
        except UserError as error:
            note(error)  # and wait for the next line


def answer(model, tokenizer, messages):
    """Print an answer to the last message; returns the messages that fitted the context, and the answer."""
    for oldest in range(0, len(messages), 2):
        # piece by piece, as prepare.py encodes the conversations to learn from
        ids = [token for piece in render(messages[oldest:]) for token in tokenizer.encode(piece)]
        if len(ids) <= model.config.block_size // 2:
            break  # otherwise drop the oldest question and answer: half of the context is for the new answer
    sample = Sample(tokenizer, crop(model, ids), seed)
    generate(model, tokenizer, [sample], shows=True)
    # what no message may hold, although a model can write it
    text = sample.text.replace("\0", "").replace(END_OF_TEXT, "")
    return [*messages[oldest:], {"role": "assistant", "content": text}]


# -- a look inside -------------------------------------------------------------------------------------------


def numbers(tensor):
    """The tensor as nested lists, with as many digits as a page needs."""
    return tensor.cpu().double().round(decimals=3).tolist()  # an Apple GPU has no double precision


def outputs_of(modules):
    """A list that fills with what these modules return when the model runs."""
    outputs = []
    for module in modules:
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs


@torch.no_grad()
def look_inside(model, tokenizer, ids):
    """What a model sees in a text of T tokens: the data of assets/look.html.

    It changes the model: attention is spelled out afterwards, and its weights are kept.
    """
    parts = model.transformer
    # the residual stream (1, T, C) after the embeddings and after each block
    residuals = outputs_of([parts.drop, *parts.h])
    # the attention weights of each block, (1, H, T, T)
    weights = outputs_of(block.attn.attn_dropout for block in parts.h)
    model.config.flash = False  # the fused kernel never has the weights in memory
    idx = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T)
    model(idx)

    layers = []
    known = {*ids}  # the tokens whose text the page shows
    for x in residuals:  # what the model would predict if it ended there
        logprobs = log_probs(model.lm_head(parts.ln_f(x))[0], tokenizer)  # (T, V)
        top = logprobs.topk(min(10, tokenizer.vocab_size))
        layers.append({"ids": top.indices.tolist(), "logprobs": numbers(top.values)})
        known.update(top.indices.flatten().tolist())
    came = logprobs[:-1].gather(1, idx[0, 1:, None])  # (T - 1, 1), of the tokens that came
    temperatures = [step / 10 for step in range(1, 21)]
    # one byte for each weight on an earlier token or itself; the square root keeps small weights visible
    rows, columns = torch.tril_indices(len(ids), len(ids))
    attention = bytearray()
    for w in weights:
        shades = (255 * w[0].float().sqrt()).round().byte().cpu()  # (H, T, T)
        attention += shades[:, rows, columns].numpy().tobytes()
    return {
        "ids": ids,
        "texts": {token: tokenizer.decode([token]) for token in known},
        "logprobs": numbers(came.flatten()),
        "ranks": (1 + (logprobs[:-1] > came).sum(-1)).tolist(),
        "layers": layers,
        # at another temperature the probabilities need another normalizer, a sum over the whole vocabulary
        "scales": {t: numbers((logprobs / t).logsumexp(-1)) for t in temperatures},
        "heads": model.config.n_head,
        "attention": base64.b64encode(zlib.compress(attention)).decode(),
    }


def write_page(model, tokenizer, source, sample):
    """Write a page that needs nothing else: assets/look.html with the data of a sample. Raises OSError."""
    ids = crop(model, sample.prompt_ids + sample.ids)
    data = look_inside(model, tokenizer, ids) | {
        "source": source,
        "prompt_tokens": max(0, len(ids) - len(sample.ids)),  # those that are still in the context
    }
    text = json.dumps(data).replace("<", "\\u003c")  # so that no text can end the page's script
    template = Path(__file__).parent / "assets/look.html"
    html = template.read_bytes().replace(b"PAGE_DATA", text.encode())
    write_file(Path(expanduser(page)), html)
    note(f"{page}: open it in a browser")


# -- faster steps --------------------------------------------------------------------------------------------


class GraphedStep:
    """A step of one token as a CUDA graph: one call starts all its kernels.

    Started one by one from Python, they take 3.9 times as long (GPT-2 124M, bfloat16, H200).
    """

    def __init__(self, step):
        self.step = step
        self.cache = None

    def __call__(self, idx, cache):
        if cache is not self.cache:  # keys and values of another text lie elsewhere in memory
            self.record(idx, cache)
        self.idx.copy_(idx)
        self.positions.copy_(cache.new_positions)
        self.graph.replay()
        return self.logits

    def record(self, idx, cache):
        # a graph reads and writes the same memory each time
        self.cache, self.idx, self.positions = cache, idx.clone(), cache.new_positions.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the first run sets libraries up, which must not be recorded
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()

    def run(self):
        self.cache.extend(self.positions)
        self.logits = self.step(self.idx, self.cache)


def optimize_for_generation(model, compiled):
    """Make the steps of one token faster. Call it when the model has its device and precision."""
    # one token of a small model is too little work to share: two threads are 1.06 times as fast as one with
    # 1M parameters, 1.25 times with 5M, twice with 51M (an idle Intel Xeon). On a busy machine they wait for
    # each other, and 1M takes five times as long.
    torch.set_num_threads(min(torch.get_num_threads(), 1 + model.num_params() // 4_000_000))
    weight = model.lm_head.weight
    if compiled:
        check_compiler(weight.device)
        model.compiled_step = torch.compile(model.next_logits, dynamic=False)
    if weight.is_cuda:
        model.config.flash = False  # for one query, the fused kernel takes 1.5 times as long
        model.compiled_step = GraphedStep(model.compiled_step or model.next_logits)


def export_folder(checkpoint, tokenizer, folder):
    """Write a Hugging Face folder with model and tokenizer. Raises ModelError or UserError."""
    hf_tokenizer = as_hugging_face(tokenizer)
    model = GPT.from_checkpoint(checkpoint)
    # leave out the IDs that only pad the vocabulary, because transformers would sample them
    model.config.vocab_size = tokenizer.vocab_size
    for layer in (model.transformer.wte, model.lm_head):
        layer.weight.data = layer.weight.data[: tokenizer.vocab_size]
    model.save_pretrained(folder, tokenizer.end_of_text)
    hf_tokenizer.save(str(folder / "tokenizer.json"))
    generation = {"max_length": model.config.block_size}  # otherwise transformers writes beyond the context
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.block_size,
        "clean_up_tokenization_spaces": False,  # it would remove some of the text's own spaces
    }
    if tokenizer.end_of_text is not None:
        # GPT-2 begins, ends and pads texts with the same token
        for role in ("bos", "eos", "pad"):
            generation[f"{role}_token_id"] = tokenizer.end_of_text
            about[f"{role}_token"] = hf_tokenizer.id_to_token(tokenizer.end_of_text)
    if "train_learned" in checkpoint.get("meta", {}):  # it has learned to answer
        about["chat_template"] = CHAT_TEMPLATE
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2))


def export_whole(checkpoint, tokenizer):
    """Export, so that the folder is there complete or not at all. Raises ModelError or UserError."""
    folder = Path(expanduser(export))
    if folder.exists():
        raise UserError(f"{folder} is there already; --export wants a new folder")
    on_ctrl_c(interrupt)  # which removes what is half written
    with user_error(f"{folder} cannot be written"):  # safetensors and tokenizers have their own errors
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as new:
            export_folder(checkpoint, tokenizer, Path(new, "folder"))
            Path(new, "folder").rename(folder)


def check_settings(tokenizer, block_size):
    """Raises UserError or ModelError if a setting cannot work."""
    next_token_probs(torch.zeros(1, 1), temperature, top_k, top_p)  # which checks these three
    if not 1 <= num_samples < 1_000_000:
        raise UserError(f"{num_samples=} must be from 1 to 999,999, because the texts must fit into memory")
    if max_new_tokens < 0 or not 0 <= seed < 2**62:
        raise UserError("max_new_tokens and seed must be at least 0, and the seed below 2**62")
    if not 1 <= value_or(slide, 1) <= block_size:
        raise UserError(f"--slide={slide} must be from 1 to block_size={block_size}")
    if page and (not page.endswith(".html") or Path(page).is_dir() or show_probs or start == "-"):
        raise UserError(
            f"--page={page}: its name must end in .html, and it needs a text, not --show_probs or --start=-"
        )
    if chat and (start or page or show_probs or num_samples > 1):
        raise UserError(
            "--chat=True answers standard input; leave --start, --num_samples, --page and --show_probs out"
        )
    if chat and tokenizer.end_of_text is None:
        raise UserError("--chat=True needs a vocabulary with end-of-text, by which an answer ends")
    if stop:
        # what the entries of the vocabulary can write, and what some of them write only together
        possible = tokenizer.decode([*range(tokenizer.vocab_size)])
        with suppress(UserError):  # which would name the character, but not --stop
            possible += tokenizer.decode(tokenizer.encode(clean(stop)))
        lost = set(stop).difference(possible)
        if lost:
            raise UserError(f"--stop={stop!r} never comes: this vocabulary cannot write {min(lost)!r}")


def main():
    speak_utf8()
    use_device = pick_device(device)
    path = find_checkpoint()
    checkpoint = load_checkpoint(path)
    tokenizer = tokenizer_of(path, checkpoint)
    model_args = checkpoint["model_args"]
    if tokenizer.vocab_size > model_args["vocab_size"]:
        raise UserError(f"{path}: its tokenizer has more IDs than the model, so they do not belong together")
    check_settings(tokenizer, model_args["block_size"])
    source = path
    if {"step", "best_val_loss"} <= checkpoint.keys():  # only train.py writes these
        source += f": step {checkpoint['step']}, best validation loss {checkpoint['best_val_loss']:.4f}"
    if export:
        export_whole(checkpoint, tokenizer)
        return note(f"{source}\n{export} is ready for transformers")
    model = GPT.from_checkpoint(checkpoint)
    model.to(use_device, getattr(torch, pick_dtype(dtype, use_device)))
    optimize_for_generation(model, compile is True)

    write = print_probs if show_probs else complete
    if chat or start == "-":
        note(source)
        return answer_lines(model, tokenizer, write)
    try:
        prompts = [encode_prompt(tokenizer, text) for text in read_prompts()]
    except UserError as error:  # the file is missing, or a character is not in the vocabulary
        raise UserError(f"{error}; choose another --start than {start!r:.60}") from None
    note(source)
    first = write(model, tokenizer, prompts)
    if page:
        write_page(model, tokenizer, path, first)


if __name__ == "__main__":
    try:
        main()
    except (ImportError, MemoryError, ModelError, OSError, UserError, torch.OutOfMemoryError) as error:
        give_up(sys.stdout)
        # the reader of our output, such as head, may have had enough
        if page or not isinstance(error, BrokenPipeError):
            note(f"sample.py: {str(error) or 'out of memory'}")
            sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("sample.py: interrupted; nothing half-done is left")
