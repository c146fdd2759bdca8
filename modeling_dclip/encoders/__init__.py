"""Any dual encoder as one: loading, how each family reads text, and every content hash."""
