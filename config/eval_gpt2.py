# validation loss of OpenAI's gpt2 (124M parameters), without training
init_from = 'gpt2'
eval_only = True
eval_iters = 500 # more batches, less noise
batch_size = 8
wandb_log = False
