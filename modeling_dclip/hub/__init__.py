"""What meets the outside: publishing, export, conversion of checkpoints, a search index, and the Space."""
