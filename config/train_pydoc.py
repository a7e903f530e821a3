# a first run: a tiny model of Python's language reference, on a CPU, without a network

out_dir = 'out-pydoc'
dataset = 'pydoc'

wandb_log = False

eval_interval = 250
eval_iters = 50
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 12
block_size = 64 # tokens of context, about 190 characters

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 2e-3 # small models can take higher rates
min_lr = 2e-4 # a tenth of learning_rate
beta2 = 0.99 # a longer average, because an iteration has few tokens
warmup_iters = 100
max_iters = 2000
lr_decay_iters = 2000 # equal to max_iters
