# GPT-2 124M on 10 billion tokens of FineWeb (prepare.py fineweb --shards=103), 0.5M a step, for 8 GPUs:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# The run is the same on 1, 2, 4, 8, 16 or 32 GPUs. On eight with room for it, --batch_size=64
# --gradient_accumulation_steps=8 makes the same step of fewer micro-batches.

out_dir = "out/gpt2"
dataset = "fineweb"
data_order = "epoch"  # each window once before any comes again

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 32  # 32 * 16 * 1024 = 524,288 tokens a step

learning_rate = 6e-4
min_lr = 0.0
weight_decay = 0.1
beta2 = 0.95
warmup_iters = 700
max_iters = 19560  # 10 billion tokens: once through the 103 shards

eval_interval = 1000
eval_iters = 200
log_interval = 10
