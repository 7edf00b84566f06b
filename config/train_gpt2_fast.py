# A modern 124M model on FineWeb, about 0.5M tokens a step, for 8 GPUs; train_gpt2.py is the faithful GPT-2.
#   python prepare.py fineweb --shards=20
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
# Rotary positions, QK-norm, ReLU², residual projections that begin at zero, and Muon for the matrices of the
# blocks, as Jordan et al. 2024 (modded-nanogpt) found to pay at this size. Not yet run to its end by us.

out_dir = "out/gpt2_fast"
dataset = "fineweb"
data_order = "epoch"  # each window once before any comes again

n_layer = 12
n_head = 6  # heads of 128
n_embd = 768
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 4 * 8  # 32 * 16 * 1024 = 524,288 tokens a step
bias = False
tie_weights = False
position = "rope"
qk_norm = True
activation = "relu2"
init = "zero"

optimizer = "muon"
learning_rate = 3e-3
muon_learning_rate = 0.02
weight_decay = 0.01
beta1 = 0.95  # Muon's momentum, as there
lr_schedule = "wsd"
warmup_iters = 100
max_iters = 3800  # 2B tokens: once through 20 shards

eval_interval = 250
eval_iters = 100
log_interval = 10
