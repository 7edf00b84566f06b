# No block at all: the next character from the last one alone. What attention has to beat.
#   python prepare.py shakespeare_char && python train.py config/train_bigram.py

out_dir = "out/bigram"
dataset = "shakespeare_char"
sample_prompt = "\n"

n_layer = 0
n_head = 1
n_embd = 128
tie_weights = False
block_size = 64
batch_size = 16

learning_rate = 1e-2
beta2 = 0.99
warmup_iters = 10
max_iters = 1000

eval_interval = 250
eval_iters = 0  # the whole split
log_interval = 50
