# GPT-2 124M on FineWeb, about 0.5M tokens a step, for 8 GPUs:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# On another number of GPUs the run is the same, as long as the number divides gradient_accumulation_steps.

out_dir = "out/gpt2"
dataset = "fineweb"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch_size = 12
gradient_accumulation_steps = 5 * 8  # 40 * 12 * 1024 = 491,520 tokens a step

learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1
beta2 = 0.95
warmup_iters = 2000
max_iters = 600000  # 300B tokens

eval_interval = 1000
eval_iters = 200
log_interval = 10
