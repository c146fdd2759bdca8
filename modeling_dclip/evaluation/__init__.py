"""Measure a dual encoder: retrieval, zero-shot classification, the trade-off between them,
and the files and pictures made from it.
"""
