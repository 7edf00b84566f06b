# OpenAI's GPT-2 124M goes on with Shakespeare: a few hundred careful steps, for a GPU or a patient CPU.
#   python prepare.py gpt2 && python prepare.py shakespeare && python train.py config/finetune_shakespeare.py

out_dir = "out/gpt2_shakespeare"
init_from = "gpt2"
dataset = "shakespeare"
sample_prompt = "ROMEO:\n"

block_size = 256
dropout = 0.1
batch_size = 4
gradient_accumulation_steps = 8  # 8192 tokens a step, 37 steps an epoch
max_iters = 300
learning_rate = 3e-5
lr_schedule = "constant"
warmup_iters = 20

eval_interval = 50
eval_iters = 20
always_save_checkpoint = False  # it overfits: keep the best
