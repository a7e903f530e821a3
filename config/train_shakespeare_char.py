# a small character-level model of shakespeare, sized for one GPU
# (README.md has nanoGPT's sizes for a CPU)

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False # it overfits late: save only improvements of the val loss

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256 # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2 # the model is large for so little text

learning_rate = 1e-3 # small models can take higher rates
min_lr = 1e-4 # a tenth of learning_rate
beta2 = 0.99 # a longer average, because an iteration has few tokens
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000 # equal to max_iters
