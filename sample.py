"""Generate text from a checkpoint. The text alone goes to standard output, as it is generated.

python sample.py --out_dir=out/quickstart --start="The for statement"
python sample.py --init_from=out/quickstart/ckpt.pt --start=FILE:prompt.txt --num_samples=3 --temperature=0
python sample.py --init_from=gpt2 --start="The capital of France is" --show_probs=True
python sample.py --out_dir=out/quickstart --start="The for statement" --max_new_tokens=200 --page=look.html
python sample.py --out_dir=out/instructions --chat=True
"""

import signal
from typing import Literal

from configurator import UserError, configure

out_dir = "out"  # a run of train.py
init_from = "resume"  # resume (out_dir's best.pt, else ckpt.pt), gpt2 and its sizes, or a checkpoint
start: str | None = None  # a prompt; FILE:path; LINES:path, one a line; -: lines of input; None: a beginning
num_samples = 1  # how many of a prompt, generated together
max_new_tokens = 500  # tokens in each
temperature = 0.8  # below 1 more of what is likely, above 1 more variety; 0: always the likeliest token
top_k: int | None = 200  # choose among so many likeliest tokens; None: all
top_p: float | None = None  # choose among the likeliest that have this probability together; None: all
stop: str | None = None  # end a sample where it has generated this text; end-of-text always ends it
slide: int | None = None  # a full context moves on by so many tokens at once; None: a quarter of it; 1: exact
page: str | None = None  # with the text, a .html file that shows what the model saw
chat = False  # answer each line of standard input; /new forgets what was said before
export: str | None = None  # instead of a text: a new folder with model and tokenizer for transformers
show_probs = False  # instead of a text: a table of the likeliest next tokens at several temperatures
seed = 1337  # the same seed, the same text
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it
compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: no, it takes longer than a sample

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    configure(globals())  # before the slow imports: --help and a mistyped key answer at once

import base64
import json
import math
import sys
import time
import zlib
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
    TextFiles,
    Tokenizer,
    as_hugging_face,
    clean,
    give_up,
    read_json,
    render,
    speak_utf8,
    tokenizer_of,
    visible,
    weights_path,
    write_file,
)

# numbers in a batch: keys, values and some logits of each text; float32 makes 8 GB of them
BATCH_NUMBERS = 2 << 30

# -- what is read --------------------------------------------------------------------------------------------


def find_checkpoint():
    """The path of the checkpoint that init_from and out_dir name. Raises UserError."""
    if init_from != "resume":
        return weights_path(init_from)
    for name in ("best.pt", "ckpt.pt"):
        path = Path(out_dir, name)
        if path.exists():
            return str(path)
    raise UserError(f"there is no {out_dir}/best.pt; train a run first, or name one by --out_dir")


def input_lines():
    """Each line of standard input, which a terminal is asked for."""
    ask = "> " if sys.stdin.isatty() else ""
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # clean refuses other bytes
    print(ask, end="", file=sys.stderr, flush=True)
    for line in sys.stdin:
        yield line.rstrip("\r\n")
        print(ask, end="", file=sys.stderr, flush=True)


def prompts():
    """Lists of the prompts that are continued together: one, or, of LINES:path, all. Raises UserError."""
    kind, colon, path = (start or "").partition(":")
    if colon and kind in ("FILE", "LINES"):
        path = Path(path).expanduser()
        if not path.is_file():  # a pipe, of which nobody may write the other end
            raise UserError(f"--start={start}: there is no such file")
        text = "".join(TextFiles([]).read_text(path))  # checked as a corpus is
        yield [text] if kind == "FILE" else text.removesuffix("\n").split("\n")
    elif start == "-":
        for line in input_lines():
            yield [line]
    else:
        yield [start or ""]


def crop(ids, longest):
    """The last token IDs of a prompt, as many as the model can look at."""
    if len(ids) > longest:
        print(f"the prompt is cropped to its last {longest} of {len(ids)} tokens", file=sys.stderr)
    return ids[-longest:]


