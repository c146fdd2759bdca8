"""How results are shown: tables, plots, comparisons, reports, galleries and maps."""
