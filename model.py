"""The whole GPT in one file: its configuration, its parts, the model, and how it generates.

Below the model stands what trains and stores it: the optimizers, and checkpoints in three formats.
The file needs torch alone (and safetensors for Hugging Face's folders). It knows nothing of datasets,
tokenizers or settings: copy it into your own project and it works.

Letters in the shape comments: B batch, T time (tokens), C n_embd, H n_head, D head size C / H, V vocabulary,
S the tokens that a key/value cache has room for.
"""

import json
import math
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's form; Hendrycks and Gimpel 2016, section 2
    "gelu_erf": F.gelu,  # the exact form, which nanoGPT takes
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, Primer
}

FIELD_CHOICES = {
    "activation": ACTIVATIONS,
    "position": ("learned", "rope"),
    "init": ("gpt2", "zero", "torch"),
}
FIELD_RANGES = {  # the smallest value, and the value that it must stay below
    "block_size": (1, 10_000_000),
    "vocab_size": (1, 10_000_000),
    "n_layer": (0, 1000),
    "n_head": (1, 10_000_000),
    "n_embd": (1, 10_000_000),
    "dropout": (0, 1),
    "embd_dropout": (0, 1),
    "attn_dropout": (0, 1),
    "resid_dropout": (0, 1),
}


class ModelError(ValueError):
    """A model that cannot be built, loaded or run as asked: one line that says why."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))


@dataclass
class GPTConfig:
    """The architecture. The defaults are GPT-2 124M. Raises ModelError if a field makes no sense."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which multiplies faster
    n_layer: int = 12  # 0 makes a bigram model
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    embd_dropout: float | None = None  # None follows dropout, here and in the next two
    attn_dropout: float | None = None
    resid_dropout: float | None = None
    bias: bool = True  # biases in Linear and LayerNorm, as GPT-2
    qkv_bias: bool | None = None  # None follows bias
    tie_weights: bool = True  # the token embedding is also the output layer, as GPT-2
    activation: str = "gelu"  # a name in ACTIVATIONS
    position: str = "learned"  # an embedding of each position, as GPT-2; "rope" rotates queries and keys
    qk_norm: bool = False  # scale queries and keys to unit root mean square
    flash: bool = True  # fused scaled_dot_product_attention; False spells the same attention out
    init: str = "gpt2"  # "gpt2", "zero" or "torch": see GPT.init_weights

    def __post_init__(self):
        for name, value in vars(self).items():  # a file may hold values of any type
            kind = GPTConfig.__annotations__[name]
            if not isinstance(value, kind | int):  # an int may stand where a float or a bool is wanted
                raise ModelError(f"{name} cannot be {value!r:.40}")
            if value not in FIELD_CHOICES.get(name, [value]):
                raise ModelError(f"{name}={value!r} is none of {', '.join(FIELD_CHOICES[name])}")
        for name, (low, limit) in FIELD_RANGES.items():
            value = value_or(getattr(self, name), low)
            # True, which Python counts as an int, is no number
            if isinstance(value, bool) or not low <= value < limit:
                raise ModelError(f"{name} must be at least {low} and below {limit}, not {value}")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}")
        if self.position == "rope" and self.head_size % 2:
            raise ModelError("position=rope needs an even n_embd / n_head")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


def value_or(value, default):
    """value, or default where value is None."""
    return default if value is None else value


# -- the parts, in the order in which data meets them --------------------------------------------------------


class Embedding(nn.Embedding):
    """nn.Embedding, but it draws no random weights on the meta device.

    There, these draws would import torch's compiler, which takes a second at each start of sample.py.
    """

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


