# A small character-level GPT on Tiny Shakespeare for a CPU: a minute or two, validation loss about 1.82
# (1.90 at the 1e-3 that others take for the same sizes).
#   python prepare.py shakespeare_char && python train.py config/train_shakespeare_char_cpu.py

out_dir = "out/shakespeare_char_cpu"
dataset = "shakespeare_char"
sample_prompt = "\n"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
dropout = 0.0
bias = False

learning_rate = 2e-3
min_lr = 1e-4
beta2 = 0.99  # a step has few tokens
warmup_iters = 100
max_iters = 2000

eval_interval = 250
eval_iters = 20
log_interval = 10
