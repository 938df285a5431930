"""Foreign checkpoints in, other formats out: one file for each source. Installed as `modeling_convtransformer.convert`."""