def rope_angles(positions, head_size):
    """Cosine and sine, each (T, D / 2), of the angles at positions (T,). Su et al. 2021, section 3.2.2."""
    pairs = torch.arange(0, head_size, 2, device=positions.device)
    frequencies = 10000 ** (-pairs / head_size)  # (D / 2,): fast for the first pair, slow for the last
    angles = positions[:, None] * frequencies  # (T, D / 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[..., i], x[..., i + D / 2]) of x (B, H, T, D) by the angle of its position.

    Positions then enter the product of a query and a key only by the distance between the two.
    """
    a, b = x.chunk(2, dim=-1)  # each (B, H, T, D / 2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class KVCache(nn.Module):
    """Keys and values of all tokens so far, for all blocks, so that generation computes each token once.

    There is room for S tokens from the start. Attention always looks at all S places, and a mask hides those
    that are still empty. So no shape changes from token to token, and a step is compiled only once. The cache
    is a module because torch.compile expects that a module's buffers stay in the same place in memory.
    For each step, call extend once; then each block calls update once.
    """

    def __init__(self, config, batch_size, size, like):
        """size: S; like: a weight of the model, whose type and device the cache takes."""
        super().__init__()
        # (n_layer, 2 for keys and values, B, H, S, D)
        self.register_buffer(
            "kv", like.new_zeros(config.n_layer, 2, batch_size, config.n_head, size, config.head_size)
        )

    def extend(self, positions):
        """Make ready for new tokens at positions (T,). Each may look at itself and at those before it."""
        self.new_positions = positions
        # True where a new token (T, 1) may look at a place (S,): (T, S)
        self.mask = torch.arange(self.kv.size(4), device=positions.device) <= positions[:, None]

    def update(self, layer, k, v):
        """Store a block's new keys and values (B, H, T, D); return those of all places, (B, H, S, D)."""
        kv = self.kv[layer]  # (2, B, H, S, D)
        # this writes into the cache in place; autocast may have made k and v bfloat16
        return kv.index_copy_(3, self.new_positions, torch.stack((k, v)).type_as(kv))


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and the past (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config, layer=0):
        super().__init__()
        self.config = config
        self.layer = layer
        # queries, keys and values of all heads come from one matrix: one large product is faster than three
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=value_or(config.qkv_bias, config.bias))
        # the output projection mixes what the heads have found
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(value_or(config.attn_dropout, config.dropout))

    def forward(self, x, angles=None, cache=None):
        """x: (B, T, C); angles: rotary ones of the T positions; cache: a KVCache. Returns (B, T, C)."""
        B, T, C = x.shape
        H, D = self.config.n_head, self.config.head_size
        # (B, T, 3C) -> (B, T, 3, H, D) -> (3, B, H, T, D), of which each part is (B, H, T, D)
        q, k, v = self.c_attn(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        if self.config.qk_norm:
            q, k = (F.rms_norm(vectors, (D,), eps=1e-6).type_as(v) for vectors in (q, k))
        if angles:
            q, k = rotate(q, *angles), rotate(k, *angles)

        # None stands for the causal mask: each token looks at itself and those before it. S is T then.
        mask = None
        if cache:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
            mask = cache.mask  # (T, S)
        if self.config.flash:
            # one kernel, which never writes the (T, S) scores to memory (Dao et al. 2022, FlashAttention)
            dropout = self.attn_dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        else:
            if mask is None:
                mask = x.new_ones(T, T).tril().bool()
            # without the division, scores grow with sqrt(D), and softmax puts nearly all weight on one token
            scores = q @ k.mT / math.sqrt(D)  # (B, H, T, S)
            scores = scores.masked_fill(~mask, -math.inf)  # softmax turns these into 0
            weights = scores.softmax(dim=-1)  # how much to take of each token; each row sums to 1
            y = self.attn_dropout(weights) @ v  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)

        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.c_proj(y)