def encode_prompt(tokenizer, text, longest):
    """The text, cleaned, and its token IDs, as many as the model can look at. Raises UserError."""
    text = clean(text)
    return text, crop(tokenizer.encode(text) or [first_token(tokenizer)], longest)


def first_token(tokenizer):
    """What a text may begin after: end-of-text, else a newline, else the vocabulary's first token."""
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    try:
        return tokenizer.encode("\n")[0]
    except UserError:  # no newline in the vocabulary
        return 0


# -- what is written -----------------------------------------------------------------------------------------


class TextStream:
    """Makes text of the token IDs that come one by one after a prompt, up to stop or end-of-text.

    Never half a UTF-8 character: its bytes wait for the others, and so does what may be the start of stop.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list, stop: str | None):
        self.tokenizer, self.stop = tokenizer, stop or ""
        self.ids = []  # all tokens that have come
        self.text = ""  # all text that is out
        self.waiting = ""  # text that may be the beginning of stop
        self.held = prompt[-1:]  # tokens whose text is not out yet, after one whose text is
        self.shown = tokenizer.decode(self.held)
        self.ended = False

    def push(self, token: int) -> str:
        """Take a token; return the text that is ready. Nothing is, once the stream has ended."""
        if self.ended:
            return ""
        self.ids.append(token)
        if token == self.tokenizer.end_of_text:
            return self.end()
        self.held.append(token)
        text = self.tokenizer.decode(self.held)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # the rest of a character is to come
        self.waiting += text[len(self.shown) :]
        self.held = self.held[-1:]  # a word tokenizer needs it to join the next word
        self.shown = self.tokenizer.decode(self.held)
        if self.stop and self.stop in self.waiting:
            return self.end()
        kept = (n for n in range(len(self.stop)) if self.waiting.endswith(self.stop[:n]))
        return self.release(len(self.waiting) - max(kept, default=0))

    def end(self) -> str:
        """No token follows; return the text that was waiting for one."""
        self.ended = True
        text = self.waiting + self.tokenizer.decode(self.held)[len(self.shown) :]
        self.held, self.shown = [], ""
        self.waiting = text.split(self.stop)[0] if self.stop else text
        return self.release(len(self.waiting))

    def release(self, length):
        ready = self.waiting[:length]
        self.waiting = self.waiting[length:]
        self.text += ready
        return ready


@torch.no_grad()
def print_probs(model, tokenizer, ids, device):
    """Print what may come after a prompt: the ten likeliest tokens, their probabilities, and bars."""
    idx = torch.tensor([ids], device=device)  # (1, T)
    logits = model(idx)[0][:, -1, : tokenizer.vocab_size]  # (1, V)
    temperatures = (0.5, 1.0, 1.5)
    probs = [next_token_probs(logits, t)[0] for t in temperatures]  # each (V,)
    print("".join(f"temperature {t:<18}" for t in temperatures) + "next token")
    for token in logits[0].topk(min(10, tokenizer.vocab_size)).indices.tolist():
        for p in probs:
            bar = "█" * round(20 * p[token].item())
            print(f"{p[token]:6.1%} {bar:22}", end=" ")
        print(repr(tokenizer.decode([token])))


def continue_batch(model, tokenizer, batch, shows=False):
    """Continue token IDs of one length together; returns the TextStream of each.

    batch: [(token IDs, its seed)]: each draws as if it were alone. shows: print the first text as it comes.
    """
    idx = torch.tensor([ids for ids, _ in batch], device=model.lm_head.weight.device)  # (B, T)
    generators = [torch.Generator(idx.device).manual_seed(its_seed) for _, its_seed in batch]
    sampling = (temperature, top_k, top_p, generators, tokenizer.end_of_text, tokenizer.vocab_size)
    move_on = value_or(slide, max(1, model.config.block_size // 4))
    streams = [TextStream(tokenizer, ids, stop) for ids, _ in batch]
    for tokens in model.generate_stream(idx, max_new_tokens, *sampling, move_on):  # each (B, 1)
        ready = [stream.push(token) for stream, token in zip(streams, tokens[:, 0].tolist(), strict=True)]
        if shows:
            print(visible(ready[0], sys.stdout), end="", flush=True)
        if all(stream.ended for stream in streams):
            break
    ready = [stream.end() for stream in streams]
    if shows:
        print(visible(ready[0], sys.stdout), flush=True)
    return streams


def complete(model, tokenizer, prompts):
    """Print num_samples continuations of each prompt, (text, token IDs); returns the first TextStream."""
    rows = [(text, ids, seed + i) for text, ids in prompts for i in range(num_samples)]
    started = time.perf_counter()
    print(rows[0][0], end="", file=sys.stderr, flush=True)
    streams = {}  # {number of its row: TextStream}
    for batch in batches(rows, model.config):
        texts = continue_batch(model, tokenizer, [rows[i][1:] for i in batch], shows=not streams)
        streams |= zip(batch, texts, strict=True)
    seconds = time.perf_counter() - started
    for i in range(1, len(rows)):
        print("---", flush=True)  # in a file too, samples must not run together
        print(rows[i][0], end="", file=sys.stderr, flush=True)
        print(visible(streams[i].text, sys.stdout), flush=True)
    count = sum(len(stream.ids) for stream in streams.values())
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)
    return streams[0]


def batches(rows, config):
    """Lists of the numbers of rows (text, token IDs, seed) made together: of one length, as many as fit."""
    by_length = {}
    for i, (_, ids, _) in enumerate(rows):
        by_length.setdefault(len(ids), []).append(i)
    # keys and values, and some copies of its logits
    row_size = 2 * config.n_layer * config.n_embd * config.block_size + 8 * config.vocab_size
    most = max(1, BATCH_NUMBERS // row_size)
    for same in by_length.values():
        for place in range(0, len(same), most):
            yield same[place : place + most]


def answer_lines(model, tokenizer):
    """Answer each line of standard input, an instruction, with what was said before in the context."""
    said = []
    for line in input_lines():
        if line.strip() == "/new":
            said = []
        elif line.strip():
            messages = [*said, {"role": "user", "content": line}]
            try:
                ids = encode_conversation(tokenizer, messages)
            except UserError as error:  # the next line may do better
                print(error, file=sys.stderr)
                continue
            # the oldest question and its answer make room: half of the context is for the new answer
            while len(ids) > model.config.block_size // 2 and len(messages) > 1:
                del messages[:2]
                ids = encode_conversation(tokenizer, messages)
            batch = [(crop(ids, model.config.block_size), seed)]
            answer = continue_batch(model, tokenizer, batch, shows=True)[0].text
            said = [*messages, {"role": "assistant", "content": answer}]


def encode_conversation(tokenizer, messages):
    """Token IDs, as prepare.py has made them of the conversations that were learned."""
    return [token for piece in render(messages) for token in tokenizer.encode(piece)]


# -- a look inside -------------------------------------------------------------------------------------------


def numbers(tensor):
    """Its numbers as lists, with as many digits as a page needs."""
    return tensor.double().round(decimals=3).tolist()


@torch.no_grad()
def look_inside(model, tokenizer, ids):
    """What a model sees in a text of T tokens: the data of assets/look.html.

    model: is left so that attention is spelled out and its weights are kept
    """
    parts = model.transformer
    streams = []  # the residual stream (1, T, C) after the embeddings and after each block
    weights = []  # of each block's attention, (H, T, T): the share of each earlier token
    for part in (parts.drop, *parts.h):
        part.register_forward_hook(lambda _part, _inputs, x: streams.append(x))
    for block in parts.h:
        block.attn.attn_dropout.register_forward_hook(lambda _part, _inputs, w: weights.append(w[0]))
    model.config.flash = False  # the fused kernel makes no weights
    idx = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T)
    model(idx)

    layers = []
    for x in streams:  # what would be predicted if the model ended there
        logits = model.lm_head(parts.ln_f(x))[0, :, : tokenizer.vocab_size]
        logprobs = logits.float().log_softmax(-1)  # (T, V)
        top = logprobs.topk(min(10, tokenizer.vocab_size))
        layers.append({"ids": top.indices.tolist(), "logprobs": numbers(top.values)})
    found = logprobs[:-1].gather(1, idx[0, 1:, None])  # (T - 1, 1), of the tokens that came
    temperatures = [step / 10 for step in range(1, 21)]
    scales = torch.stack([(logprobs / t).logsumexp(-1) for t in temperatures], dim=1)  # (T, temperatures)
    known = {*ids, *(token for layer in layers for row in layer["ids"] for token in row)}
    # a byte for each weight on an earlier token or itself, row by row; the root keeps small ones apart
    earlier = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    pixels = [(255 * w.cpu().float().sqrt()).round().byte()[:, earlier].numpy().tobytes() for w in weights]
    return {
        "ids": ids,
        "texts": {token: tokenizer.decode([token]) for token in known},
        "logprobs": numbers(found[:, 0]),
        "ranks": (1 + (logprobs[:-1] > found).sum(-1)).tolist(),
        "layers": layers,
        "temperatures": temperatures,
        "scales": numbers(scales),
        "heads": model.config.n_head,
        "attention": base64.b64encode(zlib.compress(b"".join(pixels))).decode(),
    }


def write_page(data):
    """Write assets/look.html with the data in it, a page that needs nothing else. Raises OSError."""
    template = Path(__file__).with_name("assets") / "look.html"
    text = json.dumps(data).replace("<", "\\u003c")  # nothing in it can end the script that holds it
    html = template.read_text(encoding="utf-8").replace("PAGE_DATA", text)
    write_file(Path(page).expanduser(), html.encode())
    print(f"{page}: open it in a browser", file=sys.stderr)


# -- faster steps --------------------------------------------------------------------------------------------


def lay_out_input_major(model):
    """Hold matrices as (in, out), as GPT-2's own files do, for float32 on a CPU.

    Eight samples at a time come 1.16 to 1.33 times as fast, 4 or 16 of them 1.05 times, and one as fast,
    but two or three at 0.66 of the speed (GPT-2 124M, two cores of an Intel Xeon).
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.T.contiguous().T


