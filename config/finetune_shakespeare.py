# finetune the largest GPT-2 on shakespeare, in a few iterations
import time

out_dir = 'out-shakespeare'
dataset = 'shakespeare'
init_from = 'gpt2-xl' # less memory: gpt2, gpt2-medium, gpt2-large

wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = f'ft-{time.time()}'

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False # it overfits soon: save only improvements of the val loss

# tokens per iteration: batch_size * gradient_accumulation_steps * block_size,
# about a ninth of the training split
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# small and constant, because the weights are already good
learning_rate = 3e-5
decay_lr = False
