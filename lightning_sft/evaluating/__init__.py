"""A model → benchmark figures: log-likelihoods and texts, as lm-eval asks for them."""
