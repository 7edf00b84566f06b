"""Generate text from a checkpoint. The text alone goes to standard output, as it is generated.

python sample.py --out_dir=out/quickstart --start="The for statement"
python sample.py --init_from=out/quickstart/ckpt.pt --start=FILE:prompt.txt --num_samples=3 --temperature=0
python sample.py --init_from=gpt2 --start="The capital of France is" --show_probs=True
"""

import signal
from typing import Literal

from configurator import UserError, configure

out_dir = "out"  # a run of train.py
init_from = "resume"  # resume (out_dir's best.pt, else ckpt.pt), gpt2 and its sizes, or a checkpoint
start: str | None = None  # the prompt; FILE:path; -, each line of standard input; None: as a text begins
num_samples = 1  # how many of a prompt, generated together
max_new_tokens = 500  # tokens in each
temperature = 0.8  # below 1 more of what is likely, above 1 more variety; 0: always the likeliest token
top_k: int | None = 200  # choose among so many likeliest tokens; None: all
top_p: float | None = None  # choose among the likeliest that have this probability together; None: all
stop: str | None = None  # end a sample where it has generated this text; end-of-text always ends it
export: str | None = None  # instead of a text: a new folder with model and tokenizer for transformers
show_probs = False  # instead of a text: a table of the likeliest next tokens at several temperatures
seed = 1337  # the same seed, the same text
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it
compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: no, it takes longer than a sample

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    configure(globals())  # before the slow imports: --help and a mistyped key answer at once

import json
import math
import mmap
import os
import sys
import time
from pathlib import Path

import torch

from model import (
    GPT,
    ModelError,
    check_compiler,
    check_sampling,
    load_checkpoint,
    next_token_probs,
    pick_device,
    pick_dtype,
)
from prepare import (
    TextFiles,
    Tokenizer,
    as_hugging_face,
    clean,
    give_up,
    read_json,
    speak_utf8,
    tokenizer_of,
    visible,
    weights_path,
)

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


def prompts():
    """The one that start is, that of a file, or, for "-", each line of standard input. Raises UserError."""
    if start is None:
        yield ""
    elif start.startswith("FILE:"):
        path = Path(start[5:]).expanduser()
        if not path.is_file():  # a pipe, of which nobody may write the other end
            raise UserError(f"--start={start}: there is no such file")
        yield "".join(TextFiles([]).read_text(path))  # checked as a corpus is
    elif start != "-":
        yield start
    else:
        ask = "> " if sys.stdin.isatty() else ""
        print(ask, end="", file=sys.stderr, flush=True)
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # clean refuses other bytes
        for line in sys.stdin:
            yield line.rstrip("\r\n")
            print(ask, end="", file=sys.stderr, flush=True)


def crop(ids, longest):
    """The last token IDs of a prompt, as many as the model can look at."""
    if len(ids) > longest:
        print(f"the prompt is cropped to its last {longest} of {len(ids)} tokens", file=sys.stderr)
    return ids[-longest:]


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
        self.tokenizer, self.stop = tokenizer, stop
        self.held = prompt[-1:]  # tokens whose text is not out yet, after one whose text is
        self.shown = tokenizer.decode(self.held)
        self.waiting = ""  # text that is not out yet
        self.ended = False

    def push(self, token: int) -> str:
        """Take a token; return the text that is ready. Nothing is, once the stream has ended."""
        if self.ended:
            return ""
        if token == self.tokenizer.end_of_text:
            return self.end()
        self.held.append(token)
        text = self.tokenizer.decode(self.held)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # the rest of a character is to come
        self.waiting += text[len(self.shown) :]
        self.held = self.held[-1:]  # a word tokenizer needs it to join the next word
        self.shown = self.tokenizer.decode(self.held)
        if not self.stop:
            keep = 0
        elif self.stop in self.waiting:
            return self.end()
        else:
            # so many characters at the end may be the beginning of stop
            keep = max(n for n in range(len(self.stop)) if self.waiting.endswith(self.stop[:n]))
        ready = self.waiting[: len(self.waiting) - keep]
        self.waiting = self.waiting[len(ready) :]
        return ready

    def end(self) -> str:
        """No token follows; return the text that was waiting for one."""
        self.ended = True
        text = self.waiting + self.tokenizer.decode(self.held)[len(self.shown) :]
        self.waiting, self.held, self.shown = "", [], ""
        return text.split(self.stop)[0] if self.stop else text


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


