# finetune the largest GPT-2 on shakespeare, in a few iterations
import time

out_dir = 'out-shakespeare'
dataset = 'shakespeare'
init_from = 'gpt2-xl' # a smaller one needs less memory: gpt2, gpt2-medium, gpt2-large

wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = f'ft-{time.time()}'

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False # it overfits soon: keep only what improves on the validation split

# one iteration sees batch_size * gradient_accumulation_steps * block_size tokens,
# about a ninth of the training split
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# small and constant: the weights are good already
learning_rate = 3e-5
decay_lr = False
