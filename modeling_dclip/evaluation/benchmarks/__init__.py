"""What a model is measured on: one module a kind of benchmark; `kinds` lists them."""
