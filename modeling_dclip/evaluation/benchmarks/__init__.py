"""The benchmarks, one module for each kind; `kinds` lists them."""