def complete(model, tokenizer, prompt, ids, generator):
    """Print num_samples continuations of a prompt's IDs, made as one batch, the first one as it comes."""
    idx = torch.tensor([ids] * num_samples, device=generator.device)  # (B, T)
    sampling = (temperature, top_k, top_p, generator, tokenizer.end_of_text, tokenizer.vocab_size)
    streams = [TextStream(tokenizer, ids, stop) for _ in range(num_samples)]
    texts, count, started = [""] * num_samples, 0, time.perf_counter()
    print(prompt, end="", file=sys.stderr, flush=True)
    for tokens in model.generate_stream(idx, max_new_tokens, *sampling):  # each (B, 1)
        count += num_samples
        for i, token in enumerate(tokens[:, 0].tolist()):
            text = streams[i].push(token)
            texts[i] += text
            if i == 0:
                print(visible(text, sys.stdout), end="", flush=True)
        if all(stream.ended for stream in streams):
            break
    seconds = time.perf_counter() - started
    print(visible(streams[0].end(), sys.stdout), flush=True)
    for text, stream in zip(texts[1:], streams[1:], strict=True):
        print("---", flush=True)  # in a file too, samples must not run together
        print(prompt, end="", file=sys.stderr, flush=True)
        print(visible(text + stream.end(), sys.stdout), flush=True)
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)


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
        if not least <= globals()[name] < 2**63:
            raise UserError(f"{name} cannot be {globals()[name]}")
    check_sampling(temperature, top_k, top_p)


def check_memory(model):
    """Raises UserError where num_samples would need more than half of the machine's memory."""
    config = model.config
    # float32 numbers a sample: keys and values, some copies of its logits, and its text
    numbers = 2 * config.n_layer * config.n_embd * config.block_size + 8 * config.vocab_size + 1000
    needed = 4 * num_samples * numbers
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf  # Windows does not say
    if needed > pages * mmap.PAGESIZE / 2:
        raise UserError(f"{num_samples=} need {needed >> 30:,} GB of memory")


def check_stop(tokenizer):
    """Raises UserError where the tokenizer can never write the text of stop."""
    text = stop or ""
    lost = set(text) - set(tokenizer.decode(tokenizer.encode(text))) - {" "}
    if lost:
        raise UserError(f"--stop={stop!r} never comes: this vocabulary cannot write {min(lost)!r}")


def export_folder(checkpoint, tokenizer):
    """Write a Hugging Face folder that works as it stands. Raises ModelError or UserError where it cannot."""
    folder = Path(export)
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
    check_memory(model)
    optimize_for_generation(model, num_samples, compile is True)
    source = path
    if "step" in checkpoint:
        best = checkpoint.get("best_val_loss", math.nan)
        source += f": step {checkpoint['step']}, best validation loss {best:.4f}"
    for prompt in prompts():
        try:
            prompt = clean(prompt)
            ids = tokenizer.encode(prompt) or [first_token(tokenizer)]
        except UserError as error:  # the prompt has a character that the model does not know
            if start != "-":
                raise UserError(f"{error}; choose another --start than {prompt!r:.40}") from None
            print(error, file=sys.stderr)  # the next line may do better
            continue
        if source:
            print(source, file=sys.stderr)
            source = ""  # once is enough
        ids = crop(ids, model.config.block_size)
        if show_probs:
            print_probs(model, tokenizer, ids, use_device)
        else:
            generator = torch.Generator(use_device).manual_seed(seed)  # a prompt's text depends on no other
            complete(model, tokenizer, prompt, ids, generator)


if __name__ == "__main__":
    try:
        main()
    except (MemoryError, ModelError, OSError, UserError, torch.OutOfMemoryError) as error:
        give_up(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # which says that whoever read our output has had enough
            sys.exit(f"sample.py: {str(error) or 'out of memory'}")
