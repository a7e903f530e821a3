# a small character-level model of shakespeare, sized for one GPU
# (on a CPU take the sizes of train_pydoc.py)

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False # it overfits in the end: keep only what improves the val loss

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256 # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2 # the model is large for so little text

learning_rate = 1e-3 # small models bear more than large ones
min_lr = 1e-4 # a tenth of it
beta2 = 0.99 # a longer memory, since an iteration sees few tokens
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000 # where the run ends