class GraphedStep:
    """A step of one token as a CUDA graph, whose kernels a GPU starts by itself, one after the other.

    Started one by one from Python, they take 3.5 times as long (GPT-2 124M, bfloat16, H200).
    """

    def __init__(self, step):
        self.step = step
        self.cache = None

    def __call__(self, idx, cache):
        if cache is not self.cache:  # another text: its keys and values lie elsewhere
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
        with torch.cuda.stream(stream):  # libraries set themselves up at the first use, which is not recorded
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()

    def run(self):
        self.cache.extend(self.positions)
        self.logits = self.step(self.idx, self.cache)


def optimize_for_generation(model, num_samples, compiled):
    """Make the steps of one token faster, once the model is on its device and of its precision."""
    # a token of a small model is too little work to share: two threads are 1.06 times as fast as one with 1M
    # parameters, 1.25 times with 5M, twice with 51M (an idle Intel Xeon), and on a busy machine far slower
    torch.set_num_threads(min(torch.get_num_threads(), 1 + model.num_params() // 4_000_000))
    weight = model.lm_head.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and num_samples not in (2, 3):
        lay_out_input_major(model)
    step = model.next_logits
    if compiled:
        check_compiler(weight.device)
        step = torch.compile(step, dynamic=False)
    if weight.is_cuda:
        model.config.flash = False  # for one query, the fused kernel takes 1.5 times as long
        step = GraphedStep(step)
    if compiled or weight.is_cuda:
        model.compiled_step = step


def check_settings():
    """Raises UserError or ModelError where a setting cannot work."""
    for name, least in (("num_samples", 1), ("max_new_tokens", 0), ("seed", 0)):
        if not least <= globals()[name] < 2**62:
            raise UserError(f"{name} cannot be {globals()[name]}")
    if page and (not page.endswith(".html") or Path(page).is_dir() or chat or show_probs or start == "-"):
        raise UserError(f"--page={page}: it takes a name that ends in .html, and goes with a text alone")
    if num_samples >= 1_000_000:
        raise UserError(f"{num_samples=} texts do not fit into memory")


def check_stop(tokenizer):
    """Raises UserError where the tokenizer can never write the text of stop."""
    text = stop or ""
    lost = set(text) - set(tokenizer.decode(tokenizer.encode(text))) - {" "}
    if lost:
        raise UserError(f"--stop={stop!r} never comes: this vocabulary cannot write {min(lost)!r}")


def export_folder(checkpoint, tokenizer):
    """Write a Hugging Face folder that works as it stands. Raises ModelError or UserError where it cannot."""
    folder = Path(export).expanduser()
    if folder.exists():
        raise UserError(f"{folder} is there already; --export wants a new folder")
    theirs = as_hugging_face(tokenizer)
    model = GPT.from_checkpoint(checkpoint)
    model.config.vocab_size = tokenizer.vocab_size
    for layer in (model.transformer.wte, model.lm_head):
        layer.weight.data = layer.weight.data[: tokenizer.vocab_size]  # IDs that only pad would be sampled
    model.save_pretrained(folder)
    theirs.save(str(folder / "tokenizer.json"))
    ids, words = {}, {}
    if tokenizer.end_of_text is not None:
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text)
        words = dict.fromkeys(
            ("bos_token", "eos_token", "pad_token"), theirs.id_to_token(tokenizer.end_of_text)
        )
    if "train_learned" in checkpoint.get("meta", {}):  # it has learned to answer
        words["chat_template"] = CHAT_TEMPLATE
    words |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size}
    for name, settings in (
        ("config.json", read_json(folder / "config.json") | ids),
        ("generation_config.json", ids),
        ("tokenizer_config.json", words | {"clean_up_tokenization_spaces": False}),
    ):
        (folder / name).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    print(f"{folder} is ready for transformers", file=sys.stderr)


