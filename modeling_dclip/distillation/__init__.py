"""Train anchor, teacher and student from columns: losses, trainers, recipes, stages."""
