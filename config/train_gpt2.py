# reproduce GPT-2 (124M) on openwebtext; nanoGPT reports a loss near 2.85 after days on 8 A100s
# this command uses all devices of the machine:
# $ python train_jax.py config/train_gpt2.py

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# about half a million tokens per iteration, on any number of devices
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# about 300 billion tokens in all
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
