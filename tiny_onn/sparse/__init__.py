"""N:M sparsity: patterns, masks, estimators and the packed form of sparse tensor cores."""