class MLP(nn.Module):
    """Two linear layers for each position on its own: four times wider, a nonlinearity, and back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = config.activation
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = ACTIVATIONS[self.activation](self.c_fc(x))  # (B, T, C) -> (B, T, 4C)
        return self.c_proj(x)  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """Attention, then the MLP, each with a LayerNorm before it and a shortcut around it (pre-norm)."""

    def __init__(self, config, layer=0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.resid_dropout = nn.Dropout(value_or(config.resid_dropout, config.dropout))

    def forward(self, x, angles=None, cache=None):
        x = x + self.resid_dropout(self.attn(self.ln_1(x), angles, cache))
        return x + self.resid_dropout(self.mlp(self.ln_2(x)))  # (B, T, C)


# -- choosing the next token ---------------------------------------------------------------------------------

# The attention kernels for generation. cuDNN's is left out: on Hopper and later GPUs it makes a plan for each
# new length, which takes 30 ms.
GENERATION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities (B, V) float32 of the next token, from its logits (B, V); excluded tokens get 0.

    In this order: logits are divided by temperature (0 is greedy); the top_k largest are kept; of those, the
    smallest set of most probable tokens whose probabilities sum to at least top_p (nucleus sampling, Holtzman
    et al. 2019). Raises ModelError if one of the three makes no sense.
    """
    # written so that NaN is refused too
    if not (temperature >= 0 and value_or(top_k, 1) >= 1 and 0 < value_or(top_p, 1) <= 1):
        raise ModelError("temperature must be at least 0, top_k at least 1, top_p above 0 and at most 1")
    if temperature < 1e-30:  # 0, or less than float32 can divide by
        temperature, top_k = 1.0, 1  # greedy: only the likeliest token is left
    # the largest becomes 0, so that nothing overflows
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        kept, ids = logits.topk(min(top_k, logits.size(-1)))
        logits = torch.full_like(logits, -math.inf).scatter(-1, ids, kept)
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, order = probs.sort(stable=True)  # each (B, V), the least probable first
        tail = ordered.cumsum(-1) <= 1 - top_p  # without these, the others still sum to top_p
        tail[:, -1] = False  # the most probable token stays, however small top_p is
        probs = probs.masked_fill(tail.scatter(-1, order, tail), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)  # the rest sums to 1 again
    return probs


def draw(probs, generator):
    """Draw a token ID for each row of probs (B, V): the first whose running sum reaches a random number.

    Returns (B, 1). torch.multinomial draws a number for each of the V IDs, which takes 9 ms for 8 rows of
    GPT-2's vocabulary; this takes 1 ms.
    """
    sums = probs.cumsum(-1)
    generators = generator if isinstance(generator, list) else [generator]
    rows = len(probs) // len(generators)  # the rows of each generator
    draws = [torch.rand(rows, 1, generator=each, device=probs.device) for each in generators]
    # in (0, 1], not in [0, 1), so that an ID of probability 0 is never drawn
    uniform = 1 - torch.cat(draws)
    return torch.searchsorted(sums, sums[:, -1:] * uniform)


