# a first run: a tiny character-level model of Python's own reference, for a CPU and no network

out_dir = 'out-pydoc-char'
dataset = 'pydoc_char'

wandb_log = False

eval_interval = 250
eval_iters = 50
log_interval = 10
always_save_checkpoint = False # keep only what improves on the validation split

gradient_accumulation_steps = 1
batch_size = 12
block_size = 64 # characters of context

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0 # so short a run can do without

learning_rate = 1e-3 # small models bear more than large ones
min_lr = 1e-4 # a tenth of it
beta2 = 0.99 # a longer memory, since an iteration sees few tokens
warmup_iters = 100
max_iters = 2000
lr_decay_iters = 2000 # where the run ends
