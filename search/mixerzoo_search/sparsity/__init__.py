"""`mixerzoo study sparsity`: whether sparser layers are easier to replace."""
