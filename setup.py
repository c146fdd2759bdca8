"""Package metadata. Extras are listed once here; `all` is everything that installs without CUDA."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    # AGPL-3.0. The Apache-2.0 alternative, a transformers object-detection checkpoint, needs no extra.
    # ultralytics' own release with opencv-python-headless: the other one needs libGL and X libraries of the system.
    "regions": ["ultralytics-opencv-headless>=8.3.242"],
    "peft": ["peft>=0.18"],
    "eval": ["evaluate>=0.4", "matplotlib>=3.8", "torchvision>=0.23"],
    "space": ["gradio>=6.29", "matplotlib>=3.8"],
    "index": ["faiss-cpu>=1.8"],
    "open_clip": ["open_clip_torch>=3.3"],
    # What the first SigLIP's tokenizer reads.
    "siglip": ["protobuf>=4.21.1", "sentencepiece>=0.2"],
    "export": [
        "onnx>=1.17",
        "onnxruntime>=1.20",
        "onnxscript>=0.6.2",
        "open_clip_torch>=3.3",
        "sentence-transformers>=5.4",
    ],
    "dev": [
        "hypothesis>=6.100",
        "matplotlib>=3.8",
        "mypy>=2.0",
        "pytest>=8",
        "pytest-cov>=5",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "scikit-learn>=1.3",
        "torchmetrics>=1.4",
        "types-PyYAML>=6",
        "types-tqdm>=4.66",
    ],
    # What the benchmarks compare with.
    "benchmarks": ["timm>=1.0"],
    "tensorboard": ["tensorboard>=2.14"],
    # 8-bit optimisers; of use on a GPU, so not part of `all`.
    "eight_bit": ["bitsandbytes>=0.45", "torchao>=0.11"],
    # Needs a CUDA toolchain at install time, so it is not part of `all`.
    "mamba": ["mamba-ssm>=2.2"],
}
EXTRAS["all"] = sorted(
    {requirement for name, group in EXTRAS.items() if name not in ("eight_bit", "mamba") for requirement in group}
)

setup(
    name="modeling_dclip",
    version="0.1.0.dev0",
    description="DCLIP and DM-CLIP: CLIP image encoders distilled for retrieval and for speed, Hugging Face-native",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["modeling_dclip", "modeling_dclip.*"]),
    package_data={
        "modeling_dclip": [
            "py.typed",
            "distillation/fields.txt",
            "evaluation/metrics/*/*.py",
            "evaluation/reports/templates/*.jinja",
        ]
    },
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4.1",
        "fsspec[http]>=2025.9",  # shards at an address; before 2025.9 fsspec hid Last-Modified
        "huggingface_hub>=2.2",
        "jinja2>=3.1.5",  # reports and galleries; torch needs it too
        "numpy>=1.26",
        "pillow>=10",
        "pyarrow>=21",
        "pyyaml>=6",
        "safetensors>=0.5",
        "scipy>=1.11",
        "torch>=2.8",
        "tqdm>=4.66",
        "transformers>=5.18,<6",
    ],
    extras_require=EXTRAS,
)