def main():
    speak_utf8()
    check_settings()
    use_device = pick_device(device)
    path = find_checkpoint()
    checkpoint = load_checkpoint(path)
    tokenizer = tokenizer_of(path, checkpoint)
    if tokenizer.vocab_size > checkpoint["model_args"]["vocab_size"]:
        raise UserError(f"{path}: its tokenizer has more IDs than the model, so they do not belong together")
    if export:
        return export_folder(checkpoint, tokenizer)
    check_stop(tokenizer)
    model = GPT.from_checkpoint(checkpoint)
    model.to(use_device, getattr(torch, pick_dtype(dtype, use_device)))
    optimize_for_generation(model, num_samples, compile is True)
    source = path
    if "step" in checkpoint:
        best = checkpoint.get("best_val_loss", math.nan)
        source += f": step {checkpoint['step']}, best validation loss {best:.4f}"
    if not 1 <= value_or(slide, 1) <= model.config.block_size:
        raise UserError(f"--slide={slide} must be from 1 to block_size={model.config.block_size}")
    if chat and tokenizer.end_of_text is None:
        raise UserError("--chat=True needs a vocabulary with end-of-text, by which an answer ends")
    if chat:
        print(source, file=sys.stderr)
        return answer_lines(model, tokenizer)
    for texts in prompts():
        try:
            encoded = [encode_prompt(tokenizer, text, model.config.block_size) for text in texts]
        except UserError as error:  # a prompt has a character that the model does not know
            if start != "-":
                raise UserError(f"{error}; choose another --start") from None
            print(error, file=sys.stderr)  # the next line may do better
            continue
        if source:
            print(source, file=sys.stderr)
            source = ""  # once is enough
        if show_probs:
            for _, ids in encoded:
                print_probs(model, tokenizer, ids, use_device)
        else:
            stream = complete(model, tokenizer, encoded)
            if page:
                ids = (encoded[0][1] + stream.ids)[-model.config.block_size :]
                prompt_tokens = max(0, len(ids) - len(stream.ids))  # those still in the context
                data = look_inside(model, tokenizer, ids)
                return write_page(data | {"source": path, "prompt_tokens": prompt_tokens})


if __name__ == "__main__":
    try:
        main()
    except (MemoryError, ModelError, OSError, UserError, torch.OutOfMemoryError) as error:
        give_up(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # which says that whoever read our output has had enough
            sys.exit(f"sample.py: {str(error) or 'out of memory'}")
