"""The experiments: the paper, runnable; they import only what sn_jax makes public."""
