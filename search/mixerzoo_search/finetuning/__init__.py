"""Global distillation: `mixerzoo finetune`, and the rounds in which a search gives it to its best plans."""
