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
start = "\n"  # the prompt; FILE:path, the text of a file; -, each line of standard input
num_samples = 1  # how many of a prompt, generated together
max_new_tokens = 500  # tokens in each
temperature = 0.8  # below 1 more of what is likely, above 1 more variety; 0: always the likeliest token
top_k: int | None = 200  # choose among so many likeliest tokens; None: all
top_p: float | None = None  # choose among the likeliest that have this probability together; None: all
stop: str | None = None  # end a sample where it has generated this text; end-of-text always ends it
show_probs = False  # instead of a text: a table of the likeliest next tokens at several temperatures
seed = 1337  # the same seed, the same text
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it
compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: no, it takes longer than a sample

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    configure(globals())  # before the slow imports: --help and a mistyped key answer at once

import json
import os
import sys
import time
from pathlib import Path

import torch

from model import GPT, ModelError, load_checkpoint, next_token_probs, pick_device, pick_dtype
from prepare import Tokenizer, load_tokenizer, weights_path

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


def find_tokenizer(checkpoint):
    """The tokenizer of a checkpoint's weights. Raises UserError where nothing says which one that is.

    Ours say it themselves, nanoGPT's by the name of the dataset. Weights from elsewhere have GPT-2's, if they
    are large enough for it.
    """
    size = checkpoint["model_args"]["vocab_size"]
    path = Path("data", checkpoint.get("config", {}).get("dataset", ""), "meta.json")
    if "meta" in checkpoint:
        meta = checkpoint["meta"]
    elif path.is_file():
        meta = json.loads(path.read_text(encoding="utf-8"))
    elif size >= 50257:
        meta = {"tokenizer": {"type": "gpt2"}}
    elif "config" in checkpoint:
        raise UserError(f"the checkpoint does not hold its tokenizer; prepare its dataset, for {path}")
    else:
        raise UserError("the checkpoint does not hold its tokenizer, and its vocabulary is not GPT-2's")
    tokenizer = load_tokenizer(meta)
    if tokenizer.vocab_size > size:
        raise UserError(f"the model's vocabulary of {size} is not that of its tokenizer")
    return tokenizer


def prompts():
    """The one that start is, that of a file, or, for "-", each line of standard input."""
    if start.startswith("FILE:"):
        yield Path(start[5:]).read_text(encoding="utf-8")
    elif start != "-":
        yield start
    else:
        ask = "> " if sys.stdin.isatty() else ""
        print(ask, end="", file=sys.stderr, flush=True)
        for line in sys.stdin:
            yield line.rstrip("\n")
            print(ask, end="", file=sys.stderr, flush=True)


def encode_prompt(model, tokenizer, prompt):
    """The prompt's last block_size token IDs, or end-of-text where it has none. Raises UserError."""
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text or 0]
    longest = model.config.block_size
    if len(ids) > longest:
        print(f"the prompt is cropped to its last {longest} of {len(ids)} tokens", file=sys.stderr)
    return ids[-longest:]


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
def print_probs(model, tokenizer, prompt, device):
    """Print what may come after a prompt: the ten likeliest tokens, their probabilities, and bars."""
    idx = torch.tensor([encode_prompt(model, tokenizer, prompt)], device=device)  # (1, T)
    logits = model(idx)[0][:, -1, : tokenizer.vocab_size]  # (1, V)
    temperatures = (0.5, 1.0, 1.5)
    probs = [next_token_probs(logits, t)[0] for t in temperatures]  # each (V,)
    print("".join(f"temperature {t:<18}" for t in temperatures) + "next token")
    for token in logits[0].topk(min(10, tokenizer.vocab_size)).indices.tolist():
        for p in probs:
            bar = "█" * round(20 * p[token].item())
            print(f"{p[token]:6.1%} {bar:22}", end=" ")
        print(repr(tokenizer.decode([token])))


def complete(model, tokenizer, prompt, generator):
    """Print num_samples continuations of a prompt, made as one batch, the first one as it comes."""
    ids = encode_prompt(model, tokenizer, prompt)
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
                print(text, end="", flush=True)
        if all(stream.ended for stream in streams):
            break
    seconds = time.perf_counter() - started
    print(streams[0].end(), flush=True)
    for text, stream in zip(texts[1:], streams[1:], strict=True):
        print(f"---\n{prompt}", end="", file=sys.stderr, flush=True)
        print(text + stream.end(), flush=True)
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)


def lay_out_input_major(model):
    """Hold matrices as (in, out), as GPT-2's own files do, for float32 on a CPU.

    Eight samples at a time come 1.16 to 1.33 times as fast, 4 or 16 of them 1.05 times, and one as fast,
    but two or three at 0.66 of the speed (GPT-2 124M, two cores of an Intel Xeon).
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.T.contiguous().T


def optimize_for_generation(model, num_samples, compiled):
    """Make the steps of one token faster, once the model is on its device and of its precision."""
    weight = model.lm_head.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and num_samples not in (2, 3):
        lay_out_input_major(model)
    if compiled:
        # on a GPU a CUDA graph, which saves the launch of each kernel
        mode = "reduce-overhead" if weight.is_cuda else None
        model.compiled_step = torch.compile(model.next_logits, mode=mode, dynamic=False)


def check_settings():
    """Raises UserError where a setting cannot work."""
    for name, least in (("num_samples", 1), ("max_new_tokens", 0), ("temperature", 0), ("seed", 0)):
        if not least <= globals()[name] < 2**63:
            raise UserError(f"{name} cannot be {globals()[name]}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p}")


def main():
    check_settings()
    use_device = pick_device(device)
    checkpoint = load_checkpoint(find_checkpoint())
    model = GPT.from_checkpoint(checkpoint)
    tokenizer = find_tokenizer(checkpoint)
    model.to(use_device, getattr(torch, pick_dtype(dtype, use_device)))
    optimize_for_generation(model, num_samples, compile is True)
    generator = torch.Generator(use_device).manual_seed(seed)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    for prompt in prompts():
        try:
            if show_probs:
                print_probs(model, tokenizer, prompt, use_device)
            else:
                complete(model, tokenizer, prompt, generator)
        except UserError as error:  # the prompt has a character that the model does not know
            if start != "-":
                raise UserError(f"{error}; choose another --start than {prompt!r:.40}") from None
            print(error, file=sys.stderr)  # the next line may do better


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UnicodeDecodeError as error:
        sys.exit(f"sample.py: the prompt is not UTF-8: {error}")
    except (ModelError, OSError, UserError) as error:
        sys.exit(f"sample.py: {error}")
