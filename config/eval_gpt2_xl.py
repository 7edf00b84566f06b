# Loss and perplexity of OpenAI's GPT-2 1558M on The Verdict, whole splits in windows of 256 tokens.
#   python prepare.py gpt2-xl && python prepare.py verdict && python train.py config/eval_gpt2_xl.py
# On another prepared dataset: --dataset=shakespeare --block_size=1024

init_from = "gpt2-xl"
dataset = "verdict"
block_size = 256
batch_size = 2
eval_iters = 0
eval_only = True
sample_prompt = "Every effort moves you"
