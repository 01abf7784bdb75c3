from setuptools import setup

setup(
    name="minixmd",
    version="0.1.0",
    description="Cross-modal distillation between audio and vision language models, small enough to read",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6",  # CUDA builds of torch bring it, CPU builds do not; there are none but for Linux
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "huggingface-hub>=0.30",
        "soundfile>=0.12.1",
        "av>=14.2",
        "numpy>=1.26",
        "tqdm>=4.66",
        "jinja2>=3.1",
    ],
    extras_require={
        # transformers and peft: parity tests only
        "test": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", "transformers>=5", "peft>=0.18"],
    },
    packages=[  # explicit: find_packages() would also see tools/, tests/, bench/
        "minixmd",
        "minixmd.config",
        "minixmd.dryrun",
        "minixmd.inputs",
        "minixmd.learning",
        "minixmd.models",
        "minixmd.recipe_parts",
        "minixmd.recipes",
        "minixmd.report",
        "minixmd.runs",
        "minixmd.stages",
        "minixmd.tasks",
        "minixmd.toy",
        "minixmd.verify",
        "minixmd.kernels",
    ],
    package_dir={"minixmd.kernels": "kernels"},
    package_data={
        "minixmd.dryrun": ["*.json", "*.j2"],
        "minixmd.models": ["*.json"],
        "minixmd.report": ["*.json", "*.j2"],
        "minixmd.tasks": ["*.json"],
        "minixmd.toy": ["*.json", "*.jsonl"],
    },
)