# -- the model -----------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """A GPT-2-style language model (Radford et al. 2019). Its parameters have GPT-2's names."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # Keep this order: each module draws random weights, and published numbers depend on the order.
        # Keep the names too. They are GPT-2's: token and position embeddings (wte, wpe), blocks (h), and the
        # final LayerNorm (ln_f).
        parts = self.transformer = nn.ModuleDict()
        parts.wte = Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            parts.wpe = Embedding(config.block_size, config.n_embd)
        parts.drop = nn.Dropout(value_or(config.embd_dropout, config.dropout))
        parts.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        parts.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            # sharing one matrix saves 39M parameters of GPT-2 124M (Press and Wolf 2017)
            self.lm_head.weight = parts.wte.weight
        if config.init != "torch" and not self.lm_head.weight.is_meta:
            self.init_weights()

    def init_weights(self):
        """Draw matrices from N(0, 0.02), set biases to 0. With init="torch" the layers keep their own draws.

        The outputs of 2 n_layer projections add up in the residual stream. So "gpt2" divides the 0.02 of
        these by sqrt(2 n_layer) (Radford et al. 2019, section 2.3). "zero" sets them to 0, so that each block
        begins as the identity.
        """
        for name, p in self.named_parameters():
            std = 0.02
            if name.endswith("c_proj.weight"):
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if self.config.init == "gpt2" else 0.0
            if p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, all_logits=False, cache=None):
        """Predict the next token at each position, and compute the loss if targets are given.

        idx: (B, T) int64 token IDs. targets: (B, T) int64; targets of -1 are ignored.
        cache: a KVCache that was extended by the positions of idx. Without a cache they begin at 0.
        Returns without targets: the logits of the last position (B, 1, V), and None.
        Returns with targets: None, and the loss, the mean cross-entropy in nats.
        With all_logits, both cases return the logits of all positions (B, T, V), which take much memory.
        Raises ModelError if T exceeds block_size.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ModelError(f"{T} tokens are more than block_size={self.config.block_size}")
        positions = cache.new_positions if cache else torch.arange(T, device=idx.device)  # (T,)
        x = self.transformer.wte(idx)  # (B, T, C)
        angles = None
        if self.config.position == "rope":
            angles = rope_angles(positions, self.config.head_size)
        else:
            x = x + self.transformer.wpe(positions)  # (B, T, C) + (T, C) -> (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, angles, cache)
        x = self.transformer.ln_f(x)
        if targets is None and not all_logits:
            x = x[:, -1:]  # generation needs only the last position: (B, 1, C)
        logits = self.lm_head(x)  # (B, T, V), or (B, 1, V)
        if targets is None:
            return logits, None
        # cross_entropy takes one row of logits for each target: (B T, V) and (B T,)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return (logits if all_logits else None), loss

    def num_params(self, non_embedding: bool = False) -> int:
        """Number of parameters. non_embedding counts only those of the blocks, ln_f and the output layer."""
        parts = [self.transformer.h, self.transformer.ln_f, self.lm_head] if non_embedding else [self]
        return sum(p.numel() for part in parts for p in part.parameters())

    def flops_per_token(self) -> int:
        """Floating point operations per token in training, forward and backward pass, at full context.

        6 N + 12 n_layer n_embd T, where N are the parameters without embeddings (Chowdhery et al. 2022, PaLM,
        appendix B).
        """
        c = self.config
        return 6 * self.num_params(non_embedding=True) + 12 * c.n_layer * c.n_embd * c.block_size

    # -- generation ------------------------------------------------------------------------------------------

    compiled_step = None  # whoever generates may put a faster next_logits here, for one token at a time

    @torch.no_grad()
    def generate_stream(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        generator=None,
        stop=None,
        vocab_size=None,
        slide=1,
    ):
        """Continue idx (B, T0), T0 >= 1, and yield each new token as (B, 1) int64. Call eval() first.

        temperature, top_k, top_p: see next_token_probs.
        generator: the random generator of the draws; None is torch's own. A list of generators is shared out
        over the B rows in equal parts.
        stop: the token ID that ends a sequence. The sequence then repeats it until all sequences have ended.
        vocab_size: IDs at or above it are padding and are never sampled.
        slide: how many of the oldest tokens are dropped when the context is full. The cache is then computed
        anew, so 1 is slow; but with 1 each token sees exactly the block_size tokens before it.
        Raises ModelError if an argument makes no sense.
        """
        block_size = self.config.block_size
        if not (idx.dim() == 2 and idx.numel() and idx.dtype == torch.int64):
            raise ModelError("generation needs a prompt (B, T) of int64, with at least one token")
        if not 1 <= slide <= block_size or value_or(vocab_size, 1) < 1 or max_new_tokens < 0:
            raise ModelError("slide must be from 1 to block_size, vocab_size at least 1, max_new_tokens 0")
        # a compiled step is compiled for one S, the largest
        cache_size = block_size if self.compiled_step else min(block_size, idx.size(1) + max_new_tokens)
        cache = KVCache(self.config, idx.size(0), cache_size, self.lm_head.weight)
        ended = torch.zeros_like(idx[:, :1], dtype=torch.bool)
        new = idx = idx[:, -block_size:]  # new: the tokens that are not in the cache yet
        for _ in range(max_new_tokens):
            if idx.size(1) > block_size:
                # the last block_size + 1 - slide tokens stay; their positions change, so all are new
                new = idx = idx[:, slide - 1 - block_size :]
            cache.extend(torch.arange(idx.size(1) - new.size(1), idx.size(1), device=idx.device))
            step = self.next_logits
            if new.size(1) == 1 and self.compiled_step:
                step = self.compiled_step
            with sdpa_kernel(GENERATION_KERNELS):
                logits = step(new, cache)  # (B, V)
            probs = next_token_probs(logits[:, :vocab_size], temperature, top_k, top_p)  # (B, V)
            new = draw(probs, generator)  # (B, 1)
            if stop is not None:
                # a sequence that has ended repeats stop, so that the batch stays a rectangle
                new = new.masked_fill(ended, stop)
                ended |= new == stop
            yield new
            if stop is not None and ended.all():
                return
            idx = torch.cat((idx, new), dim=1)

    def generate(self, idx, max_new_tokens, *sampling, **options):
        """Return idx (B, T0) and up to max_new_tokens more, (B, T0 + N). Arguments as in generate_stream."""
        return torch.cat((idx, *self.generate_stream(idx, max_new_tokens, *sampling, **options)), dim=1)

    def next_logits(self, idx, cache):
        """Logits (B, V) after the tokens idx (B, T). Call cache.extend with their positions just before."""
        return self(idx, cache=cache)[0][:, -1]

    # -- the model ends here; the rest trains and stores it --------------------------------------------------

    def configure_optimizers(self, weight_decay, learning_rate, betas, muon_learning_rate=None):
        """A list of optimizers: AdamW and, with muon_learning_rate, Muon for the matrices of the blocks.

        Weight decay applies to matrices and embeddings, but not to biases and LayerNorms.
        """
        matrices, vectors, for_muon = [], [], []
        for name, p in self.named_parameters():
            kind = matrices
            if p.dim() < 2:
                kind = vectors
            elif muon_learning_rate is not None and name.startswith("transformer.h."):
                kind = for_muon
            kind.append((name, p))
        # decay pulls weights towards 0, where biases and LayerNorm scales have no reason to go
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
        if for_muon:
            optimizers.append(Muon(for_muon, muon_learning_rate, weight_decay, betas[0]))
        return optimizers

    @classmethod
    def from_checkpoint(cls, path: str | dict, device="cpu", **changes):
        """The model of a checkpoint, in float32 and in eval mode.

        path: of the checkpoint, or what load_checkpoint has returned for it
        changes: GPTConfig fields that are to differ: the dropouts, flash, init, or a smaller block_size
        Raises ModelError if the checkpoint cannot be read or its weights do not fit.
        """
        checkpoint = path if isinstance(path, dict) else load_checkpoint(path)
        weights = {}
        try:
            config = GPTConfig(**(checkpoint["model_args"] | changes))
            for name, tensor in checkpoint["model"].items():
                name = name.removeprefix("_orig_mod.")  # the prefix of a compiled model
                if not name.startswith(("transformer.", "lm_head.")):  # Hugging Face's first files lack it
                    name = f"transformer.{name}"
                if name == "transformer.wpe.weight":
                    tensor = tensor[: config.block_size]  # a shorter context drops the last positions
                if name.endswith((".attn.bias", ".attn.masked_bias")):
                    continue  # these are masks, not weights
                if not tensor.is_floating_point():
                    raise ModelError(f"{name} is of {tensor.dtype}")
                weights[name] = tensor
            if config.tie_weights:
                # one Parameter under both names stays one in load_state_dict
                wte = weights["transformer.wte.weight"] = nn.Parameter(weights["transformer.wte.weight"])
                if not torch.equal(weights.get("lm_head.weight", wte), wte):
                    raise ModelError("the output layer differs from the token embedding, against tie_weights")
                weights["lm_head.weight"] = wte
            with torch.device("meta"):  # parameters have shapes, but no memory yet
                model = cls(config)
            model.load_state_dict(weights, assign=True)  # raises if a name, a shape or a type differs
            for p in model.parameters():
                # a dense float32 copy: tensors of a file may overlap, which optimizers do not expect
                p.data = torch.empty(p.shape, device=device).copy_(p)
        except Exception as error:  # a damaged file can raise any type of error
            raise ModelError(f"the checkpoint's weights do not fit the model: {error}") from None
        if not nn.utils.get_total_norm(model.parameters()).isfinite():
            raise ModelError("the checkpoint's weights are not finite")
        return model.eval()

    @classmethod
    def from_pretrained(cls, dir: str, device="cpu", **changes):
        """The model of a Hugging Face folder, which is a checkpoint too: see from_checkpoint."""
        return cls.from_checkpoint(dir, device, **changes)

    def save_pretrained(self, dir: str, end_of_text: int | None = None) -> None:
        """Write config.json and model.safetensors, as transformers' GPT2LMHeadModel reads them.

        end_of_text: the ID that begins, ends and pads texts, as in GPT-2; only the tokenizer knows it
        Raises ModelError, which names the field, if the architecture is not GPT-2's.
        """
        from safetensors.torch import save_file

        config = self.config
        activations = {ours: theirs for theirs, ours in HF_ACTIVATIONS.items()}
        for name, values in (("position", ["learned"]), ("qk_norm", [False]), ("activation", activations)):
            if getattr(config, name) not in values:
                raise ModelError(f"Hugging Face's GPT-2 cannot express {name}={getattr(config, name)}")
        settings = {theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()}
        settings |= {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": activations[config.activation],
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            "pad_token_id": end_of_text,
        }
        # named_parameters leaves out the output layer if it is the token embedding
        weights = {name: transposed(name, p.data) for name, p in self.named_parameters()}
        with torch.device("meta"):
            complete = GPT(replace(config, bias=True, qkv_bias=None))
        for name, p in complete.named_parameters():
            weights.setdefault(name, torch.zeros(p.shape))  # a bias of 0 is the same as no bias
        folder = Path(dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # safetensors lets only its owner read it
        (folder / "config.json").write_text(json.dumps(settings, indent=2))


# -- Muon ----------------------------------------------------------------------------------------------------


def newton_schulz(x):
    """Nearly U V^T for each matrix U S V^T in x (N, rows, columns): all singular values become about 1.

    The iteration and its coefficients are those of Jordan et al. 2024. It need not be exact, so bfloat16 is
    good enough. A CPU without bfloat16 is 80 times slower in bfloat16 than in float32.
    """
    # a tall matrix is transposed, so that x x^T is the smaller product
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    if pick_dtype("auto", x.device.type, training=True) == "bfloat16":
        x = x.bfloat16()
    x = F.normalize(x, dim=(1, 2), eps=1e-7)  # the iteration converges if the norm is at most 1
    for _ in range(5):
        # x becomes 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x: singular values move towards 1
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum: a step of the same size in all directions of a matrix (Jordan et al. 2024).

    It does what torch.optim.Muon does at its defaults, with three differences. Without bfloat16, a CPU or GPU
    works in float32: its step in the quickstart then takes a CPU 0.02 s instead of 0.6 s. It orthogonalizes
    query, key and value separately, although they share one matrix: the loss is 0.017 lower after 250 steps.
    And several processes share the work.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        rank, processes = 0, 1
        if dist.is_initialized():
            rank, processes = dist.get_rank(), dist.get_world_size()
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                # a mean of the gradients so far, in which older ones count less and less
                mean = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                # all processes have the same gradients, so each updates some matrices for all of them
                if i % processes != rank:
                    continue
                # Nesterov: the newest gradient counts once more
                update = p.grad.lerp(mean, group["momentum"])
                rows, columns = p.shape
                if rows == 3 * columns:  # query, key and value: in this GPT only c_attn has this shape
                    rows = columns
                update = newton_schulz(update.view(-1, rows, columns))
                # a tall matrix takes larger steps, so that its output changes as much
                step_size = group["lr"] * math.sqrt(max(1, rows / columns))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update.reshape_as(p), alpha=step_size)
            if processes > 1:
                for i, p in enumerate(group["params"]):
                    dist.broadcast(p, i % processes)


# -- checkpoints ---------------------------------------------------------------------------------------------

# The fields that train.py writes beside model and model_args, and their types. A file may lack some of them.
CHECKPOINT_FIELDS = {
    "config": dict,
    "meta": dict,
    "step": int,
    "tokens": int,
    "seconds": float,
    "best_val_loss": float,
    "evaluations_since_best": int,
    "last_evaluation": int,
    "measured_by": list,
    "optimizer": list,
    "scaler": dict,
}


def load_checkpoint(path: str) -> dict:
    """A checkpoint as a dictionary with at least model (the state dict) and model_args (GPTConfig's fields).

    path: a file of train.py or of nanoGPT, or a Hugging Face GPT-2 folder. Only tensors and plain data are
    read, and no code in the file is run. The types of all fields are checked. Raises ModelError.
    """
    path = Path(path)
    if path.is_dir():
        return load_hugging_face(path)
    if not path.is_file():
        raise ModelError(f"{path}: No such file, or not a regular file")
    try:
        checkpoint = load_tensors(path)
    except Exception:  # a damaged zip or a forbidden pickle can raise any type of error
        raise ModelError(
            f"{path} is damaged, cannot be read, or holds more than tensors and plain data"
        ) from None
    try:
        if "iter_num" in checkpoint:  # this one is nanoGPT's, whose GELU is the exact one
            checkpoint = {
                "model": checkpoint["model"],
                "model_args": {"activation": "gelu_erf"} | checkpoint["model_args"],
                "config": checkpoint.get("config", {}),
            }
        for name, kind in CHECKPOINT_FIELDS.items():
            value = checkpoint.get(name, kind())
            if not isinstance(value, kind) or (kind in (int, float) and not value >= 0):
                raise TypeError(f"its {name} is {value!r:.40}")
        # this raises for a tensor, where only plain data belongs
        json.dumps([checkpoint.get(name) for name in ("config", "meta", "measured_by")])
        check_sizes(checkpoint["model"], path)
        checkpoint["model_args"] = asdict(GPTConfig(**checkpoint["model_args"]))
    except Exception as error:
        raise ModelError(f"{path} is not the checkpoint of a GPT, or damaged: {error}") from None
    return checkpoint


def load_tensors(path):
    """What torch.save has written, if it is only tensors and plain data. Raises any type of error."""
    is_zip = zipfile.is_zipfile(path)  # all but very old files are
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            # PyTorch's files are not compressed: a compressed one could fill the memory
            if any(file.compress_type for file in archive.filelist):
                raise zipfile.BadZipFile("compressed")
    # with mmap, tensors stay on the disk until they are used
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def check_sizes(tensors, path):
    """Raises TypeError if a small file claims huge tensors that overlap; tied weights may count twice."""
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * path.stat().st_size:
        raise TypeError("its tensors are larger than the file")


# {our name: Hugging Face's name} of GPTConfig's fields that have the same values there. Dropouts are left
# out: they belong to a run, not to its weights.
HF_NAMES = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "tie_weights": "tie_word_embeddings",
}
HF_DEFAULTS = {"tie_word_embeddings": True, "activation_function": "gelu_new"}  # older files lack these
HF_ACTIVATIONS = {  # {Hugging Face's name: ours}; we write the last name of "gelu"
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu": "gelu_erf",
    "relu": "relu",
}
# The values of Hugging Face's settings that our GPT can express.
HF_SUPPORTED = {
    "model_type": ["gpt2"],
    "activation_function": [*HF_ACTIVATIONS],
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
}


def transposed(name, tensor):
    """Transpose a block's matrix: Hugging Face's Conv1D holds it as (in, out), nn.Linear as (out, in)."""
    if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return tensor.T.contiguous()
    return tensor


def weight_files(folder):
    """The files with the weights of a Hugging Face folder: one, or several that are listed in an index."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {folder / Path(file).name for file in json.loads(index.read_bytes())["weight_map"].values()}
    whole = folder / "model.safetensors"
    return [whole if whole.exists() else folder / "pytorch_model.bin"]


def load_hugging_face(folder):
    """A Hugging Face folder of a GPT-2, as load_checkpoint returns it. Raises ModelError."""
    from safetensors.torch import load_file

    try:
        for path in folder.iterdir():
            if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe could wait for ever
                raise ModelError(f"{path.name} is no file")
        settings = HF_DEFAULTS | json.loads((folder / "config.json").read_bytes())
        for name, values in (HF_SUPPORTED | {"n_inner": [None, 4 * settings["n_embd"]]}).items():
            if name in settings and settings[name] not in values:
                raise ModelError(f"{name} is {settings[name]!r}, none of {values}")
        args = {ours: settings[theirs] for ours, theirs in HF_NAMES.items()}
        args["activation"] = HF_ACTIVATIONS[settings["activation_function"]]
        weights = {}
        for path in weight_files(folder):
            tensors = load_tensors(path) if path.suffix == ".bin" else load_file(path)
            check_sizes(tensors, path)
            weights |= {name: transposed(name, tensor) for name, tensor in tensors.items()}
        return {"model": weights, "model_args": asdict(GPTConfig(**args))}
    except Exception as error:  # safetensors and pickle have their own types of errors
        raise ModelError(
            f"{folder} is no GPT-2 of Hugging Face's, its config.json lacks a setting, or a file is only a "
            f"Git LFS pointer: {error}; if this is the folder of a run, give {folder}/best.pt"
        ) from None


# -- the machine ---------------------------------------------------------------------------------------------


def cpu_prefers_bfloat16():
    """Whether this CPU trains faster in bfloat16 than in float32: with AMX, or AMD's with AVX-512 BF16.

    An Intel CPU with AVX-512 BF16 but no AMX needs 1.6 times as long for a step as in float32. A CPU without
    either needs many times as long.
    """
    abilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older releases of torch
    amd = "AMD" in abilities.get("cpu_name", "")
    return abilities.get("amx_bf16") or (amd and abilities.get("avx512_bf16"))


def pick_device(device):
    """The device to run on. "auto" is the GPU that PyTorch finds, else the CPU. Raises ModelError."""
    if device == "auto":
        return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, ImportError, RuntimeError):
        raise ModelError(f"device={device} is not available (CUDA needs a GPU); use --device=cpu") from None
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # otherwise libraries take memory of the first GPU too
    return device


def check_compiler(device):
    """Raises ModelError if torch.compile does not work: no C++ compiler, or no Triton for this GPU."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # the compiler has its own types of errors
        raise ModelError(f"torch.compile does not work here: {error!s:.200}") from None


def pick_dtype(dtype, device, training=False):
    """The precision to multiply in. "auto" is the fastest one that learns as well as float32.

    That is bfloat16 on GPUs that support it, and float16 on other CUDA GPUs. CPUs use bfloat16 only in
    training, where the weights stay float32, and only if cpu_prefers_bfloat16.
    """
    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device == "cpu" and training and cpu_prefers_bfloat16():
        return "bfloat16"
    return "float32"
