"""What imports DeepSpeed, Hydra or other frameworks; installed as ``tp_embed.integrations``."""
