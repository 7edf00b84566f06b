# A small character-level GPT on Python's own reference: one to four minutes on two CPU cores.
#   python prepare.py && python train.py config/quickstart.py && python sample.py --out_dir=out/quickstart

out_dir = "out/quickstart"
dataset = "pydocs"
sample_prompt = "\n"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16

bias = False
tie_weights = False
position = "rope"
qk_norm = True
activation = "relu2"
init = "zero"

optimizer = "muon"
learning_rate = 1e-2
muon_learning_rate = 0.01
lr_schedule = "linear"
beta1 = 0.95  # 0.9 learns faster here, and overfits sooner
beta2 = 0.99  # a step has few tokens
warmup_iters = 30
max_iters = 900

eval_interval = 100
eval_iters = 20
log_interval = 10
