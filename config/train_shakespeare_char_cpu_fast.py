# As deep and wide as train_shakespeare_char_cpu.py, with today's architecture: far better in as long a time.
#   python prepare.py shakespeare_char && python train.py config/train_shakespeare_char_cpu_fast.py

out_dir = "out/shakespeare_char_cpu_fast"
dataset = "shakespeare_char"
sample_prompt = "\n"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 12
dropout = 0.0
bias = False
tie_weights = False  # input and output embedding want different rates of learning
position = "rope"
qk_norm = True
activation = "relu2"
init = "zero"

optimizer = "muon"
learning_rate = 1e-2
muon_learning_rate = 0.01
lr_schedule = "linear"
beta2 = 0.99  # a step has few tokens
warmup_iters = 30
max_iters = 800

eval_interval = 80
eval_iters = 20
log_interval = 10
