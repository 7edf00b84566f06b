# The "baby GPT" on Tiny Shakespeare: 10.7M parameters, minutes on a GPU, validation loss about 1.47.
#   python prepare.py shakespeare_char && python train.py config/train_shakespeare_char.py

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
sample_prompt = "\n"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
dropout = 0.2
bias = False

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99  # a step has few tokens
warmup_iters = 100
max_iters = 5000

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits: keep the best
