# GPT-2 learns to answer instructions: a hundred steps, for a GPU or a patient CPU.
#   python prepare.py gpt2-medium && python prepare.py instructions
#   python train.py config/finetune_instructions.py && python sample.py --out_dir=out/instructions --chat=True
# --init_from=gpt2 is a third of the size, and answers worse.

out_dir = "out/instructions"
init_from = "gpt2-medium"
dataset = "instructions"
data_order = "epoch"
sample_prompt = ""

block_size = 256
dropout = 0.1
batch_size = 4
gradient_accumulation_steps = 4  # 4096 tokens a step, 9 steps an epoch
max_iters = 100
learning_rate = 5e-5
lr_schedule = "linear"
warmup_iters = 10

eval_interval = 10
eval_iters = 0
log_interval = 1
always_save_checkpoint = False  # it overfits: keep the best
