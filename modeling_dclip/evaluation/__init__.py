"""Measure dual encoders: benchmarks, the records that keep what was measured, and the reports made from records."""
