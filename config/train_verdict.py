# GPT-2's 124M architecture from scratch on a 20 kB story: watch a model learn it by heart, and overfit.
#   python prepare.py verdict && python train.py config/train_verdict.py

out_dir = "out/verdict"
dataset = "verdict"
sample_prompt = "Every effort moves you"
seed = 123

n_layer = 12
n_head = 12
n_embd = 768
block_size = 256
dropout = 0.1
qkv_bias = False
tie_weights = False
init = "torch"

data_order = "epoch"
batch_size = 2
max_epochs = 10  # of 9 steps
learning_rate = 4e-4
lr_schedule = "constant"
warmup_iters = 0
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.999
grad_clip = 0.0

eval_interval = 9
eval_iters = 0  # the whole split
