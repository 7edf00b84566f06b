# A small model that answers: sums of two numbers below 100, as conversations. Some minutes on two CPU cores.
#   python config/train_sums_chat.py > sums_chat.jsonl && python prepare.py sums_chat.jsonl --tokenizer=char
#   python train.py config/train_sums_chat.py && python sample.py --out_dir=out/sums_chat --chat=True

if __name__ == "__main__":  # run by itself, it writes the examples: nine in ten of all sums there are
    import json
    import random

    _sums = [(a, b) for a in range(100) for b in range(100)]
    random.Random(1).shuffle(_sums)
    for a, b in _sums[:9000]:
        messages = [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}]
        print(json.dumps({"messages": messages}))

out_dir = "out/sums_chat"
dataset = "sums_chat"
data_order = "epoch"
sample_prompt = ""

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
beta2 = 0.99
warmup_iters = 30
max_iters = 1500

eval_interval = 250
eval_iters = 0
log_interval = 50
