# validation loss of OpenAI's gpt2-large (774M parameters), without training
init_from = 'gpt2-large'
eval_only = True
eval_iters = 500 # more batches, less noise
batch_size = 8
wandb_log = False
