"""What is wrong with what a user gave, rather than with this code:
commands say it in one line, and anything else ends in a traceback.
"""

from datasets.exceptions import DatasetsError
from safetensors import SafetensorError

FAILURES = (ValueError, OSError, ImportError, DatasetsError, SafetensorError)
