"""transformers' own common model tests, fetched as they were at the installed version.

The wheel leaves them out, the source distribution has them. They are unpacked as a package outside the repository's
files, with stubs for the four modules they import and the distribution lacks.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

CACHE = Path(sys.prefix) / "conformance"
PACKAGE = "transformers_common_tests"
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "../fetch_hub_objects_for_ci.py": "def url_to_local_path(url, *args):\n    return url\n",
}


def fetch():
    """Folder to put on `sys.path`; downloaded once per version, with `parameterized`, which the tests need."""
    folder = CACHE / f"transformers-{transformers.__version__}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        scratch = Path(scratch)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        source = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(scratch)]
        subprocess.run([*pip, "download", *source, f"transformers=={transformers.__version__}"], check=True)
        subprocess.run([*pip, "install", "--no-deps", "--target", str(scratch / "ready"), "parameterized"], check=True)
        with tarfile.open(next(scratch.glob("transformers-*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        tests = scratch / "ready" / PACKAGE
        shutil.move(scratch / f"transformers-{transformers.__version__}" / "tests", tests)
        for name, text in STUBS.items():
            (tests / name).parent.mkdir(exist_ok=True)
            (tests / name).write_text(text)
        for package in (tests, *(tests / name.split("/")[0] for name in STUBS if not name.startswith(".."))):
            (package / "__init__.py").touch()
        os.replace(scratch / "ready", folder)
    return folder


def common(module):
    """A module of the fetched tests, such as `"test_modeling_common"`."""
    folder = str(fetch())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(f"{PACKAGE}.{module}")
