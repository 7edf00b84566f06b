# The "baby GPT" of train_shakespeare_char.py with today's architecture, for a GPU: fewer steps, a lower loss.
#   python prepare.py shakespeare_char && python train.py config/train_shakespeare_char_fast.py
# Its rates come from a small model on a CPU: neither tuned nor measured on a GPU.

out_dir = "out/shakespeare_char_fast"
dataset = "shakespeare_char"
sample_prompt = "\n"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
dropout = 0.25
bias = False
tie_weights = False
position = "rope"
qk_norm = True
activation = "relu2"
init = "zero"

optimizer = "muon"
learning_rate = 5e-3
muon_learning_rate = 0.01
lr_schedule = "linear"
beta2 = 0.99
warmup_iters = 100
max_iters = 2000

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits: keep the best
