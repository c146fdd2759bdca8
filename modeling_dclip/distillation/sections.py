"""The sections of a recipe by name, in the order of their stages."""

from modeling_dclip.distillation.arguments import (
    AnchorArguments,
    RegionsArguments,
    StudentArguments,
    TargetsArguments,
    TeacherArguments,
)
from modeling_dclip.distillation.reinforced_arguments import DMCLIPArguments, ReinforceArguments

SECTIONS = {
    "anchor": AnchorArguments,
    "regions": RegionsArguments,
    "teacher": TeacherArguments,
    "targets": TargetsArguments,
    "student": StudentArguments,
    "reinforce": ReinforceArguments,
    "dmclip": DMCLIPArguments,
}
TRAINING_SECTIONS = ("anchor", "teacher", "student", "dmclip")
