"""Readers, drawn scenes, regions and teacher targets: every stage adds columns to one `datasets.Dataset`.

Nothing is imported here, so that `import modeling_dclip.data` costs nothing; import the module that does the step.
"""
